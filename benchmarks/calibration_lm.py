"""Perplexity of language models, calibrated and not: prints a table.

    python benchmarks/calibration_lm.py MODEL --bits 2,3,4 [--text TRAIN --test TEST] [--gguf FILE]

Without text the model writes it itself: seeded samples to calibrate on, and others to measure on. GPTQ is a
min-max or MSE grid per row and error feedback alone; SqueezeLLM is k-means per row weighted by the squared
gradients, without its outliers.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lexibit
from lexibit import Calibration, Effort, LexibitConfig
from lexibit.calibration import GPTQ

ROW = {"groups": "row", "levels_dtype": "float16"}
GRID = ROW | {"options": {"affine": True}}
RECIPES: dict[str, tuple[dict[str, Any], Effort | None]] = {
    "k-means per row": (ROW, None),
    "SqueezeLLM's: k-means per row, squared gradients": (ROW, None),
    "GPTQ, min-max grid per row": (GRID | {"scheme": "lq"}, GPTQ),
    "GPTQ, MSE grid per row": (GRID | {"scheme": "mse"}, GPTQ),
    "uniform grid per row, calibrated": (GRID | {"scheme": "mse"}, Effort()),
    "binary codes per row, calibrated": (ROW | {"scheme": "binary"}, Effort()),
    "k-means within 0.2 bits, calibrated": ({"groups": "within:0.2", "levels_dtype": "float16"}, Effort()),
}


def sampled(model: PreTrainedModel, count: int, length: int, seed: int) -> Tensor:
    """Texts that a model writes: ``[count, length]``."""
    torch.manual_seed(seed)
    begin = torch.full((count, 1), model.config.bos_token_id)
    with torch.inference_mode():
        out: Tensor = model.generate(  # type: ignore[operator]
            begin, do_sample=True, min_new_tokens=length - 1, max_new_tokens=length - 1, top_k=0
        )
    return out.clone()  # a tensor that gradients may pass


def read(tokenizer: Any, file: Path, count: int, length: int) -> Tensor:
    """The first tokens of a text: ``[count, length]``."""
    ids = tokenizer(file.read_text(encoding="utf-8")[: count * length * 12])["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """Of all tokens but the first of each text."""
    nats, count = 0.0, 0
    with torch.inference_mode():
        for part in ids.split(4):
            nats += float(model(input_ids=part, labels=part).loss) * part[:, 1:].numel()
            count += part[:, 1:].numel()
    return math.exp(nats / count)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tests", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", default="", help="Only those with one of these words in their names.")
    args = parser.parse_args()
    how = {"gguf_file": args.gguf} if args.gguf else {}
    floats = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **how).eval()
    if args.text:
        tokenizer = AutoTokenizer.from_pretrained(args.model, **how)
        learn = read(tokenizer, args.text, args.sequences, args.length)
        judge = read(tokenizer, args.test, args.tests, args.length)
    else:
        learn = sampled(floats, args.sequences, args.length, args.seed)
        judge = sampled(floats, args.tests, args.length, 1000)
    batches = [{"input_ids": part} for part in learn.split(8)]
    print(f"float32: {perplexity(floats, judge):.3f} on {judge[:, 1:].numel()} tokens", flush=True)
    fisher = None
    print("| bits | recipe | stored bits | perplexity | seconds |\n|---|---|---|---|---|")
    for bits in map(int, args.bits.split(",")):
        for name, (settings, effort) in RECIPES.items():
            if not any(word in name for word in args.recipes.split(",")):
                continue
            model = copy.deepcopy(floats)
            importances = None
            if "gradients" in name:
                if fisher is None:
                    labelled = [{"input_ids": row, "labels": row} for row in learn.split(1)]
                    fisher = lexibit.importance.fisher(copy.deepcopy(floats), labelled, progress=False)
                importances = fisher
            start = time.perf_counter()
            plan = lexibit.quantize(
                model,
                LexibitConfig(bits=bits, **settings),
                importances=importances,
                calibration=None if effort is None else Calibration(batches, effort),
                progress=False,
            )
            seconds = time.perf_counter() - start
            found = perplexity(model, judge)
            print(
                f"| {bits} | {name} | {plan.bits_per_weight:.2f} | {found:.3f} | {seconds:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
