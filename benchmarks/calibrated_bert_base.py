"""Seconds and peak memory of calibrating a BERT-base-sized encoder.

    python benchmarks/calibrated_bert_base.py --bits 3

A seeded random BERT-base (published weights need the hub, and random ones take as long), 128 sequences of 128
tokens.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from transformers import BertConfig, BertModel

import lexibit
from lexibit import Calibration, LexibitConfig
from lexibit.calibration.texts import SIZE


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=args.layers)).eval()
    ids = torch.randint(1000, 30000, (args.sequences, args.tokens))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(SIZE)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    start = time.perf_counter()
    plan = lexibit.quantize(model, LexibitConfig.recommended(args.bits), calibration=Calibration(batches))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"{seconds:.0f} s on {torch.get_num_threads()} threads; {plan.bits_per_weight:.3f} bits a weight; "
        f"peak {peak:.0f} MB, {peak - before:.0f} MB above the loaded float model ({before:.0f} MB)"
    )


if __name__ == "__main__":
    main()
