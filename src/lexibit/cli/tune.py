"""``lexibit tune``: train the codebooks of a quantized model on a task."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from lexibit import checkpoint, tasks
from lexibit.cli.learning import Data, Limit, Out, TaskName, examples, show, takes_settings, trainer
from lexibit.cli.show import Json, console
from lexibit.training import Settings


@takes_settings
def tune(
    model: Annotated[str, typer.Argument(help="A quantized folder, or a hub name.", metavar="DIR")],
    task: TaskName,
    out: Out,
    settings: Settings,
    data: Data = None,
    limit: Limit = None,
    levels_factor: Annotated[
        float, typer.Option(help="How many times faster levels learn than all else.")
    ] = Settings.levels_factor,
    teacher: Annotated[
        str | None, typer.Option(help="A float model of the same task, whose outputs are to be matched too.")
    ] = None,
    distill: Annotated[
        float, typer.Option(help="With --teacher: the share of the loss that is the distance to its outputs.")
    ] = Settings.distill,
    temperature: Annotated[
        float, typer.Option(help="With --teacher: what both models' logits are divided by.")
    ] = Settings.temperature,
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
    learning, chosen = trainer(), tasks.trainable(task)
    learn, judge = examples(chosen, data, limit, settings.seed)
    folder = checkpoint.find(model)
    loaded, tokenizer = checkpoint.load_quantized(folder), checkpoint.load_tokenizer(folder)
    floats = None if teacher is None else checkpoint.load_float(checkpoint.find(teacher))
    done = learning.train(
        loaded,
        tokenizer,
        chosen,
        learn,
        judge,
        out,
        replace(settings, levels_factor=levels_factor, distill=distill, temperature=temperature),
        teacher=floats,
        progress=not json and console.is_terminal,
        about={"model": model, "data": data, "limit": limit, "teacher": teacher},
    )
    show(out, done, json)
