r"""The third paper's search on your model: does it help to weigh errors, layer by layer, or to mix bits?

    python examples/importance.py ./my-bert-mrpc mrpc --data ./glue --work ./runs --out search.md --bits 3 \
        --modes manual,model-wise,layer-wise --seeds 0,1,2 --budgets 2.5,3,3.5

The model is a float one, fine-tuned on the task. Importances (Kwon, Lee et al. 2020) are searched for
alternating binary codes at each width; ``--budgets`` chooses bits per layer, beside the same bits for all
layers. A seed draws the training examples that the search sees, and its proposals. Every search is a command
of lexibit whose trials and plan stay in the folder of runs: a search that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

from lexibit.cli import calls

CODES = ["--scheme", "binary", "--levels-dtype", "float16"]


def numbers(text: str) -> list[int]:
    """An option's type: ``1,2`` as a list."""
    return [int(part) for part in text.split(",")]


def plan(file: Path, *arguments: object) -> dict[str, Any]:
    """What a search found."""
    if not file.exists():
        words = ["search", *map(str, arguments), "--out", str(file)]
        print("$", shlex.join(["lexibit", *words]), flush=True)
        with redirect_stdout(StringIO()):  # the file has it all
            calls.call(words)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["search"]
    return found


def spread(values: list[float], form: str) -> str:
    """A mean, and the range of several."""
    shown = format(mean(values), form)
    return shown if len(values) == 1 else f"{shown} ({min(values):{form}} to {max(values):{form}})"


def row(name: str, found: list[dict[str, Any]], which: str) -> str:
    """A line of the table, over the seeds."""
    scores = [one["held_out"]["scores"][which][0] for one in found]
    interval = f"[{scores[0]['low']:.1f} to {scores[0]['high']:.1f}]"
    cells = [name, spread([one["bits_per_weight"] for one in found], ".3f")]
    cells.append(spread([one[which] for one in found], ".4f"))
    cells.append(f"{spread([one['value'] for one in scores], '.2f')} {interval}")
    if which == "found":
        gains = [one["held_out"]["differences"][0] for one in found]
        chance = spread([one["p"] for one in gains], ".2f")
        trials = [trial for one in found for stage in one["stages"].values() for trial in stage]
        seconds = sum(trial["seconds"] for trial in trials) or sum(one["seconds"] for one in found)
        cells.append(f"{spread([one['value'] for one in gains], '+.2f')}, p {chance}")
        cells += [f"{len(trials) / len(found):.0f}", f"{seconds / len(found):.0f}"]
    else:
        cells += ["", "", ""]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a float model's folder")
    parser.add_argument("task")
    parser.add_argument("--data", type=Path, help="the folder with the task's data; the hub if not given")
    parser.add_argument("--work", type=Path, required=True, help="the folder of runs")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file")
    parser.add_argument("--bits", type=numbers, default=[3])
    parser.add_argument(
        "--modes", type=lambda text: text.split(","), default=["manual", "model-wise", "layer-wise"]
    )
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--trials", type=int, default=40, help="model-wise, the 17 beginnings included")
    parser.add_argument("--layer-trials", type=int, default=18, help="layer-wise, of each layer")
    parser.add_argument("--limit", type=int, default=256, help="training examples that a search sees")
    parser.add_argument("--budgets", type=lambda text: list(map(float, text.split(","))), default=[])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    common: list[object] = [args.model, *CODES, "--task", args.task, "--limit", args.limit]
    common += ["--data", args.data] if args.data else []
    columns = ["what", "bits a weight", "loss", "held out", "gain", "trials", "seconds"]
    rows = [f"| {' | '.join(columns)} |\n", "|---" * len(columns) + "|\n"]
    metric = ""
    for bits in args.bits:
        for mode in args.modes:
            count = {"model-wise": args.trials, "layer-wise": args.layer_trials}.get(mode)
            found = []
            for seed in args.seeds:
                file = args.work / f"{bits}-{mode}-{seed}.json"
                options = ["--mode", mode, *(["--trials", count] if count else [])]
                found.append(plan(file, *common, "--bits", bits, "--seed", seed, *options))
            if not metric:
                score = found[0]["held_out"]["scores"]["float"][0]
                metric = f"{score['metric']} on {score['examples']} examples"
                rows.append(row("float32", [one | {"bits_per_weight": 32.0} for one in found], "float"))
            if mode == args.modes[0]:
                rows.append(row(f"{bits} bits, no importance", found, "start"))
            rows.append(row(f"{bits} bits, {mode}", found, "found"))
    for budget in args.budgets:
        files = [args.work / f"budget-{budget:g}-{seed}.json" for seed in args.seeds]
        found = [
            plan(file, *common, "--budget", budget, "--seed", seed)
            for file, seed in zip(files, args.seeds, strict=True)
        ]
        same = [one | {"bits_per_weight": one["start_bits_per_weight"]} for one in found]
        rows.append(row(f"the same bits, under {budget:g}", same, "start"))
        rows.append(row(f"mixed, {budget:g} bits", found, "found"))
    typed = shlex.join(["python", "examples/importance.py", *sys.argv[1:]])
    head = (
        f"# Search on {args.task}\n\n`{typed}`\n\nAlternating binary codes a row, scales "
        f"in float16. Loss: on {args.limit} training examples, which the search sees. Held out: {metric}, "
        "mean and range over the seeds, and in square brackets the first seed's bootstrap interval. Gain: "
        "held out, over the same bits without importance (of mixed bits over the most that keep the "
        "budget, the same for all layers), with the p of a paired test.\n\n"
    )
    args.out.write_text(head + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
