"""``lexibit tune``: train the codebooks of a quantized model on a task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lexibit import checkpoint, tasks
from lexibit.cli.learning import (
    Limit,
    Out,
    TaskName,
    examples,
    refuse_existing,
    show,
    takes_settings,
    trainer,
)
from lexibit.cli.measures import Data
from lexibit.cli.show import Json, console
from lexibit.errors import LexibitError
from lexibit.training import Settings, best_of


@takes_settings
def tune(
    model: Annotated[str, typer.Argument(help="A quantized folder, or a hub name.", metavar="DIR")],
    task: TaskName,
    out: Out,
    grid: list[Settings],
    data: Data = None,
    limit: Limit = None,
    levels_factor: Annotated[
        float, typer.Option(help="How many times faster levels learn than all else.")
    ] = Settings.levels_factor,
    teacher: Annotated[
        str | None, typer.Option(help="A float model of the same task, whose outputs are to be matched too.")
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(
            help="With --teacher: the share of the loss that is the distance to its outputs; "
            f"{Settings.distill} if not given."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help=f"With --teacher: what both models' logits are divided by; {Settings.temperature} if not "
            "given."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Train the codebooks of a quantized model on a task: codes stay fixed, and the size is the same.

    A level's gradient is the average over the weights that have it; levels learn ten times as fast as
    biases, LayerNorm and heads. A run that was killed goes on from its last epoch when the same command is
    given again.

    [bold]Examples[/]

    lexibit tune ./my-bert-3bit --task mrpc --data ./glue --out ./my-bert-3bit-tuned

    lexibit tune ./my-bert-2bit --task mrpc --data ./glue --teacher ./my-bert-mrpc --epochs 1 --out ./tuned
    """
    for name, value in (("distill", distill), ("temperature", temperature)):
        if value is not None and teacher is None:
            raise LexibitError(f"--{name} goes with --teacher MODEL: name the float model too")
    more = {
        "levels_factor": levels_factor,
        "distill": Settings.distill if distill is None else distill,
        "temperature": Settings.temperature if temperature is None else temperature,
    }
    grid = [replace(settings, **more) for settings in grid]  # type: ignore[arg-type]
    learning, chosen = trainer(), tasks.trainable(task)
    refuse_existing(out)
    learn, judge = examples(chosen, data, limit, grid[0].seed)
    folder = checkpoint.find(model)
    tokenizer = checkpoint.load_tokenizer(folder)
    floats = None if teacher is None else checkpoint.load_float(checkpoint.find(teacher))

    def once(settings: Settings, to: Path, again: bool) -> Any:
        return learning.train(
            checkpoint.load_quantized(folder),
            tokenizer,
            chosen,
            learn,
            judge,
            to,
            settings,
            teacher=floats,
            progress=not json and console.is_terminal,
            about={"model": model, "data": data, "limit": limit, "teacher": teacher},
            again=again,
        )

    done = best_of(grid, once, out)
    show(out, done, json)
