"""``lexibit compare-schemes``: every scheme side by side."""

from __future__ import annotations

import json as to_json
from collections.abc import Callable
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lexibit import checkpoint, comparison
from lexibit.cli.measures import BatchSize, Data, Limit, TaskName, Text, measures
from lexibit.cli.options import Importance, Model
from lexibit.cli.show import Json, console, print_json, print_score, size, table
from lexibit.config import LEVELS_DTYPES
from lexibit.demo import sentences
from lexibit.errors import LexibitError
from lexibit.packing import MAX_BITS, MIN_BITS

if TYPE_CHECKING:
    import pandas as pd


def compare_schemes(
    model: Model,
    bits: Annotated[str, typer.Option(help="Widths of a code, like 2,3,4.")] = "2,3,4",
    equal: Annotated[
        bool,
        typer.Option(
            "--equal/--own",
            help="All schemes at the same stored bits, or each in the form of its paper.",
        ),
    ] = True,
    overhead: Annotated[
        float,
        typer.Option(
            help="With --equal: what may be stored beyond the codes, as a share of them.", min=0, max=1
        ),
    ] = 0.05,
    scheme: Annotated[
        list[str] | None, typer.Option(help="Compare only this one; may be given more than once.")
    ] = None,
    importance: Importance = None,
    levels_dtype: Annotated[
        str, typer.Option(help=f"How levels are stored: {', '.join(LEVELS_DTYPES)}.")
    ] = "float16",
    text: Text = None,
    task: TaskName = None,
    data: Data = None,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    json: Json = False,
) -> None:
    """Compare all schemes on your model: error, size and outputs, at equal stored bits.

    With --equal every scheme spends what its codes leave of the budget on as small groups as it can pay, or
    OCS on as many split channels. Without --text the outputs are compared on English sentences that every
    Python carries. With --json each line has the config that reproduces it.

    [bold]Examples[/]

    lexibit compare-schemes ./my-bert --bits 2,3,4

    lexibit compare-schemes ./my-bert --bits 3 --own --levels-dtype float32

    lexibit compare-schemes ./minilm --bits 4 --task sts --data ./data --json
    """
    folder = checkpoint.find(model)
    asked: dict[str, Any] = {
        "bits": _widths(bits),
        "equal": equal,
        "overhead": overhead,
        "schemes": scheme,
        "importance": importance,
        "levels_dtype": levels_dtype,
        "seed": seed,
        "progress": not json and console.is_terminal,
    }
    if folder.is_file():
        if text is not None or task is not None:
            raise LexibitError(f"{model}: outputs need a model's folder, not a file of weights")
        found = comparison.compare_schemes(checkpoint.load_tensors(folder), **asked)
    else:
        loaded = checkpoint.load_float(folder)
        if text is None and task is None and not checkpoint.has_tokenizer(folder):
            console.print(f"{model} has no tokenizer: outputs are not compared", style="dim")
            texts: Path | list[str] | None = None
        else:
            texts = sentences() if text is None else text
        judges = measures(
            folder,
            loaded,
            text=texts,
            task=task,
            data=data,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
        )
        found = comparison.compare_schemes(loaded, reference=judges.reference, score=judges.score, **asked)
    if json:
        print_json([_plain(line) for line in found.to_dict("records")])
        return
    quantized = found[found["scheme"].notna()]
    titles = {width: f"{width} bit{'s' if width > 1 else ''}" for width in asked["bits"]}
    for (width, kind), lines in quantized.groupby(["bits", "kind"], sort=False):
        console.print(_table(f"{titles[width]}, {kind}", lines, own=not equal))
    _legend(found, levels_dtype)
    for width, title in titles.items():
        if missing := comparison.left_out(width, scheme):
            console.print(f"not with {title}: {', '.join(missing)}", style="dim")


def _widths(text: str) -> list[int]:
    try:
        widths = [int(part) for part in text.split(",")]
    except ValueError:
        widths = []
    if not widths or not all(MIN_BITS <= width <= MAX_BITS for width in widths):
        raise LexibitError(f"--bits {text!r}: write widths from {MIN_BITS} to {MAX_BITS}, like 2,3,4")
    return widths


# column of the result: its heading, and how its numbers are written
_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "group_size": ("#group", "{:,.0f}".format),
    "stored_bits": ("#stored", "{:.3f}".format),
    "bytes": ("#bytes", size),
    "mse": ("#MSE", "{:.3g}".format),
    "mean_scale": ("#scale", "{:.3g}".format),
    "cosine": ("#cosine", "{:.4f}".format),
    "output_error": ("#outputs", "{:.3g}".format),
    "score": ("#score", "{:.2f}".format),
}


def _table(title: str, lines: pd.DataFrame, own: bool) -> Table:
    """A line a scheme; in its own form, with its groups."""
    columns = [name for name in _COLUMNS if name in lines and lines[name].notna().any()]
    shown = table(title, "scheme", *(_COLUMNS[name][0] for name in columns))
    for _, line in lines.iterrows():
        cells = ["-" if isnan(line[name]) else _COLUMNS[name][1](line[name]) for name in columns]
        name = f"{line['name']}\n[dim]{line['groups']}[/]" if own else line["name"]
        shown.add_row(name, *cells)
    return shown


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    """A line whose texts of JSON are what they say."""
    texts = {name: line[name] for name in ("options", "config") if isinstance(line[name], str)}
    return line | {"config": None} | {name: to_json.loads(text) for name, text in texts.items()}


def _legend(found: pd.DataFrame, levels_dtype: str) -> None:
    said = (
        f"levels in {levels_dtype}; group: weights that share levels; stored: bits a weight takes; MSE: mean "
        "of (W - W^)^2; scale: mean scaling factor of binary codes, mean step of uniform grids"
    )
    if "cosine" in found:
        said += (
            "; cosine and outputs (|A - B|^2 / |A|^2): of the model's outputs, with these weights quantized"
        )
    console.print(said, style="dim")
    for _, line in found[found["scheme"].isna()].iterrows():
        print_score(line["name"], comparison.score_of(line))
