r"""The third paper's models: binary codes, greedy and alternating, on a language model or a translator.

    python examples/binary_codes.py wikitext-2 --model awd-lstm --data ./wikitext-2 --work ./runs \
        --out docs/results/awd-lstm.md --bits 2,3,4 --finetune "--epochs 5"

A model is trained from nothing on the task; at every width it is quantized by greedy and by alternating
binary codes (Kwon, Lee et al. 2020, Tables 3 and 4: without importance) and by k-means a row, embedding and
tied softmax included, and evaluated. Every step is a command of lexibit whose result stays in the folder of
runs: what is there is not done again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from runs import command, kept, lexibit, megabytes, numbers, scores

SCHEMES = {
    "greedy": ["--scheme", "binary", "--option", "method=greedy"],
    "alternating": ["--scheme", "binary", "--option", "method=alternating"],
    "k-means a row": ["--scheme", "kmeans", "--groups", "row"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", help="like wikitext-2 or multi30k")
    parser.add_argument("--model", required=True, help="a model made from nothing, as of lexibit finetune")
    parser.add_argument("--data", type=Path, help="the folder with the task's data; the hub if not given")
    parser.add_argument("--work", type=Path, required=True, help="the folder of runs")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file")
    parser.add_argument("--bits", type=numbers, default=[2, 3, 4])
    parser.add_argument("--finetune", type=shlex.split, default=[], help="options of lexibit finetune")
    parser.add_argument("--evaluate", type=shlex.split, default=[], help="options of lexibit evaluate")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data: list[object] = ["--data", args.data] if args.data else []
    floats = args.work / "float"
    if not floats.exists():
        training = ["--model", args.model, *data, *args.finetune]
        lexibit("finetune", "--task", args.task, *training, "--out", floats)
    models = {"float32": floats}
    for bits in args.bits:
        for name, options in SCHEMES.items():
            folder = models[f"{name}, {bits} bits"] = args.work / f"{name.replace(' ', '-')}-{bits}"
            if not folder.exists():
                lexibit("quantize", floats, folder, "--bits", bits, "--levels-dtype", "float16", *options)
    rows = ""
    for name, folder in models.items():
        score = scores(folder, args.task, [*data, *args.evaluate])[0]
        of = scores(floats, args.task, [*data, *args.evaluate])[0]
        interval = f"{score['value']:.2f} ({score['low']:.2f} to {score['high']:.2f})"
        rows += f"| {name} | {megabytes(folder):.2f} | {interval} | {kept(score, of):.1%} |\n"
    head = (
        f"# Binary codes on {args.task}\n\n`{command('binary_codes.py')}`\n\n"
        f"Levels in float16; {of['examples']} examples evaluated.\n\n"
        f"| model | MB | {of['metric']} | of float32 |\n|---|---|---|---|\n"
    )
    args.out.write_text(head + rows, encoding="utf-8")


if __name__ == "__main__":
    main()
