r"""The first paper's experiment on your model: fine-tune, quantize, tune the codebooks, evaluate.

    python examples/kmeans_vs_linear.py MODEL --data ./glue --work ./runs --out docs/results/glue.md \
        --tasks cola,rte,mrpc,sts-b,sst-2 --bits 1,2,3,4,5 --seeds 0

For every task a float model is fine-tuned; for every scheme and width it is quantized, evaluated, its
codebooks tuned, and evaluated again (Zhao et al. 2020, Tables 1 and 2). Every step is a command of lexibit
whose result stays in the folder of runs: what is there is not done again, so that a run that was stopped goes
on. Settings of single tasks: ``--epochs sst-2=1,mrpc=4``, ``--limit sst-2=10000``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

SCHEMES = {"linear": ["--scheme", "linear"], "k-means": ["--scheme", "kmeans", "--option", "init=k-means++"]}


def lexibit(*arguments: object) -> None:
    line = [sys.executable, "-m", "lexibit", *map(str, arguments)]
    print("$ lexibit", *arguments, flush=True)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def names(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def each(text: str, kind: type) -> dict[str, Any]:
    """``a=1,b=2`` as a dictionary."""
    return {name: kind(value) for name, value in (part.split("=") for part in text.split(",") if part)}


def scores(model: Path, task: str, common: list[object], seed: int) -> list[dict[str, Any]]:
    """A model's scores, evaluated once."""
    file = model.with_suffix(".json")
    if not file.exists():
        lexibit("evaluate", model, "--task", task, *common, "--seed", seed, "--out", file)
    (found,) = json.loads(file.read_text())["scores"].values()
    return list(found)


def one(args: argparse.Namespace, task: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """All scores on a task, by what was measured."""
    folder = args.work / f"{task}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data: list[object] = ["--data", args.data] if args.data else []
    learning = [*data, "--epochs", args.epochs.get(task, 3), "--seed", seed]
    learning += ["--limit", args.limit[task]] if task in args.limit else []
    floats = folder / "float"
    if not floats.exists():
        lexibit("finetune", args.model, "--task", task, "--out", floats, *learning)
    found = {"float32": scores(floats, task, data, seed)}
    for name, options in SCHEMES.items():
        for bits in args.bits:
            before, after = (folder / f"{name}-{bits}{tuned}" for tuned in ("", "-tuned"))
            if not before.exists():
                lexibit("quantize", floats, before, "--bits", bits, "--seed", seed, *options)
            if not after.exists():
                tuning = [*learning, "--epochs", args.tune_epochs.get(task, 1)]
                lexibit("tune", before, "--task", task, "--out", after, *tuning)
            found[f"{name}, {bits}"] = scores(before, task, data, seed)
            found[f"{name}, {bits}, tuned"] = scores(after, task, data, seed)
    return found


def table(args: argparse.Namespace, results: dict[tuple[str, int], dict[str, list[dict[str, Any]]]]) -> str:
    """Means over the seeds, the spread over seeds in brackets, and the mean of the tasks' first metrics."""
    rows = ["| model | " + " | ".join(args.tasks) + " | mean | of float32 |\n"]
    rows.append("|---" * (len(args.tasks) + 3) + "|\n")
    first = next(iter(results.values()))
    base = None
    for line in first:
        cells, means = [], []
        for task in args.tasks:
            values = [results[task, seed][line][0]["value"] for seed in args.seeds]
            # a constant prediction has no correlation: it is worth nothing
            values = [0.0 if value is None else value for value in values]
            means.append(mean(values))
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        base = mean(means) if base is None else base
        rows.append(f"| {line} | {' | '.join(cells)} | {mean(means):.2f} | {mean(means) / base:.1%} |\n")
    return "".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder or a hub name")
    parser.add_argument("--data", type=Path, help="the folder with the tasks' data; the hub if not given")
    parser.add_argument("--work", type=Path, required=True, help="the folder of runs")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file")
    parser.add_argument(
        "--tasks", type=lambda text: text.split(","), default=["cola", "rte", "mrpc", "sts-b"]
    )
    parser.add_argument("--bits", type=lambda text: list(map(int, text.split(","))), default=[1, 2, 3, 4, 5])
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split(","))), default=[0])
    parser.add_argument("--epochs", type=lambda text: each(text, float), default={})
    parser.add_argument("--tune-epochs", type=lambda text: each(text, float), default={})
    parser.add_argument("--limit", type=lambda text: each(text, int), default={})
    args = parser.parse_args()
    results = {(task, seed): one(args, task, seed) for task in args.tasks for seed in args.seeds}
    metrics = ", ".join(
        f"{task}: {results[task, args.seeds[0]]['float32'][0]['metric']}" for task in args.tasks
    )
    command = " ".join(sys.argv[1:])
    head = f"# k-means against linear\n\n`python examples/kmeans_vs_linear.py {command}`\n\n{metrics}.\n\n"
    args.out.write_text(head + table(args, results), encoding="utf-8")


if __name__ == "__main__":
    main()
