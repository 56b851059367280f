"""A search, from the plan file that ``lexibit search`` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexibit.errors import LexibitError
from lexibit.report import charts
from lexibit.report.page import Block, Chart, Column, Table, within

# the stage of lexibit.search.ALONE, written here so that reports need no Optuna: what single layers do is
# no step towards what all do
_ALONE = "each layer alone"
_TRIALS = [
    Column("trial", "trial", "whole"),
    Column("stage", "stage"),
    Column("value", "objective", "number"),
    Column("least", "least so far", "number"),
    Column("E", "E", "number"),
    Column("gap", "1 - C", "number"),
    Column("P", "P", "number"),
    Column("seconds", "seconds", "seconds"),
    Column("fault", "fault"),
]
_ROOM = 400_000  # bytes of trials in the page


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        facts: what was searched, and what came out.
        notes: sentences on what is not shown.
        blocks: its history.
        layers: rows of layer, bits (or None), E, 1 - C and P; None if the plan tells of none.
    """

    facts: dict[str, str]
    notes: list[str]
    blocks: Sequence[Block]
    layers: list[list[Any]] | None


def read_plan(file: Path) -> Found:
    """The search in a plan file.

    Raises:
        LexibitError: it cannot be read, or holds no search.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return _found(document["search"], document["config"])
    except OSError as error:
        raise LexibitError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LexibitError(
            f"{file}: holds no search ({type(error).__name__}: {error}): give a plan that lexibit search "
            "wrote"
        ) from error


def _found(search: Mapping[str, Any], config: Mapping[str, Any]) -> Found:
    objective = str(search["objective"])
    stages = {str(name): list(trials) for name, trials in search["stages"].items()}
    rows = _history({name: trials for name, trials in stages.items() if name != _ALONE})
    shown = within(_ROOM, rows)
    notes = []
    if len(shown) < len(rows):
        notes.append(
            f"The last {len(rows) - len(shown)} of {len(rows)} trials are left out here: the plan file has "
            "them."
        )
    if failed := sum(row[-1] is not None for row in rows):
        notes.append(f"{failed} of {len(rows)} trials failed: the table says why.")
    if _ALONE in stages:
        notes.append(
            f"{len(stages[_ALONE])} measurements of one layer alone, by which its bits were chosen, are not "
            "in the history."
        )
    about = "Each point is a trial, the line is the least so far."
    tables = [Table("trials", "All trials", _TRIALS, shown)]
    chart = Chart("chart-history", f"{objective} of each trial", charts.history(objective), ["trials"])
    history = Block(
        "History", about, [chart], tables, needs="value", missing="There was no trial with a value."
    )
    facts = {
        "model": search.get("model"),
        "importances searched": search.get("mode") or "not at all",
        "budget, stored bits a weight": search.get("budget"),
        "objective": objective,
        "task": search.get("task"),
        "examples": search.get("examples"),
        "float model": _number(search.get("float")),
        "at the start": _number(search.get("start")),
        "found": _number(search.get("found")),
        "stored bits a weight, found": _number(search.get("bits_per_weight")),
        "trials": sum(map(len, stages.values())),
        "seconds": _number(search.get("seconds")),
    }
    bits = config.get("bits")
    layers = [_layer(str(name), one, bits) for name, one in search.get("settings", {}).items()]
    return Found(
        {name: str(value) for name, value in facts.items() if value is not None},
        notes,
        [history],
        layers or None,
    )


def _history(stages: Mapping[str, list[Mapping[str, Any]]]) -> list[list[Any]]:
    rows: list[list[Any]] = []
    least: float | None = None
    for stage, trials in stages.items():
        for trial in trials:
            value = trial["value"]
            if value is not None and (least is None or value < least):
                least = float(value)
            tried = trial["parameters"]
            parameters = [tried.get(name) for name in ("E", "1-C", "P")]
            rows.append(
                [len(rows), stage, value, least, *parameters, trial.get("seconds"), trial.get("fault")]
            )
    return rows


def _layer(name: str, setting: Mapping[str, Any], bits: Any) -> list[Any]:
    importance = setting["importance"]
    gap = round(1 - importance["C"], 12)
    return [name, setting["bits"] or bits, importance["E"], gap, importance["P"]]


def _number(value: Any) -> str | None:
    return f"{value:.5g}" if isinstance(value, int | float) and math.isfinite(value) else None
