r"""A sentence encoder from codes against float32, in one process, one and many texts at a time.

    python benchmarks/encoder.py --bits 3,4 --threads 1,2

Each time is the median of several; all models take turns, so that what else runs on the machine meets all.
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median

import torch

import lexibit
from lexibit import LexibitConfig, checkpoint, demo
from lexibit.ops import native

LENGTHS = ((1, 8), (1, 128), (8, 32), (64, 16))  # texts, tokens


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=numbers, default=[3, 4])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    floats = checkpoint.load_float(demo.encoder_folder()).eval()
    models = {"float32": (floats, native.chosen().name)}
    for bits in args.bits:
        model = copy.deepcopy(floats)
        lexibit.quantize(model, LexibitConfig(bits=bits), progress=False)
        models[f"{bits} bits"] = (model, native.chosen().name)
        models[f"{bits} bits, reference"] = (model, native.REFERENCE)
    print(f"kernels: {native.chosen().name}; milliseconds, and times as fast as float32")
    print("| texts x tokens | threads | " + " | ".join(models) + f" |\n|{'---|' * (2 + len(models))}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for texts, tokens in LENGTHS:
            ids = torch.randint(1000, 20000, (texts, tokens), generator=torch.Generator().manual_seed(0))
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(args.rounds + 2):
                for name, (model, kernels) in models.items():
                    with torch.inference_mode(), lexibit.ops.kernels(kernels):
                        start = time.perf_counter()
                        model(input_ids=ids, attention_mask=torch.ones_like(ids))
                        if turn >= 2:  # the first ones are for warming up
                            seconds[name].append(time.perf_counter() - start)
            least = median(seconds["float32"])
            cells = [
                f"{1e3 * median(some):.1f}" + ("" if name == "float32" else f" ({least / median(some):.2f}x)")
                for name, some in seconds.items()
            ]
            print(f"| {texts} x {tokens} | {threads} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
