"""The page of one quantized folder or file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lexibit import hub
from lexibit.description import describe
from lexibit.report import models
from lexibit.report.page import Block, Column, Section, Table, render
from lexibit.report.plan import Found, read_plan
from lexibit.scores import ScoreLine

_NO_FLOATS = (
    "Errors and histograms need the float model that this one was made from: give --against FLOAT_MODEL."
)
_NO_IMPORTANCE = (
    "No importance was given, so the errors of all weights counted alike: lexibit search finds importances, "
    "and lexibit quantize --importance takes them."
)
_NO_SEARCH = (
    "No search is known of this model: give the plan that lexibit search wrote by --search PLAN.json."
)
_NO_SCORES = (
    "No scores are known: measure them with lexibit evaluate --out FILE.json, and give that file by --scores."
)
_SCORES = [
    Column("model", "model"),
    Column("task", "task"),
    Column("split", "split"),
    Column("metric", "metric"),
    Column("score", "score", "number"),
    Column("low", "low", "number"),
    Column("high", "high", "number"),
    Column("examples", "examples", "whole"),
]


def checkpoint_page(
    folder: Path, against: Path | None, search: Path | None, scores: Sequence[ScoreLine]
) -> str:
    """See :func:`lexibit.report.of_checkpoint`, which needs none of this module's packages to be read."""
    if search is None and (folder / "search.json").is_file():
        search = folder / "search.json"
    found = None if search is None else read_plan(search)
    name = folder.resolve().name
    sections = [_card(folder, name, scores), _weights(found), _search(found)]
    described = describe(folder, against)
    layers = None if found is None else found.layers
    return render(
        name,
        "A model in codes: what it is, how near its weights stay to the float ones, and how it was made.",
        sections,
        [models.packed(name, described, layers)],
    )


def _card(folder: Path, name: str, scores: Sequence[ScoreLine]) -> Section:
    rows: list[list[Any]] = [
        [one.model, one.task, one.split, one.metric, one.value, one.low, one.high, one.examples]
        for one in scores
    ]
    table = Table("scores", "Scores, with 95 % intervals", _SCORES, rows, open=True)
    return Section(
        "model",
        "The model",
        notes=() if rows else (_NO_SCORES,),
        facts=hub.facts_of(folder),
        code="\n".join(hub.loading(folder, name)),
        blocks=[Block("", "", tables=[table])] if rows else (),
    )


def _weights(found: Found | None) -> Section:
    where = "from the model's own configuration" if found is None else "as the search found them"
    return Section(
        "weights",
        "Weights",
        blocks=models.blocks(without_floats=_NO_FLOATS, without_importance=_NO_IMPORTANCE, layers_from=where),
        models=True,
    )


def _search(found: Found | None) -> Section:
    if found is None:
        return Section("search", "Search", notes=[_NO_SEARCH])
    return Section("search", "Search", notes=found.notes, facts=found.facts, blocks=found.blocks)
