"""What calibration gives, beside the schemes alone: writes docs/results/calibration.md and a figure.

    python benchmarks/calibration.py --data FOLDER --out calibration.md --figure docs/choosing.svg

all-MiniLM-L6-v2 (from the extra ``demo``), every matrix and embedding, no labels and no training; the scores
are on STS-B dev, the texts to calibrate on are sentences of STS-B train (``STS-B/sts-*.csv`` in FOLDER). The
line "k-means, calibrated" is

    lexibit quantize MODEL OUT --bits 2 --calibrate task:sts --data FOLDER --length 128
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import lexibit
from lexibit import Calibration, Effort, LexibitConfig, demo, tasks
from lexibit.calibration import GPTQ, of_task
from lexibit.tasks import sts

BITS = (2, 3, 4)
SEEDS = (0, 1, 2)
TEXTS, LENGTH = 1024, 128


@dataclass(frozen=True)
class Recipe:
    """A line of the table: how, and what is done with the inputs' moments, if anything."""

    name: str
    settings: dict[str, Any]
    effort: Effort | None = None

    def config(self, bits: int) -> LexibitConfig:
        """The configuration for so many bits."""
        return LexibitConfig(bits=bits, levels_dtype="float16", **self.settings)


BEST = {"scheme": "kmeans", "groups": "within:0.2"}
LAYERS = Effort(passes=0)
GRID = {"scheme": "mse", "groups": "row", "options": {"affine": True}}
RECIPES = (
    Recipe("linear bins, per matrix (Zhao et al.)", {"scheme": "linear", "groups": "matrix"}),
    Recipe("k-means, per matrix (Zhao et al.)", {"scheme": "kmeans", "groups": "matrix"}),
    Recipe("ACIQ, per row (Hu et al.)", {"scheme": "aciq", "groups": "row"}),
    Recipe("OCS, r = .05 (Hu et al.)", {"scheme": "ocs", "groups": "row", "options": {"ratio": 0.05}}),
    Recipe("binary codes, per row (Kwon, Lee et al.)", {"scheme": "binary"}),
    Recipe("uniform grid by MSE, per row", GRID),
    Recipe("k-means, within 0.2 bits", BEST),
    Recipe(
        "GPTQ: min-max grid, per row", {"scheme": "lq", "groups": "row", "options": {"affine": True}}, GPTQ
    ),
    Recipe("binary codes, calibrated, layers only", {"scheme": "binary"}, LAYERS),
    Recipe("uniform grid, calibrated, layers only", GRID, LAYERS),
    Recipe("k-means per matrix, calibrated, layers only", {"scheme": "kmeans", "groups": "matrix"}, LAYERS),
    Recipe("k-means, calibrated, layers only", BEST, LAYERS),
    Recipe("**k-means, calibrated**", BEST, Effort()),
    Recipe("k-means, calibrated, 1 per mille outliers", BEST | {"outliers": 0.001}, Effort()),
)


class Bench:
    """The float model's outputs, and how near others come."""

    def __init__(self, data: Path) -> None:
        logging.disable_progress_bar()
        self.folder, self.data = demo.encoder_folder(), data
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.task = tasks.task("sts")
        self.examples = self.task.load(data)
        self.texts = list(
            dict.fromkeys(text for first, second, _ in self.examples for text in (first, second))
        )
        floats = self.load()
        self.embeddings = sts.embed(floats, self.tokenizer, self.texts)

    def score(self, embedded: Tensor) -> tasks.Score:
        """What embeddings of the texts come to."""
        place = {text: number for number, text in enumerate(self.texts)}
        cosines = [float(embedded[place[a]] @ embedded[place[b]]) for a, b, _ in self.examples]
        people = [score for *_, score in self.examples]
        return self.task.scores(np.stack([cosines, people], axis=1))[0]

    def load(self) -> PreTrainedModel:
        """The float model."""
        model: PreTrainedModel = AutoModel.from_pretrained(self.folder)
        return model

    def line(self, recipe: Recipe, bits: int, seed: int) -> dict[str, Any]:
        """One measurement."""
        model = self.load()
        calibration = None
        start = time.perf_counter()
        if recipe.effort is not None:
            batches = of_task(
                model, self.tokenizer, "sts", self.data, limit=TEXTS, max_length=LENGTH, seed=seed
            )
            calibration = Calibration(batches, recipe.effort)
        plan = lexibit.quantize(model, recipe.config(bits), calibration=calibration, progress=False)
        seconds = time.perf_counter() - start
        embedded = sts.embed(model, self.tokenizer, self.texts)
        return {
            "name": recipe.name,
            "bits": bits,
            "seed": seed,
            "stored": plan.bits_per_weight,
            "score": self.score(embedded).value,
            "cosine": F.cosine_similarity(embedded, self.embeddings).mean().item(),
            "seconds": seconds,
        }


def measure(bench: Bench, kept: Path, recipes: tuple[Recipe, ...]) -> list[dict[str, Any]]:
    """All lines; those of an earlier run are taken from its file."""
    lines = json.loads(kept.read_text()) if kept.exists() else []
    done = {(line["name"], line["bits"], line["seed"]) for line in lines}
    for bits in BITS:
        for recipe in recipes:
            # of the others one draw of texts tells enough
            for seed in SEEDS if recipe.name.startswith("**") else SEEDS[:1]:
                if (recipe.name, bits, seed) not in done:
                    lines.append(bench.line(recipe, bits, seed))
                    print(lines[-1], flush=True)
                    kept.write_text(json.dumps(lines, indent=1))
    return lines


def spread(values: list[float], digits: int) -> str:
    """The mean, and the least and the greatest of several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(lines: list[dict[str, Any]], bits: int) -> str:
    """The lines of one width."""
    out = ["| recipe | stored bits | Spearman | cosine | seconds |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(line["name"] for line in lines):
        mine = [line for line in lines if (line["name"], line["bits"]) == (name, bits)]
        if mine:
            numbers = [
                spread([line[key] for line in mine], digits) for key, digits in (("score", 2), ("cosine", 3))
            ]
            seconds = statistics.median(line["seconds"] for line in mine)
            out.append(f"| {name} | {mine[0]['stored']:.2f} | {' | '.join(numbers)} | {seconds:.0f} |")
    return "\n".join(out)


def figure(lines: list[dict[str, Any]], path: Path) -> None:
    """Stored bits against the cosine to the float32 embeddings, a line a recipe."""
    matplotlib.rcParams.update({"svg.hashsalt": "lexibit", "svg.fonttype": "none", "font.size": 10})
    shown, axes = plt.subplots(figsize=(10, 4.6), layout="constrained")
    axes.set_prop_cycle(color=matplotlib.colormaps["Paired"].colors)
    for name in dict.fromkeys(line["name"] for line in lines):
        mine = [line for line in lines if line["name"] == name]
        bits = sorted({line["bits"] for line in mine})
        points = [[line for line in mine if line["bits"] == width] for width in bits]
        best = name.startswith("**")
        axes.plot(
            [one[0]["stored"] for one in points],
            [statistics.mean(line["cosine"] for line in one) for one in points],
            marker="o",
            linewidth=3 if best else 1.2,
            linestyle="-" if "calibrated" in name or "GPTQ" in name else "--",
            label=name.strip("*"),
            zorder=3 if best else 2,
        )
    axes.set(
        xlabel="stored bits a weight",
        ylabel="cosine to the float32 embeddings",
        title="all-MiniLM-L6-v2: calibrated (solid) and by the weights alone (dashed)",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    shown.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kept", type=Path, default=Path("calibration.json"), help="Where lines are kept.")
    parser.add_argument("--out", type=Path, help="The tables.")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    bench = Bench(args.data)
    float_score = bench.score(bench.embeddings)
    lines = measure(bench, args.kept, RECIPES)
    parts = [f"float32: {float_score.value:.2f} ({float_score.low:.2f} to {float_score.high:.2f})\n"]
    for bits in BITS:
        parts.append(f"### {bits} bits\n\n{table(lines, bits)}\n")
    text = "\n".join(parts)
    print(text)
    print(asdict(float_score), torch.get_num_threads())
    if args.out:
        args.out.write_text(text)
    if args.figure:
        figure(lines, args.figure)


if __name__ == "__main__":
    main()
