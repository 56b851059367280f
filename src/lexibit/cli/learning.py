"""The options that say how a model is trained, the same for ``finetune`` and ``tune``."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lexibit import tasks
from lexibit.cli.options import takes
from lexibit.cli.show import console, number, print_json, table
from lexibit.errors import LexibitError, needs_extra
from lexibit.files import exists_already
from lexibit.tasks import Examples, Trainable
from lexibit.training import Settings
from lexibit.training.grid import GRID

TaskName = Annotated[str, typer.Option(help=f"The task: {', '.join(tasks.names(tasks.Trainable))}.")]
Out = Annotated[Path, typer.Option(help="The new folder; must not exist yet.")]
Limit = Annotated[
    int | None,
    typer.Option(help="Examples to learn from, and to evaluate on, at most: samples by --seed.", min=1),
]


def _settings(
    epochs: Annotated[float, typer.Option(help="Passes over the training examples.")] = Settings.epochs,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            help="At the start; it falls to zero in a line. 5e-5, or the model's own, if not given. Of "
            "several, like 1e-5,2e-5,3e-5, the one that gives the best score is kept.",
            metavar="<float>[,...]",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = Settings.batch_size,
    warmup: Annotated[
        float, typer.Option(help="Share of all steps in which the learning rate rises first.")
    ] = Settings.warmup,
    weight_decay: Annotated[float, typer.Option(help="Of Adam, decoupled.")] = Settings.weight_decay,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = Settings.max_steps,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many epochs without a better score, and keep the best epoch's model."
        ),
    ] = Settings.patience,
    group_by_length: Annotated[
        bool,
        typer.Option(help="Texts of like length together: less padding, and faster; less random an order."),
    ] = Settings.group_by_length,
    seed: Annotated[int, typer.Option(help="Of everything random, samples included.")] = Settings.seed,
) -> list[Settings]:
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        warmup=warmup,
        weight_decay=weight_decay,
        max_steps=max_steps,
        patience=patience,
        group_by_length=group_by_length,
        seed=seed,
    )
    if learning_rate is None:
        return [settings]
    try:
        rates = [float(rate) for rate in learning_rate.split(",")]
    except ValueError:
        raise LexibitError(
            f"--learning-rate {learning_rate}: give a number like 5e-5, or several with commas between them"
        ) from None
    return [replace(settings, learning_rate=rate) for rate in rates]


takes_settings = takes(grid=_settings)


def settings_of(context: typer.Context) -> list[Settings]:
    """What the options in a command that was parsed ask for.

    Raises:
        LexibitError: they are no settings.
    """
    return _settings(**{name: context.params[name] for name in inspect.signature(_settings).parameters})


def refuse_existing(out: Path) -> None:
    """Tell before a model is loaded that there is no place for the result.

    Raises:
        LexibitError: ``out`` exists, and nothing beside it that choosing among several would clear away.
    """
    if out.exists() and not out.with_name(f"{out.name}.{GRID}").exists():
        raise exists_already(out)


def examples(task: Trainable, data: Path | None, limit: int | None, seed: int) -> tuple[Examples, Examples]:
    """What to learn from, and what to evaluate on."""
    learn, judge = (task.load(data, split, limit=limit, seed=seed) for split in ("train", "dev"))
    return learn, judge


def trainer() -> Any:
    """The module that trains, which needs an extra's packages.

    Raises:
        LexibitError: they are not installed.
    """
    with needs_extra("tasks"):
        from lexibit.training import trainer
    return trainer


def show(out: Path, done: Any, json: bool) -> None:
    """What training gave; of several processes, one tells it."""
    with needs_extra("tasks"):
        from accelerate import PartialState
    if not PartialState().is_main_process:
        return
    if json:
        print_json({"out": str(out), **asdict(done)})
        return
    console.print(_scores(out, done))
    again = ", begun by an earlier run" if done.resumed else ""
    steps = "1 step" if done.steps == 1 else f"{done.steps} steps"
    console.print(f"{steps}{again}; {done.seconds:.1f} s", style="dim", highlight=False)


def _scores(out: Path, done: Any) -> Table:
    shown = table(str(out), "metric", "#score", "#low", "#high", "#examples")
    for score in done.scores:
        numbers = [number(value) for value in (score.value, score.low, score.high)]
        shown.add_row(score.metric, *numbers, str(score.examples))
    return shown
