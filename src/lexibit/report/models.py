"""What is known of models' weights, as the page takes it, and the blocks that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lexibit.report import charts
from lexibit.report.page import Block, Chart, Column, Table

_WEIGHTS = [
    Column("name", "weight"),
    Column("layer", "layer"),
    Column("kind", "kind"),
    Column("shape", "shape"),
    Column("scheme", "scheme"),
    Column("bits", "bits", "whole"),
    Column("groups", "groups", "whole"),
    Column("stored_bits", "stored bits", "number"),
    Column("error", "relative error", "number"),
    Column("largest", "largest error", "number"),
]
_LAYERS = [
    Column("layer", "layer"),
    Column("bits", "bits", "number"),
    Column("E", "E", "number"),
    Column("gap", "1 - C", "number"),
    Column("P", "P", "number"),
]
_BINS = [Column("low", "from", "number"), Column("high", "to", "number"), Column("count", "weights", "whole")]
_LEVELS = [
    Column("level", "level", "whole"),
    Column("median", "median over groups", "number"),
    Column("low", "5 %", "number"),
    Column("high", "95 %", "number"),
]


def packed(
    label: str, weights: Sequence[Mapping[str, Any]], layers: list[list[Any]] | None = None
) -> dict[str, Any]:
    """A model in the form that the page's script reads.

    Args:
        label: what it is called in the list of models.
        weights: as :func:`lexibit.description.describe` gives them.
        layers: rows of layer, bits, E, 1 - C and P, where these are known better than from the weights.
    """
    return {
        "label": label,
        "weights": [
            [
                one["name"],
                one["layer"],
                one["kind"],
                " x ".join(map(str, one["shape"])),
                one["scheme"],
                one["bits"],
                one["groups"],
                one["stored_bits"],
                _short(one["relative_error"]),
                _short(one["largest_error"]),
            ]
            for one in weights
        ],
        "layers": _layers(weights) if layers is None else layers,
        "histograms": [one["histogram"] for one in weights],
        "levels": [
            # of one group there is no spread
            [
                [_short(level[name]) for name in ("median", "low", "high")[: 3 if one["groups"] > 1 else 1]]
                for level in one["levels"]
            ]
            for one in weights
        ],
    }


def blocks(*, without_floats: str, without_importance: str, layers_from: str) -> list[Block]:
    """Errors, a histogram, and what each layer got, of the model that is picked.

    Args:
        without_floats: what to say where the float weights are not known.
        without_importance: what to say where no importance was given.
        layers_from: where bits and importances of layers were read.
    """
    importances = [
        Chart(f"chart-{column}", f"Bars: {title} of each layer", charts.by_layer(column, title), ["layers"])
        for column, title in (("E", "E"), ("gap", "1 - C"), ("P", "P"))
    ]
    return [
        Block(
            "Error of each layer and kind of weight",
            "The relative error |W - W'|² / |W|². A cell with several weights shows their mean.",
            [
                Chart(
                    "chart-errors",
                    "Heat map: relative error by layer and kind",
                    charts.heat_map(),
                    ["weights"],
                )
            ],
            [Table("weights", "All weights", _WEIGHTS)],
            needs="error",
            missing=without_floats,
        ),
        Block(
            "A weight and its levels",
            "Bars count the float weights. Each line is a level: with several groups, the median over the "
            "groups of their smallest level, of the next, and so on, and the band holds 90 % of the groups.",
            [
                Chart(
                    "chart-histogram",
                    "Histogram of the values of one weight, with its levels as lines",
                    charts.histogram(),
                    ["bins", "levels"],
                )
            ],
            [Table("bins", "The histogram's numbers", _BINS), Table("levels", "The levels", _LEVELS)],
            picks={"weight": "Weight"},
            needs="count",
            missing=without_floats,
        ),
        Block(
            "Bits of each layer",
            f"The mean over the layer's weights; {layers_from}.",
            [
                Chart(
                    "chart-bits",
                    "Bars: bits of each layer",
                    charts.by_layer("bits", "bits of a code"),
                    ["layers"],
                )
            ],
            [Table("layers", "Bits and importance of each layer", _LAYERS)],
        ),
        Block(
            "Importance of each layer",
            "How much a weight's error counted by its magnitude: E is the exponent, C the share of weights "
            "below the magnitude from which all count alike, P the share of the smallest that count nothing.",
            importances,
            [Table("layers", "Importance of each layer", _LAYERS)],
            needs="E",
            missing=without_importance,
        ),
    ]


def _short(value: float | None) -> float | None:
    """A number in as many digits as can be seen."""
    return None if value is None else float(f"{value:.4g}")


def _layers(weights: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Of each layer the means over its weights; those without an importance count none."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in weights:
        found.setdefault(one["layer"], []).append(one)
    rows = []
    for layer, members in found.items():
        given = [one["importance"] for one in members if one["importance"]]
        importance: list[float | None] = [None, None, None]
        if given:
            means = [fmean(one[name] for one in given) for name in ("E", "C", "P")]
            importance = [means[0], round(1 - means[1], 12), means[2]]
        rows.append([layer, fmean(one["bits"] for one in members), *importance])
    return rows
