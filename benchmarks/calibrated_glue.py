"""Fine-tuned models at few bits, calibrated: what of the mean score of some GLUE tasks is kept.

    python benchmarks/calibrated_glue.py MODELS --data GLUE --tasks mrpc,rte,cola,sst-2 --out glue.md

MODELS holds a folder for each task, of lexibit finetune. Calibrated on examples of the training split, drawn
with each seed; no label is looked at. Lines that are done are kept, and not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

import lexibit
from lexibit import Calibration, LexibitConfig, checkpoint, tasks
from lexibit.calibration import of_task


def score(model: Any, tokenizer: Any, task: str, data: Path) -> float:
    """The first metric of a task, times 100, on its dev split."""
    chosen = tasks.task(task)
    outcomes = chosen.outcomes(model, tokenizer, chosen.load(data), batch_size=64, progress=False)
    return chosen.scores(outcomes)[0].value


def line(folder: Path, task: str, data: Path, bits: int, seed: int | None, texts: int) -> dict[str, Any]:
    """One measurement; without bits of the float model, without a seed by the weights alone."""
    model, tokenizer = checkpoint.load_model(folder), checkpoint.load_tokenizer(folder)
    start, stored = time.perf_counter(), 32.0
    if bits < 32:
        calibration = None
        if seed is not None:
            batches = of_task(model, tokenizer, task, data, limit=texts, seed=seed)
            calibration = Calibration(batches)
        plan = lexibit.quantize(
            model, LexibitConfig.recommended(bits), calibration=calibration, progress=False
        )
        stored = plan.bits_per_weight
    seconds = time.perf_counter() - start
    found = score(model, tokenizer, task, data)
    return {
        "task": task,
        "bits": bits,
        "seed": seed,
        "stored": stored,
        "score": found,
        "seconds": seconds,
    }


def table(lines: list[dict[str, Any]], names: list[str]) -> str:
    """Of each recipe the scores of all tasks, their mean, and how much of float32's that is."""

    def cell(values: list[float]) -> str:
        mean = f"{statistics.mean(values):.2f}"
        return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"

    out = [
        f"| recipe | stored bits | {' | '.join(names)} | mean | of float32 |",
        "|---" * (len(names) + 4) + "|",
    ]
    floats = 0.0
    for bits, calibrated in ((32, False), (3, False), (3, True), (2, False), (2, True)):
        mine = [one for one in lines if one["bits"] == bits and (one["seed"] is not None) == calibrated]
        scores = {name: [one["score"] for one in mine if one["task"] == name] for name in names}
        if not all(scores.values()):
            continue
        seeds = range(min(map(len, scores.values())))
        means = [statistics.mean(scores[name][seed] for name in names) for seed in seeds]
        floats = floats or means[0]
        name = (
            "float32"
            if bits == 32
            else f"{bits} bits, {'calibrated' if calibrated else 'by the weights alone'}"
        )
        kept = cell([100 * mean / floats for mean in means])
        cells = " | ".join(cell(scores[task]) for task in names)
        out.append(f"| {name} | {mine[0]['stored']:.2f} | {cells} | {cell(means)} | {kept} % |")
    return "\n".join(out)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="mrpc,rte,cola,sst-2")
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--kept", type=Path, default=Path("glue.json"), help="Where lines are kept.")
    parser.add_argument("--out", type=Path, help="The table.")
    args = parser.parse_args()
    logging.disable_progress_bar()
    lines = json.loads(args.kept.read_text()) if args.kept.exists() else []
    done = {(one["task"], one["bits"], one["seed"]) for one in lines}
    names, widths = args.tasks.split(","), [int(bits) for bits in args.bits.split(",")]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    wanted: list[tuple[int, int | None]] = [(32, None)]
    wanted += [(bits, seed) for seed in (None, *seeds) for bits in widths]
    for bits, seed in wanted:
        for task in names:
            folder = args.models / task
            if (task, bits, seed) not in done and folder.is_dir():
                lines.append(line(folder, task, args.data, bits, seed, args.texts))
                print(lines[-1], flush=True)
                args.kept.write_text(json.dumps(lines, indent=1))
    print(found := table(lines, names))
    if args.out:
        args.out.write_text(found + "\n")


if __name__ == "__main__":
    main()
