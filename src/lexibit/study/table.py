"""The table of a study, as papers have it: a line for each scheme and width, a column for each task."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexibit.errors import LexibitError, unknown
from lexibit.study import published
from lexibit.study.definition import FLOAT
from lexibit.study.store import about, results

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("markdown", "csv", "latex")

_CORRELATIONS = ("Pearson x 100", "Spearman x 100")
_LABELS = ("model", "scheme", "groups", "importance", "bits", "tuned")


@dataclass(frozen=True)
class Table:
    """A study's table.

    Attributes:
        labels: the columns that say which line it is: those that differ, and scheme and bits.
        tasks: the columns of scores, and the metric of each.
        lines: one for each combination of labels: the labels; ``MB``, ``smaller`` and ``bits_per_weight``; of
            each task ``(value, low, high)``; ``average``, over the tasks; ``kept``, as a share of float; and
            ``source``, which is None but for published lines.
        seeds: how many there are.
        examples: of each task, how many were evaluated.
        failed: cells without a score, and why.
        few: lines that have not all seeds, and how many.
        unmatched: models of published numbers of which none stands beside a line.
    """

    labels: tuple[str, ...]
    tasks: Mapping[str, str]
    lines: list[dict[str, Any]]
    seeds: int
    examples: Mapping[str, int]
    failed: list[str]
    few: list[str]
    unmatched: list[str]


def table(folder: str | Path, *, model: str | None = None, metric: str | None = None) -> Table:
    """The table of a study's folder.

    Of several seeds it has the mean and the range, of one the interval of the evaluation. A score that is
    none counts as the worst there is: 0, like the correlation of a constant prediction, or an infinite
    perplexity. Lines that have all tasks have an average; what is kept is an average divided by that of the
    float model with the same seeds (of perplexities, which are better when they are lower, the other way
    round).

    Args:
        folder: of the study.
        model: of published numbers, to stand beside; the study's own choice if not given.
        metric: of the tasks that have it; each task's first, if not given.

    Raises:
        LexibitError: it is no study's folder, or has no results yet; or no such model or metric is known.
    """
    said, rows = about(folder), results(folder)
    if rows.empty:
        raise LexibitError(f"{folder}: has no results yet: run the study first")
    beside = model or said["published"]
    if not isinstance(beside, Mapping):
        beside = dict.fromkeys(rows["model"], beside)
    failed = rows[rows["error"].notna()]
    scored = _of_metric(rows[rows["error"].isna()], metric)
    labels = tuple(
        name for name in _LABELS if name in ("scheme", "bits") or rows[name].nunique(dropna=False) > 1
    )
    metrics = dict(zip(scored["task"], scored["metric"], strict=True))
    tasks = {task: metrics[task] for task in dict.fromkeys(rows["task"]) if task in metrics}
    higher = {task: bool(scored[scored["task"] == task]["higher"].iloc[0]) for task in tasks}
    seeds = int(rows["seed"].nunique())
    lines: list[dict[str, Any]] = []
    few: list[str] = []
    floats: dict[str, pd.DataFrame] = {}
    for key, cells in scored.groupby(list(_LABELS), sort=False, dropna=False):
        line = {name: _plain(value) for name, value in zip(_LABELS, key, strict=True)} | _sizes(cells)
        line |= {task: _score(cells[cells["task"] == task], seeds) for task in tasks} | {"source": None}
        line["average"] = _average([line[task] for task in tasks])
        if line["scheme"] == FLOAT:
            floats[line["model"]] = cells
        whole = floats.get(line["model"])
        line["smaller"] = None if whole is None else _sizes(whole)["MB"] / line["MB"]
        line["kept"] = None if whole is None else _kept(cells, whole, list(tasks), list(higher.values()))
        few += [
            f"{called(line | {'task': task})}: {count} of {seeds} seeds"
            for task in tasks
            if 0 < (count := (cells["task"] == task).sum()) < seeds
        ]
        lines.append(line)
        if beside.get(line["model"]) is not None:
            lines += _published(beside[line["model"]], line, said, tasks)
    return Table(
        labels,
        tasks,
        lines,
        seeds,
        {task: int(scored[scored["task"] == task]["examples"].max()) for task in tasks},
        _failures(failed),
        few,
        [] if any(line["source"] for line in lines) else list(dict.fromkeys(filter(None, beside.values()))),
    )


def _failures(failed: pd.DataFrame) -> list[str]:
    """Each error once, with the cells that it befell."""
    told: dict[str, list[str]] = {}
    for row in failed.to_dict("records"):
        told.setdefault(row["error"], []).append(f"{called(row)}, seed {row['seed']}")
    return [f"{'; '.join(cells)}: {error}" for error, cells in told.items()]


def _of_metric(rows: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    """A row for every cell: of its first metric, or of the one that is asked for."""
    if metric is None:
        return rows.drop_duplicates("cell")
    known = list(dict.fromkeys(rows["metric"]))
    if metric not in known:
        raise unknown("metric", metric, known)
    return rows[rows["metric"] == metric]


def _plain(value: Any) -> Any:
    """A label as Python has it: no NaN, and no numpy."""
    if value is None or value != value:
        return None
    return value.item() if hasattr(value, "item") else value


def _sizes(cells: pd.DataFrame) -> dict[str, Any]:
    # of several tasks: their heads are not quite of one size
    return {"MB": cells["bytes"].mean() / 1e6, "bits_per_weight": cells["bits_per_weight"].mean()}


def _score(cells: pd.DataFrame, seeds: int) -> tuple[float, float, float] | None:
    """The mean over seeds, and their range; in a study of one seed its interval."""
    if cells.empty:
        return None
    scores = with_worst(cells)
    if seeds == 1:
        only = cells.iloc[0]
        return float(scores.iloc[0]), float(only["low"]), float(only["high"])
    return float(scores.mean()), float(scores.min()), float(scores.max())


def with_worst(cells: pd.DataFrame) -> pd.Series:
    """Scores, of which those that are none are the worst there is."""
    return cells["score"].fillna(cells["higher"].map({True: 0.0, False: inf}))


def _average(scores: list[tuple[float, float, float] | None]) -> float | None:
    known = [score[0] for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) and known else None


def _kept(cells: pd.DataFrame, whole: pd.DataFrame, tasks: list[str], higher: list[bool]) -> float | None:
    """The average of some cells divided by that of the float cells of the same tasks and seeds."""
    both = cells.assign(score=with_worst(cells)).merge(
        whole.assign(score=with_worst(whole)), on=["task", "seed"], suffixes=("", "_float")
    )
    if set(both["task"]) != set(tasks) or len(set(higher)) > 1:
        return None
    ours, floats = (both.groupby("task")[name].mean().mean() for name in ("score", "score_float"))
    part, all_of_it = (ours, floats) if higher[0] else (floats, ours)
    return float(part / all_of_it) if all_of_it and isfinite(part) else None


def _published(
    model: str, line: Mapping[str, Any], said: Mapping[str, Any], tasks: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The line of a paper that did the same with another model, if there is one."""
    settings = (said.get("schemes") or {}).get(line["scheme"]) or {}
    if line["importance"] is not None:
        return []
    cells = published.beside(
        model, line["scheme"], settings, line["groups"], line["bits"], bool(line["tuned"])
    )
    glue = next((one.value for one in cells if one.task == "glue"), None)
    floats = published.beside(model, FLOAT, {}, None, 32, False)
    shown, whole = (_of_tasks(found, tasks) for found in (cells, floats))
    # of these tasks: the average that the papers print is of all theirs
    average, of_float = _average(list(shown.values())), _average(list(whole.values()))
    if glue is None and not any(shown.values()):
        return []
    kept = average / of_float if average is not None and of_float else None if glue is None else glue / 100
    return [
        {name: line[name] for name in _LABELS}
        | {"model": model, "MB": None, "smaller": None, "bits_per_weight": None, "average": average}
        | {"kept": kept}
        | {"source": f"{cells[0].source}: {model}"}
        | shown
    ]


def _of_tasks(
    cells: list[published.Published], tasks: Mapping[str, str]
) -> dict[str, tuple[float, float, float] | None]:
    """What is published of each task by the same metric; of one number for two correlations, of either."""
    found: dict[str, tuple[float, float, float] | None] = {}
    for task, metric in tasks.items():
        metrics = (metric, published.CORRELATIONS) if metric in _CORRELATIONS else (metric,)
        known = [one.value for one in cells if one.task == task and one.metric in metrics]
        found[task] = (known[0], nan, nan) if known else None
    return found


def called(row: Mapping[str, Any]) -> str:
    """A cell, or a line of the table on a task, in words: model, task, scheme, bits and what else differs."""
    labels = [row["model"], row["task"], row["scheme"], f"{row['bits']} bits"]
    labels += [str(row[name]) for name in ("groups", "importance") if isinstance(row[name], str)]
    return ", ".join([*labels, *(["tuned"] if row["tuned"] else [])])


def written(made: Table, form: str) -> str:
    """A table as text.

    Args:
        made: the table.
        form: ``markdown``; ``csv``, with bare numbers, and a column each for the ends of intervals; or
            ``latex``, for the package booktabs.

    Raises:
        LexibitError: no such form.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if form == "csv":
        return _csv(made)
    heading = [*made.labels, "MB", "smaller", "bits/weight", *made.tasks]
    heading += ["average"] if len(made.tasks) > 1 else []
    heading += ["of float"]
    rows = [_row(made, line) for line in made.lines]
    return _markdown(made, heading, rows) if form == "markdown" else _latex(made, heading, rows)


def _row(made: Table, line: Mapping[str, Any]) -> list[str]:
    labels = [_label(line, name) for name in made.labels]
    sizes = [
        _number(line["MB"], ".3g"),
        "" if line["smaller"] is None else f"{line['smaller']:.1f}x",
        _number(line["bits_per_weight"], ".3f"),
    ]
    scores = [_interval(line[task]) for task in made.tasks]
    average = [_number(line["average"], ".2f")] if len(made.tasks) > 1 else []
    return [*labels, *sizes, *scores, *average, "" if line["kept"] is None else f"{100 * line['kept']:.1f} %"]


def _label(line: Mapping[str, Any], name: str) -> str:
    if name == "scheme" and line["source"]:
        return " ".join(f"{line['scheme']} ({line['source']})".split())
    if name == "tuned":
        return "yes" if line[name] else "no"
    return "" if line[name] is None else " ".join(str(line[name]).split())


def _number(value: float | None, form: str) -> str:
    return "" if value is None or value != value else format(value, form)


def _interval(score: tuple[float, float, float] | None) -> str:
    if score is None:
        return ""
    value, low, high = score
    digits = 1 if abs(value) >= 10 else 2
    return f"{value:.2f}" if low != low else f"{value:.2f} ({low:.{digits}f} to {high:.{digits}f})"


def _notes(made: Table) -> list[str]:
    metrics = "; ".join(
        f"{task}: {metric}, {made.examples[task]} examples" for task, metric in made.tasks.items()
    )
    spread = (
        f"Means over {made.seeds} seeds, and their range."
        if made.seeds > 1
        else "In brackets the 95 % interval of a bootstrap over the examples; one seed."
    )
    notes = [f"{metrics}. {spread} MB: of the weights on disk, in millions of bytes."] if metrics else []
    if any(line["source"] for line in made.lines):
        notes.append("Lines with a paper's name are what it prints, for its own model.")
    notes += [f"Nothing that papers print for {model} is of the same experiment." for model in made.unmatched]
    notes += [f"Only {few}" for few in made.few] + [f"Failed: {failed}" for failed in made.failed]
    return [" ".join(note.split()) for note in notes]


def _markdown(made: Table, heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    text = [f"| {' | '.join(map(_escaped, line))} |" for line in lines] if rows else []
    return "\n".join([*text, "", *(f"{_escaped(note)}\n" for note in _notes(made))])


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too."""
    for mark in ("\\", "|", "<", "*"):
        text = text.replace(mark, f"\\{mark}")
    return text


_TEX = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _latex(made: Table, heading: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return " & ".join("".join(_TEX.get(mark, mark) for mark in cell) for cell in cells) + r" \\"

    columns = "l" * len(made.labels) + "r" * (len(heading) - len(made.labels))
    notes = [f"% {note}" for note in _notes(made)]
    body = [line(row) for row in rows]
    return "\n".join(
        [
            *notes,
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(heading),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _csv(made: Table) -> str:
    import pandas as pd

    rows = []
    for line in made.lines:
        row = {name: line[name] for name in _LABELS} | {"source": line["source"]}
        row |= {name: line[name] for name in ("MB", "smaller", "bits_per_weight")}
        for task in made.tasks:
            row |= dict(zip((task, f"{task}_low", f"{task}_high"), line[task] or (None,) * 3, strict=True))
        rows.append(row | {"average": line["average"], "kept": line["kept"]})
    text = io.StringIO()
    columns = [*_LABELS, "source", "MB", "smaller", "bits_per_weight", "average", "kept"]
    (pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)).to_csv(
        text, index=False, lineterminator="\n", float_format="%.8g"
    )
    return text.getvalue()
