"""What papers print for the schemes of this library: published cells, each with its source.

``published.csv`` has them all: Zhao, Liu, Chen, Liu, Ma and Yu 2020, "An Investigation on Different
Underlying Quantization Schemes for Pre-trained Language Models", Tables 1 to 6, but for the first line of
Table 6, which Table 4 has rounded; and Hu, Meinel and Yang 2022,
on LQ, ACIQ and OCS, its abstract. Kwon, Lee et al. 2020 is not among them: we know no cell of its tables.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from lexibit.errors import unknown
from lexibit.study.definition import FLOAT

CORRELATIONS = "Pearson and Spearman x 100"  # the papers print one number for both
ITERATIONS = 3  # of k-means, in all of the paper's tables but the sixth
# what may be said of a scheme that is a paper's, and of its options
_KNOWN = {"scheme", "option", "bits", "groups", "importance", "levels_dtype"}
_OPTIONS = {"kmeans": {"init", "iterations"}, "ocs": {"ratio"}}


@dataclass(frozen=True)
class Published:
    """One cell of a paper's table.

    Attributes:
        source: the paper and its table.
        model: as the paper calls it.
        scheme: as this library calls it; ``float`` for full precision.
        groups: which weights share levels, in this library's words; ``matrix`` for the whole matrix.
        iterations: of k-means; None for other schemes.
        bits: of a code.
        tuned: whether the codebooks were trained before.
        task: by its name here; ``average`` for the average that is printed.
        metric: by its name here.
        value: as it is printed.
    """

    source: str
    model: str
    scheme: str
    groups: str
    iterations: int | None
    bits: int
    tuned: bool
    task: str
    metric: str
    value: float


@cache
def published() -> tuple[Published, ...]:
    """All cells, in the papers' order."""
    with (files("lexibit.study") / "published.csv").open(encoding="utf-8") as file:
        return tuple(_cell(row) for row in csv.DictReader(file))


def models() -> list[str]:
    """The models that numbers are known of."""
    return list(dict.fromkeys(cell.model for cell in published()))


def beside(
    model: str, scheme: str, settings: Mapping[str, Any], groups: str | None, bits: int, tuned: bool
) -> list[Published]:
    """The cells of the same experiment with a paper's model.

    Args:
        model: the paper's.
        scheme: the label of a study's scheme, which matters for ``float`` alone.
        settings: what the study says of the scheme.
        groups: which weights share levels; None for the default.
        bits: of a code.
        tuned: whether the codebooks were trained.

    Raises:
        LexibitError: nothing is known of such a model.
    """
    if model not in models():
        raise unknown("model of published numbers", model, models())
    wanted = FLOAT if scheme == FLOAT else settings.get("scheme")
    options = _options(settings.get("option"))
    if set(settings) - _KNOWN or set(options) - _OPTIONS.get(str(wanted), set()):
        return []
    # the exact optimum, which is the default here, is nobody's table
    if wanted == "kmeans" and options.get("init") != "k-means++":
        return []
    iterations = options.get("iterations", ITERATIONS)
    return [
        cell
        for cell in published()
        if cell.model == model
        and cell.scheme == wanted
        and cell.bits == bits
        and (cell.tuned == tuned)
        and cell.groups == (groups if groups not in (None, "auto") else "matrix")
        and cell.iterations in (None, iterations)
    ]


def _options(given: Any) -> dict[str, Any]:
    """Options of a scheme, as settings by name or as ``NAME=VALUE``."""
    from lexibit.cli.options import settings_by_name

    return dict(given) if isinstance(given, Mapping) else settings_by_name(given)


def _cell(row: dict[str, str]) -> Published:
    iterations = int(row["iterations"] or ITERATIONS) if row["scheme"] == "kmeans" else None
    return Published(
        row["source"],
        row["model"],
        row["scheme"],
        row["groups"] or "matrix",
        iterations,
        int(row["bits"]),
        row["tuned"] == "true",
        row["task"],
        row["metric"],
        float(row["value"]),
    )
