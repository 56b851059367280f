"""How commands print: tables for people on standard output, or JSON for scripts."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lexibit.files import to_json
from lexibit.tasks import Score
from lexibit.weight import WeightSpec

# a pipe has no width of its own: wide enough for names of weights
console = Console(width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_json(value: Any) -> None:
    """One JSON document on standard output; what is not finite, and no JSON, is null."""
    sys.stdout.write(to_json(value) + "\n")


def table(title: str, *columns: str) -> Table:
    """A table whose columns are text, or numbers where the heading begins with ``#``."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        made.add_column(
            column.removeprefix("#"),
            justify="right" if column.startswith("#") else "left",
            overflow="fold",
            no_wrap=column.startswith("#"),
            min_width=20 if column == "weight" else None,
        )
    return made


def number(value: float, form: str = ".2f") -> str:
    """A number, or a dash where there is none."""
    return "-" if math.isnan(value) else format(value, form)


def print_score(whose: str, score: Score) -> None:
    """A model's score on a task, with its interval."""
    console.print(
        f"score: {score.metric} on {score.examples} examples; {whose} has {number(score.value)} "
        f"({number(score.low)} to {number(score.high)})",
        style="dim",
        highlight=False,
    )


def size(count: float) -> str:
    """A number of bytes for people: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def beside(spec: WeightSpec) -> str:
    """What a weight has beside codes and levels, for the end of a line; nothing if it has nothing."""
    rows, columns = spec.extra
    has = [
        (rows, f"{rows} rows more"),
        (columns, f"{columns} columns more"),
        (spec.mask, "a mask"),
        (spec.outliers, f"{spec.outliers} outliers"),
    ]
    return "".join(f", {what}" for there, what in has if there)
