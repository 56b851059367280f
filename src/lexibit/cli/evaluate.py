"""``lexibit evaluate``: how good a model is on a task."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lexibit import evaluation, tasks
from lexibit.cli.measures import BatchSize, Compute, Data
from lexibit.cli.options import Model
from lexibit.cli.show import Json, console, number, print_json, table
from lexibit.files import write_json

TaskName = Annotated[str, typer.Option(help=f"The task: {', '.join(tasks.names())}.")]
Limit = Annotated[int | None, typer.Option(help="Examples at most, a sample by --seed.", min=1)]
Seed = Annotated[int, typer.Option(help="Of the sample and of the intervals.", min=0)]


def evaluate(
    model: Model,
    task: TaskName,
    data: Data = None,
    split: Annotated[
        str, typer.Option(help="Which examples: dev, train, or test where there is one.")
    ] = "dev",
    against: Annotated[
        str | None,
        typer.Option(help="Another model on the same examples: prints the difference, with a paired test."),
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    compute: Compute = "float32",
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Json = False,
) -> None:
    """Measure a model on a task: float or quantized, a folder or a hub name.

    Scores come with the 95 % interval of a bootstrap over the examples.

    [bold]Examples[/]

    lexibit evaluate ./my-bert-mrpc --task mrpc --data ./glue

    lexibit evaluate ./my-bert-3bit --task mrpc --data ./glue --against ./my-bert-mrpc --json
    """
    result = evaluation.evaluate(
        model,
        task,
        data,
        split=split,
        against=against,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        compute=compute,
        progress=not json and console.is_terminal,
    )
    if out is not None:
        write_json(out, asdict(result))
    if json:
        print_json(asdict(result))
        return
    console.print(_scores(result))
    if any(math.isnan(score.low) for scores in result.scores.values() for score in scores):
        console.print("-: none, as the examples are too few or too much alike", style="dim")
    if result.signature:
        console.print(result.signature, style="dim")
    if result.differences:
        console.print(_differences(result))


def _scores(result: evaluation.Evaluation) -> Table:
    shown = table(f"{result.task} ({result.split})", "model", "metric", "#score", "#low", "#high", "#n", "#s")
    for name, scores in result.scores.items():
        for score in scores:
            numbers = [number(value) for value in (score.value, score.low, score.high)]
            shown.add_row(name, score.metric, *numbers, str(score.examples), f"{score.seconds:.1f}")
    return shown


def _differences(result: evaluation.Evaluation) -> Table:
    first, second = result.scores
    shown = table(f"{first} less {second}", "metric", "#difference", "#low", "#high", "#p")
    for one in result.differences:
        numbers = [number(value, "+.2f") for value in (one.value, one.low, one.high)]
        shown.add_row(one.metric, *numbers, number(one.p, ".3f"))
    return shown
