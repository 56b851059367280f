r"""The first paper's experiment on your model: fine-tune, quantize, tune the codebooks, evaluate.

    python examples/kmeans_vs_linear.py MODEL --data ./glue --work ./runs --out docs/results/glue.md \
        --tasks cola,rte,mrpc,sts-b,sst-2 --bits 1,2,3,4,5 --seeds 0

For every task a float model is fine-tuned; for every scheme and width it is quantized, evaluated, its
codebooks tuned, and evaluated again (Zhao et al. 2020, Tables 1 and 2). Every step is a command of lexibit
whose result stays in the folder of runs: what is there is not done again, so that a run that was stopped goes
on. Settings of single tasks: ``--epochs sst-2=1,mrpc=4``, ``--limit sst-2=10000`` (examples to learn from),
``--tune-limit``, ``--evaluate-limit``; of all: ``--tune "--learning-rate 2e-4"``.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

from runs import by_name, command, kept, lexibit, megabytes, numbers, scores

SCHEMES = {"linear": ["--scheme", "linear"], "k-means": ["--scheme", "kmeans", "--option", "init=k-means++"]}

Scores = list[dict[str, Any]]


def limit(limits: dict[str, int], task: str) -> list[object]:
    return ["--limit", limits[task]] if task in limits else []


def one(args: argparse.Namespace, task: str, seed: int) -> dict[str, tuple[float, Scores]]:
    """Of every model for a task: megabytes and scores."""
    folder = args.work / f"{task}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data: list[object] = ["--data", args.data] if args.data else []
    shared = [*data, "--task", task, "--seed", seed]
    judging = [*data, *limit(args.evaluate_limit, task)]
    found = {}

    def measure(line: str, model: Path) -> None:
        found[line] = (megabytes(model), scores(model, task, judging))
        print(f"{task}, seed {seed}: {line}: {found[line][1][0]['value']}", flush=True)

    floats = folder / "float"
    if not floats.exists():
        epochs = args.epochs.get(task, 3)
        training = ["--epochs", epochs, *limit(args.limit, task), *args.finetune]
        lexibit("finetune", args.model, *shared, "--out", floats, *training)
    measure("float32", floats)
    for bits in args.bits:
        for name, options in SCHEMES.items():
            before, after = (folder / f"{name}-{bits}{tuned}" for tuned in ("", "-tuned"))
            if not before.exists():
                lexibit("quantize", floats, before, "--bits", bits, "--seed", seed, *options)
            measure(f"{name}, {bits}", before)
            if not after.exists():
                tuning = ["--epochs", 1, *limit(args.tune_limit, task), *args.tune]
                lexibit("tune", before, *shared, "--out", after, *tuning)
            measure(f"{name}, {bits}, tuned", after)
    return found


def table(args: argparse.Namespace, results: dict[tuple[str, int], dict[str, tuple[float, Scores]]]) -> str:
    """Means over the seeds, with the spread over seeds, or of one seed the bootstrap's interval, in brackets.

    The last column is the mean over the tasks of the share of float32's first metric that is left.
    """
    columns = ["scheme, bits", "MB", "smaller", *args.tasks, "mean", "of float32"]
    rows = ["| " + " | ".join(columns) + " |\n", "|---" * len(columns) + "|\n"]
    first = results[args.tasks[0], args.seeds[0]]
    floats: list[float] = []
    whole = first["float32"][0]
    for line, (size, _) in first.items():
        cells, means = [], []
        for task in args.tasks:
            here = [results[task, seed][line][1][0] for seed in args.seeds]
            values = [score["value"] or 0.0 for score in here]
            low, high = (here[0]["low"], here[0]["high"]) if len(here) == 1 else (min(values), max(values))
            digits = 1 if mean(values) >= 10 else 2  # a perplexity may be small
            spread = "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
            cells.append(f"{mean(values):.2f}{spread}")
            means.append(mean(values))
        floats = floats or means
        if len(args.tasks) == 1:
            (task,) = args.tasks
            share = mean(
                kept(results[task, seed][line][1][0], results[task, seed]["float32"][1][0])
                for seed in args.seeds
            )
        else:
            share = mean(means) / mean(floats)
        cells = [line, f"{size:.3g}", f"{whole / size:.1f}x", *cells, f"{mean(means):.2f}", f"{share:.1%}"]
        rows.append(f"| {' | '.join(cells)} |\n")
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
    parser.add_argument("--bits", type=numbers, default=[1, 2, 3, 4, 5])
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--epochs", type=by_name(float), default={}, help="of fine-tuning, 3 if not given")
    parser.add_argument("--finetune", type=shlex.split, default=[], help="more options of lexibit finetune")
    parser.add_argument("--tune", type=shlex.split, default=[], help="more options of lexibit tune")
    for name in ("limit", "tune-limit", "evaluate-limit"):
        parser.add_argument(f"--{name}", type=by_name(int), default={})
    args = parser.parse_args()
    results = {(task, seed): one(args, task, seed) for task in args.tasks for seed in args.seeds}
    of = {task: results[task, args.seeds[0]]["float32"][1][0] for task in args.tasks}
    metrics = ", ".join(f"{task}: {score['metric']} ({score['examples']})" for task, score in of.items())
    head = (
        f"# k-means against linear\n\n`{command('kmeans_vs_linear.py')}`\n\n"
        f"Metric (examples evaluated): {metrics}.\n\n"
    )
    args.out.write_text(head + table(args, results), encoding="utf-8")


if __name__ == "__main__":
    main()
