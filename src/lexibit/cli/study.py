"""``lexibit study``: a matrix of runs, and its table."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import asdict
from math import nan
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lexibit import memory as memory_sizes
from lexibit.cli.show import Json, console, number, print_json, table
from lexibit.errors import LexibitError
from lexibit.files import write_text

app = typer.Typer(
    name="study",
    help="A matrix of runs - models, tasks, schemes, bits, seeds - at one command, and its table.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

File = Annotated[Path, typer.Argument(help="A study: a YAML file, or Python that makes one.", metavar="FILE")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The study's folder; FILE without its ending, in the current folder, if not given.",
        show_default=False,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="The folder of the tasks' data, not the study's own.", show_default=False),
]
ModelAt = Annotated[
    list[str] | None,
    typer.Option(
        help="Where a model of the study is, by its name there; may be given more than once.",
        metavar="NAME=SOURCE",
    ),
]


@app.command()
def run(
    file: File,
    out: Out = None,
    data: Data = None,
    model: ModelAt = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Processes at once; one for every four cores if not given.", min=1, show_default=False
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What they take together, about, like 8GB; what is free if not given.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Work on the machines of a Ray cluster instead, which all see the study's files under the "
            "same paths: its address, or auto.",
            metavar="ADDRESS",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Work through a study: every cell that is not done yet.

    Each step is a command of lexibit, known by the content of what goes in: a model is fine-tuned once, a
    weight fitted once, for all cells that need it. A run that was killed goes on when the same command is
    given again; several may work on one folder at once. A cell that fails is recorded with its error, the
    others go on, and the next run tries it again; the exit code is then 1.

    [bold]Examples[/]

    lexibit study run kmeans_vs_linear.yaml

    lexibit study run kmeans_vs_linear.yaml --data ./glue --processes 2 --memory 8GB

    lexibit study run kmeans_vs_linear.yaml --ray 10.0.0.1:6379 --out /shared/kmeans
    """
    from lexibit import study

    if ray is not None and (processes is not None or memory is not None):
        raise LexibitError("--processes and --memory are of this machine, and --ray leaves work to others")
    memory_bytes = None if memory is None else memory_sizes.parse(memory, "--memory")
    asked, folder = _asked(file, out, data, model)
    if not json:
        console.print(f"what steps print stands in {escape(str(folder))}/steps/*/log.txt", style="dim")

    def tell(cell: study.Cell, rows: list[dict[str, Any]], done: int, of: int) -> None:
        if not json:
            console.print(f"{done}/{of}: {_told(rows[0])}", highlight=False)

    done = study.run(
        asked,
        folder,
        processes=processes,
        memory_bytes=memory_bytes,
        ray=ray,
        tell=tell,
    )
    if json:
        print_json({"out": str(folder)} | asdict(done))
    else:
        console.print(
            f"[bold]{escape(str(folder))}[/]: {done.cells} cells, {done.before} done before, "
            f"{done.failed} failed; {done.seconds:.1f} s",
            highlight=False,
        )
        console.print(f"lexibit study table {folder}; lexibit report {folder} -o report.html", style="dim")
    if done.failed:
        raise LexibitError(
            f"{done.failed} of {done.cells} cells failed: 'lexibit study table {folder}' lists their errors; "
            "the same command tries them again"
        )


@app.command()
def plan(file: File, out: Out = None, data: Data = None, model: ModelAt = None, json: Json = False) -> None:
    """Show the cells of a study, and which are done, without doing any.

    [bold]Examples[/]

    lexibit study plan kmeans_vs_linear.yaml

    lexibit study plan kmeans_vs_linear.yaml --data ./glue --json
    """
    from lexibit import study

    asked, folder = _asked(file, out, data, model)
    found = study.cells(asked)
    store = study.Store(folder)
    rows = [dict(cell.labels) | {"done": study.finished(store, cell)} for cell in found]
    left = [cell for cell, row in zip(found, rows, strict=True) if not row["done"]]
    steps = Counter(
        step.command
        for step in dict.fromkeys(step for cell in left for step in cell.steps())
        if not store.is_done(step)
    )
    if json:
        print_json({"out": str(folder), "steps": steps, "cells": rows})
        return
    columns = ["model", "task", "scheme", "#bits", "groups", "importance", "tuned", "#seed", "done"]
    shown = table(str(file), *columns)
    for row in rows:
        shown.add_row(*(_cell(value) for value in row.values()))
    console.print(shown)
    made = ", ".join(f"{count} x {command}" for command, count in steps.items())
    todo = f"; steps to do: {made}" if made else ""
    console.print(f"{len(rows)} cells, {len(left)} to do{todo}", highlight=False)


@app.command("table")
def print_table(
    folder: Annotated[Path, typer.Argument(help="A study's folder.", metavar="DIR")],
    form: Annotated[str, typer.Option("--format", help="markdown, csv or latex.")] = "markdown",
    published: Annotated[
        str | None,
        typer.Option(
            help="Beside what papers print for this model, like bert-base-uncased; the study's own choice "
            "if not given.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="This metric; each task's first, if not given.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A file, instead of the terminal.", show_default=False)
    ] = None,
) -> None:
    """Print the table of a study as papers have it: bits and schemes by tasks, the average and what is kept.

    [bold]Examples[/]

    lexibit study table kmeans_vs_linear

    lexibit study table kmeans_vs_linear --published bert-base-uncased --format latex -o table.tex
    """
    from lexibit import study

    text = study.written(study.table(folder, model=published, metric=metric), form)
    if out is None:
        sys.stdout.write(text)
        return
    write_text(out, text)
    console.print(f"[bold]{escape(str(out))}[/]: written", highlight=False)


def _asked(file: Path, out: Path | None, data: Path | None, models: list[str] | None) -> tuple[Any, Path]:
    """The study, as the options change it, and its folder."""
    from lexibit import study

    asked = study.read(file, **({} if data is None else {"data": str(data)}))
    for text in models or []:
        name, equals, source = text.partition("=")
        if not equals:
            raise LexibitError(f"--model {text!r}: write NAME=SOURCE")
        asked = asked.with_model(name, source)
    return asked, Path(os.curdir, file.stem) if out is None else out


def _told(row: dict[str, Any]) -> str:
    """A cell and its score, on a line."""
    from lexibit import study

    name = escape(f"{study.called(row)}, seed {row['seed']}")
    if row.get("error"):
        return f"{name}: [red]failed[/]: {escape(row['error'])}"
    score, low, high = (nan if row[name] is None else row[name] for name in ("score", "low", "high"))
    spread = f"({number(low)} to {number(high)})"
    return f"{name}: {row['metric']} {number(score)} {spread}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    return "-" if value is None else escape(str(value))
