"""``lexibit finetune``: train a float model on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit import checkpoint, models, tasks
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
from lexibit.cli.options import settings_by_name
from lexibit.cli.show import Json, console
from lexibit.errors import LexibitError, unknown
from lexibit.tasks import Examples, Trainable
from lexibit.training import Settings, best_of


@takes_settings
def finetune(
    task: TaskName,
    out: Out,
    grid: list[Settings],
    source: Annotated[
        str | None,
        typer.Argument(help="A model folder or a hub name.", metavar="[MODEL]", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"A model made from nothing instead: {', '.join(models.names())}.", metavar="NAME"),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help=f"With --model: a size or the like of it. {models.sizes()}", metavar="NAME=VALUE"),
    ] = None,
    data: Data = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Train a float model on a task, all of its weights, and save it to a new folder.

    The defaults are those of the papers: Adam, 5e-5, a linear schedule. A run that was killed goes on from
    its last epoch when the same command is given again.

    [bold]Examples[/]

    lexibit finetune ./my-bert --task mrpc --data ./glue --out ./my-bert-mrpc

    lexibit finetune google-bert/bert-base-uncased --task rte --patience 2 --seed 1 --out ./bert-rte

    lexibit finetune --task wikitext-2 --data ./wikitext-2 --model awd-lstm --out ./awd-lstm
    """
    if (source is None) == (model is None):
        raise LexibitError("give either MODEL, a folder or a hub name, or --model NAME, made from nothing")
    if option and model is None:
        raise LexibitError("--option goes with --model: a model that exists has its sizes")
    learning, chosen = trainer(), tasks.trainable(task)
    refuse_existing(out)
    learn, judge = examples(chosen, data, limit, grid[0].seed)
    if model is not None and model not in models.names():
        raise unknown("--model", model, models.names())
    if model is not None and model not in chosen.from_nothing:
        known = " or ".join(chosen.from_nothing) or "no model"
        raise LexibitError(f"--model {model}: {known} is made from nothing for task {task!r}")
    sizes = settings_by_name(option)

    def once(settings: Settings, folder: Path, again: bool) -> Any:
        learning.seed(settings.seed)
        if model is not None:
            loaded, tokenizer = models.create(model, chosen.texts(learn), sizes, seed=settings.seed)
        else:
            loaded, tokenizer = _existing(str(source), chosen, learn)
        return learning.train(
            loaded,
            tokenizer,
            chosen,
            learn,
            judge,
            folder,
            settings,
            progress=not json and console.is_terminal,
            about={"model": source or model, "sizes": sizes, "data": data, "limit": limit},
            again=again,
        )

    done = best_of(grid, once, out)
    show(out, done, json)


def _existing(
    source: str, task: Trainable, learn: Examples
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder: Path = checkpoint.find(source)
    if not folder.is_dir():
        raise LexibitError(f"{source}: training needs a model's folder, not a file of weights")
    tokenizer = checkpoint.load_tokenizer(folder)
    return task.model(folder, learn), tokenizer
