"""Every scheme on a real encoder and a real task: writes docs/results/minilm-sts.md.

    python benchmarks/schemes_on_sts.py --data FOLDER --out docs/results/minilm-sts.md

all-MiniLM-L6-v2 (from the extra ``demo``), every matrix and embedding, no training; the sentences and scores
are those of STS-B dev (``sts-dev.csv`` in FOLDER or in FOLDER/STS-B). The same by the command line:

    lexibit compare-schemes MODEL --bits 4,3,2 --own --levels-dtype float32 --task sts --data FOLDER
    lexibit compare-schemes MODEL --bits 4,3,2 --task sts --data FOLDER
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lexibit import Reference, checkpoint, compare_schemes, demo, tasks
from lexibit.comparison import ALL

BITS = (4, 3, 2)
SEED = 0

HEAD = """\
# Every scheme on all-MiniLM-L6-v2 and STS-B dev

Made by `python benchmarks/schemes_on_sts.py --data FOLDER --out docs/results/minilm-sts.md`; the tables are
those of `lexibit compare-schemes`, by the commands in the script's first lines.

Every matrix and embedding of all-MiniLM-L6-v2 is quantized, without training. Score: {metric} between the
cosine of two sentences' embeddings and people's scores, on {examples} pairs; in brackets its 95 % interval,
by bootstrap over the pairs (seed {seed}). Bits: stored bits a quantized weight, from bytes. MSE: mean squared
error of the weights. Scale: mean scaling factor of binary codes, mean step of uniform grids. Cosine: of the
last hidden states to float32's, on {texts} English sentences.

float32: **{score:.2f}** ({low:.2f} to {high:.2f}), 32 bits.

{machine}
"""

OWN = """
## In the form of its paper, {bits} bits

Levels per matrix or as said, stored in float32.
"""

EQUAL = """
## At equal stored bits, {bits} bits

At most {budget:.2f} stored bits a weight. What a scheme's codes leave of that it spends on as small groups as
it can pay for (levels in float16), OCS on split channels.
"""


def table(lines: Any, own: bool) -> str:
    """Lines of the comparison as a Markdown table, the best score in bold."""
    heading = (
        f"| scheme |{' groups |' if own else ' weights a group |'} bits | score | cosine | MSE | scale |\n"
    )
    rows = [heading, "|---|---|---|---|---|---|---|\n"]
    best = lines["score"].max()
    for _, line in lines.iterrows():
        groups = line["groups"] if own else f"{line['group_size']:,.0f}"
        score = f"**{line['score']:.2f}**" if line["score"] == best else f"{line['score']:.2f}"
        scale = "" if line["mean_scale"] != line["mean_scale"] else f"{line['mean_scale']:.4f}"
        rows.append(
            f"| {line['name']} | {groups} | {line['stored_bits']:.3f} | {score} ({line['score_low']:.1f} to "
            f"{line['score_high']:.1f}) | {line['cosine']:.3f} | {line['mse']:.2e} | {scale} |\n"
        )
    return "".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder with STS-B's sts-dev.csv")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file")
    args = parser.parse_args()
    folder = demo.encoder_folder()
    model, tokenizer = checkpoint.load_float(folder), checkpoint.load_tokenizer(folder)
    task = tasks.task("sts")
    score = task.measure(tokenizer, task.load(args.data), seed=SEED)
    texts = demo.sentences()[::15][:100]
    reference = Reference(model, tokenizer, texts)
    found = {
        equal: compare_schemes(
            model,
            BITS,
            equal=equal,
            levels_dtype="float16" if equal else "float32",
            seed=SEED,
            reference=reference,
            score=score,
        )
        for equal in (False, True)
    }
    floats = found[False].iloc[0]  # the float model itself
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("lexibit", "torch", "transformers"))
    parts = [
        HEAD.format(
            metric=floats["metric"],
            examples=int(floats["examples"]),
            texts=len(texts),
            seed=SEED,
            score=floats["score"],
            low=floats["score_low"],
            high=floats["score_high"],
            machine=f"Machine: {os.cpu_count()} CPUs, {platform.machine()}, "
            f"Python {platform.python_version()}, {versions}, {torch.get_num_threads()} threads.",
        )
    ]
    for equal, title in ((False, OWN), (True, EQUAL)):
        every = found[equal][found[equal]["kind"] == ALL]
        for bits in BITS:
            parts.append(title.format(bits=bits, budget=bits * 1.05) + "\n")
            parts.append(table(every[every["bits"] == bits], not equal))
    args.out.write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
