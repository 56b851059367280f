r"""A Llama-shaped decoder that writes one token at a time: tokens a second from codes against PyTorch's own.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decoder.py --bits 4

Random weights. Everyone reads the same prompt, and then its own tokens one after the other with a cache of
keys and values; all take turns in one process, in an order drawn anew. "Of the bound" is how near the time
comes to what reading the weights alone takes, at the rate at which PyTorch adds up a large tensor.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from statistics import median

import torch
from linear import read_rate
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lexibit
from lexibit import LexibitConfig
from lexibit.benchmark.contestant import nbytes
from lexibit.ops import COMPUTE


def seconds_a_token(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> float:
    """The median over the tokens that a model writes behind a prompt."""
    seconds = []
    with torch.inference_mode():
        output = model(input_ids=prompt, use_cache=True)
        for _ in range(count):
            token = output.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--scheme", default="lq")
    parser.add_argument("--groups", default="row")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 256,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    codes = copy.deepcopy(model)
    plan = lexibit.quantize(codes, LexibitConfig(args.scheme, args.bits, groups=args.groups), progress=False)
    everyone: dict[str, PreTrainedModel] = {
        "torch, float32": model,
        "torch, bf16": copy.deepcopy(model).to(torch.bfloat16),  # type: ignore[arg-type]
    }
    for compute in COMPUTE:
        everyone[f"lexibit, {compute}"] = copy.deepcopy(codes)
        lexibit.optimize(everyone[f"lexibit, {compute}"], compute)
    rate, order = read_rate(9), random.Random(0)
    print(
        f"{sum(one.numel() for one in model.parameters()) / 1e6:.0f} M weights, {args.scheme}, "
        f"{plan.bits_per_weight:.2f} bits; {torch.get_num_threads()} threads; {rate / 1e9:.1f} GB/s\n"
    )
    prompt = torch.randint(3, 32000, (1, args.prompt))
    seconds: dict[str, list[float]] = {name: [] for name in everyone}
    for turn in range(args.rounds + 1):
        for name in order.sample(list(everyone), len(everyone)):
            found = seconds_a_token(everyone[name], prompt, args.tokens)
            if turn:  # the first is for warming up
                seconds[name].append(found)
    base = median(seconds["torch, float32"])
    print("| | MB | ms a token | tokens a second | of the bound |\n|---|---|---|---|---|")
    for name, measured in seconds.items():
        size, middle = nbytes(everyone[name]), median(measured)
        spread = f"{1e3 * min(measured):.1f} to {1e3 * max(measured):.1f}"
        print(
            f"| {name} | {size / 1e6:.0f} | {1e3 * middle:.1f} ({spread}) | {1 / middle:.1f} "
            f"({base / middle:.2f}x) | {size / rate / middle:.2f} |"
        )


if __name__ == "__main__":
    main()
