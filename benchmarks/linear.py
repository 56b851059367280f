r"""One linear layer from codes against PyTorch's own, by the number of tokens.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/linear.py --bits 3 --tokens 1,8,16,128,1024

Everyone has many layers and goes through eight of them at a turn, so that weights come from memory as in a
model; all take turns in one process, in an order drawn anew. Times are of one layer. "Of the bound" is how
near the time comes to what reading the weights alone takes, at the rate of PyTorch adding up a large tensor.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import lexibit
from lexibit import LexibitConfig
from lexibit.benchmark.contestant import nbytes
from lexibit.benchmark.peers import PackedLinear
from lexibit.ops import COMPUTE

COLD = 96 << 20  # bytes that do not stay in a cache
TURN = 8  # layers


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def read_rate(rounds: int) -> float:
    """Bytes a second, in the mean over a tensor that is read whole."""
    large = torch.ones(256 << 18)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        large.sum()
        seconds.append(time.perf_counter() - start)
    return large.nbytes / median(seconds)


def layers(args: argparse.Namespace) -> dict[str, tuple[list[nn.Module], torch.dtype]]:
    """Everyone's layers, and the dtype of what they are given."""
    layer = nn.Linear(args.columns, args.rows)
    codes = nn.Sequential(copy.deepcopy(layer))
    lexibit.quantize(codes, LexibitConfig(bits=args.bits, groups=args.groups), progress=False)
    half = copy.deepcopy(layer).bfloat16()
    int8 = torch.ao.quantization.quantize_dynamic(
        nn.Sequential(copy.deepcopy(layer)), {nn.Linear}, torch.qint8
    )
    found: dict[str, tuple[Callable[[], nn.Module], int, torch.dtype]] = {
        "float32": (lambda: copy.deepcopy(layer), nbytes(layer), torch.float32),
        "torch, bf16": (lambda: copy.deepcopy(half), nbytes(half), torch.bfloat16),
        "torch, bf16, packed": (lambda: PackedLinear(half), nbytes(half), torch.bfloat16),
        "torch, int8 dynamic": (lambda: copy.deepcopy(int8), nbytes(layer) // 4, torch.float32),
    }
    for compute in COMPUTE:
        one = copy.deepcopy(codes)
        lexibit.optimize(one, compute)
        found[f"lexibit, {compute}"] = (lambda one=one: copy.deepcopy(one)[0], nbytes(one), torch.float32)
    return {
        name: ([make() for _ in range(COLD // size + TURN)], dtype)
        for name, (make, size, dtype) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=768)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--groups", default="row")
    parser.add_argument("--tokens", type=numbers, default=[1, 8, 16, 128, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    everyone, order = layers(args), random.Random(0)
    size = nbytes(everyone["lexibit, int8"][0][0])
    rate = read_rate(args.rounds)
    bound = size / rate
    print(
        f"{args.rows} x {args.columns}, {args.bits} bits, {args.groups}; {torch.get_num_threads()} threads; "
        f"{rate / 1e9:.1f} GB/s: {size / 1e3:.0f} kB in {1e6 * bound:.0f} us\n"
    )
    print(f"| microseconds | {' | '.join(map(str, args.tokens))} |\n|---{'|---' * len(args.tokens)}|")
    rows: dict[str, list[str]] = {name: [] for name in everyone}
    for tokens in args.tokens:
        inputs = {
            dtype: torch.randn(tokens, args.columns, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
        }
        seconds: dict[str, list[float]] = {name: [] for name in everyone}
        with torch.inference_mode():
            for turn in range(args.rounds + 3):
                for name in order.sample(list(everyone), len(everyone)):
                    some, dtype = everyone[name]
                    passed, x = [some[(turn * TURN + i) % len(some)] for i in range(TURN)], inputs[dtype]
                    start = time.perf_counter()
                    for layer in passed:
                        layer(x)
                    if turn >= 3:  # the first ones are for warming up
                        seconds[name].append((time.perf_counter() - start) / TURN)
        base = median(seconds["float32"])
        for name, measured in seconds.items():
            middle = median(measured)
            share = (
                f", {bound / middle:.2f} of the bound" if tokens == 1 and name.startswith("lexibit") else ""
            )
            rows[name].append(f"{1e6 * middle:.0f} ({base / middle:.2f}x{share})")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
