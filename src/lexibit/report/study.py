"""The page of a study: many runs, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lexibit.report import charts, models
from lexibit.report.page import Block, Chart, Column, Section, Table, render, size, within
from lexibit.study.definition import FLOAT
from lexibit.study.table import with_worst

AVERAGE = "average"
# bytes that parts of a page may take, so that all of it stays below 5 MB
_ROOM_POINTS = 400_000  # twice, for two charts
_ROOM_MODELS = 1_900_000
_ROOM_CELLS = 800_000
_ROOM_FAILURES = 200_000
_ROOM_LEFT_OUT = 200_000

_GROUP = ["model", "scheme", "bits", "groups", "importance", "tuned"]
_NO_FLOATS = "The study kept no errors and no histograms of this model: see its folder."
_NO_IMPORTANCE = "This model was quantized without importances, so the errors of all weights counted alike."
_POINTS = [
    Column("task", "task"),
    Column("model", "model"),
    Column("series", "scheme"),
    Column("bits", "bits", "whole"),
    Column("state", "state"),
    Column("score", "score", "number"),
    Column("low", "low", "number"),
    Column("high", "high", "number"),
    Column("kept", "% kept", "number"),
    Column("seeds", "seeds", "whole"),
    Column("megabytes", "MB", "number"),
    Column("stored_bits", "bits a weight", "number"),
    Column("front", "on the front"),
]
_CELLS = [
    Column("model", "model"),
    Column("task", "task"),
    Column("scheme", "scheme"),
    Column("bits", "bits", "whole"),
    Column("groups", "groups"),
    Column("importance", "importance"),
    Column("tuned", "tuned"),
    Column("seed", "seed", "whole"),
    Column("metric", "metric"),
    Column("score", "score", "number"),
    Column("low", "low", "number"),
    Column("high", "high", "number"),
    Column("examples", "examples", "whole"),
    Column("split", "split"),
    Column("bytes", "size", "bytes"),
    Column("bits_per_weight", "bits a weight", "number"),
    Column("finetune_seconds", "fine-tune s", "seconds"),
    Column("quantize_seconds", "quantize s", "seconds"),
    Column("tune_seconds", "tune s", "seconds"),
    Column("evaluate_seconds", "evaluate s", "seconds"),
    Column("peak_memory", "peak memory", "bytes"),
    Column("at", "at", printed=False),
    Column("commands", "commands", "code", printed=False),
    Column("machine", "machine", "code", printed=False),
    Column("versions", "versions", "code", printed=False),
    Column("cell", "cell", printed=False),
]
_FAILURES = [
    Column("model", "model"),
    Column("task", "task"),
    Column("scheme", "scheme"),
    Column("bits", "bits", "whole"),
    Column("seed", "seed", "whole"),
    Column("error", "error"),
    Column("cell", "cell", printed=False),
]


def render_study(
    about: Mapping[str, Any],
    results: pd.DataFrame,
    weights_of: Callable[[str], list[dict[str, Any]] | None],
) -> str:
    """The report on a study as HTML.

    Args:
        about: its ``name``, ``about`` in a sentence, and ``published``, a paper's model (or one for
            each of the study's), or None.
        results: a line a cell and metric, as ``lexibit.study.results`` gives them.
        weights_of: what :func:`lexibit.description.describe` said of a model, by its key.
    """
    done, failed = results[results["error"].isna()], results[results["error"].notna()]
    points = summary(done)
    shown = within(_ROOM_POINTS, points)
    known, left_out = _models(done, weights_of)
    sections = [
        _overview(about, results, points, shown),
        Section("scores", "Scores", notes=_left(points, shown, "points"), blocks=_scores(done, shown)),
        _weights(known, left_out),
        _cells(done),
        _failures(failed),
    ]
    return render(str(about["name"]), str(about["about"]), sections, known)


def summary(done: pd.DataFrame) -> list[list[Any]]:
    """What the charts of scores draw: a row a task, model, scheme, bits and state, averages first.

    The first metric of a task counts. Of several seeds it is the mean, between the least and the most;
    of one, the cell's own interval. The average is over all tasks of a model of the per cent of the float
    score that is kept, which needs a float score of the same task and seed; a scheme that lacks a task has
    none.

    Args:
        done: the results without failed cells.

    Returns:
        Rows in the columns of the table ``sizes``.
    """
    if done.empty:
        return []
    first = done.groupby("task", sort=False)["metric"].transform("first")
    lines = done[done["metric"] == first].copy()
    lines["score"] = with_worst(lines)
    lines["series"] = _series(lines)
    floats = lines[lines["scheme"] == FLOAT].drop_duplicates(["model", "task", "seed"])
    reference = floats.set_index(["model", "task", "seed"])["score"]
    keys = pd.MultiIndex.from_frame(lines[["model", "task", "seed"]])
    lines["float"] = reference.reindex(keys).to_numpy(dtype=float)
    ratio = (lines["score"] / lines["float"]).where(lines["higher"], lines["float"] / lines["score"])
    lines["kept"] = 100 * ratio.where(np.isfinite(ratio))
    groups = [
        _point(task, group)
        for (task, *_), group in lines.groupby(["task", *_GROUP], sort=False, dropna=False)
    ]
    tasks = {model: set(group["task"]) for model, group in lines.groupby("model", sort=False)}
    averages = []
    for _, group in lines.groupby(_GROUP, sort=False, dropna=False):
        if point := _average(group, tasks[group["model"].iloc[0]]):
            averages.append(point)
    rows = averages if len(set(lines["task"])) > 1 else []
    rows = [*rows, *groups]
    higher = dict(lines.groupby("task", sort=False)["higher"].first()) | {AVERAGE: True}
    for task in dict.fromkeys(row["task"] for row in rows):
        mark_front([row for row in rows if row["task"] == task], bool(higher[task]))
    return [[row[column.name] for column in _POINTS] for row in rows]


def mark_front(rows: Sequence[dict[str, Any]], higher: bool) -> None:
    """Say of each row whether none that is no larger has a better score.

    Args:
        rows: with ``megabytes`` and ``score``; they get ``front``.
        higher: whether more is better.
    """
    best = -math.inf
    sign = 1 if higher else -1
    known = [row for row in rows if _known(row["score"]) and _known(row["megabytes"])]
    for row in rows:
        row["front"] = False
    for row in sorted(known, key=lambda row: (row["megabytes"], -sign * row["score"])):
        row["front"] = bool(sign * row["score"] > best)
        best = max(best, sign * row["score"])


def _point(task: str, group: pd.DataFrame) -> dict[str, Any]:
    """A group of seeds as one point."""
    score = group["score"].dropna()
    if len(score) == 1:
        low, high = (group.loc[score.index[0], name] for name in ("low", "high"))
    else:
        low, high = score.min(), score.max()
    return _row(task, group) | {
        "score": score.mean(),
        "low": low,
        "high": high,
        "kept": group["kept"].mean(),
        "seeds": group["seed"].nunique(),
    }


def _average(group: pd.DataFrame, tasks: set[str]) -> dict[str, Any] | None:
    """A scheme over all tasks of its model, as per cent kept; None if it lacks one."""
    by_task = group.groupby("task")["kept"].mean()
    if set(by_task.index) != tasks or by_task.isna().any():
        return None
    seeds = group.pivot_table(index="seed", columns="task", values="kept").dropna()
    of_seeds = seeds.mean(axis=1) if seeds.shape[1] == len(tasks) and len(seeds) > 1 else None
    return _row(AVERAGE, group) | {
        "score": by_task.mean(),
        "low": None if of_seeds is None else of_seeds.min(),
        "high": None if of_seeds is None else of_seeds.max(),
        "kept": by_task.mean(),
        "seeds": group["seed"].nunique(),
    }


def _row(task: str, group: pd.DataFrame) -> dict[str, Any]:
    one = group.iloc[0]
    is_float = one["scheme"] == FLOAT
    return {
        "task": task,
        "model": one["model"],
        "series": one["series"],
        "bits": int(one["bits"]),
        "state": charts.STATES[0 if is_float else 2 if one["tuned"] else 1],
        "megabytes": group["bytes"].mean() / 1e6,
        "stored_bits": group["bits_per_weight"].mean(),
    }


def _series(lines: pd.DataFrame) -> pd.Series:
    """How a scheme is called: with its groups and importance where the study has several of these for it."""
    names = lines["scheme"].astype(str)
    for column in ("groups", "importance"):
        values = lines[column].fillna("").astype(str)
        several = values.groupby(lines["scheme"]).transform("nunique") > 1
        names = names.where(~several | (values == ""), names + ", " + values)
    return names


def _overview(
    about: Mapping[str, Any], results: pd.DataFrame, points: Sequence[Any], shown: Sequence[Any]
) -> Section:
    cells = results.drop_duplicates("cell")
    facts = {
        "cells": f"{len(cells):,}, of which {int(cells['error'].notna().sum()):,} failed",
        "models": _listed(cells["model"]),
        "tasks": _listed(cells["task"]),
        "schemes": _listed(cells["scheme"]),
        "bits": _listed(cells["bits"].astype(int).sort_values()),
        "seeds": _listed(cells["seed"].astype(int).sort_values()),
        "time": f"{_seconds(cells) / 3600:.2f} hours",
        "latest result": str(cells["at"].dropna().max()) if cells["at"].notna().any() else "unknown",
    }
    beside = about.get("published")
    names = _listed(pd.Series(list(beside.values()) if isinstance(beside, Mapping) else [beside]))
    notes = [f"What papers print for {names} stands beside in 'lexibit study table'."] if beside else []
    return Section("study", "The study", notes=notes, facts=facts)


def _seconds(cells: pd.DataFrame) -> float:
    """What all cells took: those of one model, task and seed share a fine-tuned model, and so on."""
    shared = ["model", "task", "seed"]
    quantized = [*shared, "scheme", "bits", "groups", "importance"]
    total = sum(
        cells.drop_duplicates([*by, f"{step}_seconds"])[f"{step}_seconds"].sum()
        for step, by in (("finetune", shared), ("quantize", quantized))
    )
    return float(total + cells[["tune_seconds", "evaluate_seconds"]].sum().sum())


def _listed(values: pd.Series, most: int = 12) -> str:
    names = list(dict.fromkeys(map(str, values)))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _scores(done: pd.DataFrame, shown: list[list[Any]]) -> list[Block]:
    first = done.drop_duplicates("task")
    titles = {
        str(task): f"{metric}, {'more' if higher else 'less'} is better"
        for task, metric, higher in zip(first["task"], first["metric"], first["higher"], strict=True)
    }
    titles[AVERAGE] = "mean over tasks of the per cent of the float score that is kept"
    missing = "There is no score yet: run the study's cells, or see the failures below."
    front = (
        "The line is the Pareto front: no smaller model is as good. Bars from the points are the range over "
        "seeds, or with one seed the 95 % interval over examples."
    )
    series = list(
        dict.fromkeys(str(row[2]) for row in sorted(shown, key=lambda row: row[4] == charts.STATES[0]))
    )
    by_bits = Table("by_bits", "Score by bits, in numbers", _POINTS, shown)
    return [
        Block(
            "Size against score",
            front,
            [
                Chart(
                    "chart-sizes",
                    "Score against MB on disk, a point a scheme",
                    charts.size_score(series),
                    ["sizes"],
                )
            ],
            [Table("sizes", "Size and score, in numbers", _POINTS, shown)],
            picks={"task": "Task"},
            needs="score",
            missing=missing,
            titles=titles,
        ),
        Block(
            "Score by bits",
            "A line a scheme: solid as quantized, dashed after tuning; dotted across, the float model.",
            [
                Chart(
                    "chart-by-bits",
                    "Score by bits of a code, a line a scheme",
                    charts.bits_score(series),
                    ["by_bits"],
                )
            ],
            [by_bits],
            picks={"model": "Model", "task": "Task"},
            needs="score",
            missing=missing,
            titles=titles,
        ),
    ]


def _models(
    done: pd.DataFrame, weights_of: Callable[[str], list[dict[str, Any]] | None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The models whose weights are known, first seeds first, and the labels of those without room."""
    cells = done[done["model_key"].notna()].drop_duplicates("model_key")
    room, kept, left_out = _ROOM_MODELS, [], []
    seen: set[str] = set()  # histograms, which stand in the page once
    for _, one in cells.sort_values("seed", kind="stable").iterrows():
        label = _label(one)
        if room < 0:
            left_out.append(label)
            continue
        weights = weights_of(one["model_key"])
        if not weights:
            continue
        model = models.packed(label, weights)
        texts = [str(one) for one in model["histograms"]]
        room -= size({**model, "histograms": [text for text in texts if text not in seen]})
        seen.update(texts)
        if room < 0:
            left_out.append(label)
        else:
            kept.append(model)
    return kept, left_out


def _label(one: pd.Series) -> str:
    parts = [one["model"], one["task"], f"{int(one['bits'])}-bit {one['scheme']}"]
    parts += [str(one[name]) for name in ("groups", "importance") if isinstance(one[name], str)]
    parts += ["tuned"] if one["tuned"] else []
    return " · ".join([*map(str, parts), f"seed {int(one['seed'])}"])


def _weights(known: list[dict[str, Any]], left_out: list[str]) -> Section:
    notes = []
    if not known:
        notes.append(
            "The study kept no details of weights: see the folders of its models with lexibit report."
        )
    if left_out:
        notes.append(
            f"To keep this page small, the weights of {len(left_out):,} of {len(left_out) + len(known):,} "
            "models are left out here: the last table of this section names them, and the study's folder has "
            "them."
        )
    blocks = models.blocks(
        without_floats=_NO_FLOATS,
        without_importance=_NO_IMPORTANCE,
        layers_from="from the model's own configuration",
    )
    if left_out:
        rows = within(_ROOM_LEFT_OUT, [[label] for label in left_out])
        about = _left(left_out, rows, "names")
        table = Table("left_out", "Models whose weights are left out here", [Column("model", "model")], rows)
        blocks.append(Block("", " ".join(about), tables=[table]))
    return Section("weights", "Weights", notes=notes, blocks=blocks if known else (), models=True)


def _cells(done: pd.DataFrame) -> Section:
    rows = _rows(done, _CELLS)
    shown = within(_ROOM_CELLS, rows)
    notes = _left(rows, shown, "lines")
    if not rows:
        notes = ["No cell is done yet: run the study."]
    table = Table("cells", "Scores, sizes, seconds, memory, commands and versions", _CELLS, shown, open=True)
    return Section("cells", "Cells", notes=notes, blocks=[Block("", "", tables=[table])] if rows else ())


def _failures(failed: pd.DataFrame) -> Section:
    if failed.empty:
        return Section("failures", "Failures", notes=["No cell failed."])
    rows = _rows(failed, _FAILURES)
    shown = within(_ROOM_FAILURES, rows)
    table = Table("failures", "Failed cells and their errors", _FAILURES, shown, open=True)
    return Section(
        "failures", "Failures", notes=_left(rows, shown, "failures"), blocks=[Block("", "", tables=[table])]
    )


def _left(rows: Sequence[Any], shown: Sequence[Any], what: str) -> list[str]:
    if len(shown) == len(rows):
        return []
    return [
        f"To keep this page small, the last {len(rows) - len(shown):,} of {len(rows):,} {what} are left out "
        "here: the study's folder has them."
    ]


def _rows(results: pd.DataFrame, columns: Sequence[Column]) -> list[list[Any]]:
    """Lines of the results as plain values, None where there is none."""
    chosen = results[[column.name for column in columns]].astype(object)
    rows: list[list[Any]] = chosen.where(chosen.notna(), None).to_numpy().tolist()
    return rows


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)
