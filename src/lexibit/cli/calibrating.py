"""The options that say what a model is calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from lexibit import checkpoint, tasks
from lexibit.calibration import Calibration, load_moments, of_task, of_texts
from lexibit.calibration.texts import LENGTH, LIMIT
from lexibit.checkpoint.target import no_model
from lexibit.errors import LexibitError

_TASK = "task:"

Calibrate = Annotated[
    str | None,
    typer.Option(
        help="Choose levels and codes so that the layers' outputs change least on some text, without labels: "
        f"a text file, one text a line; task:NAME for what a task trains on ({', '.join(tasks.names())}); or "
        "a FILE.safetensors of lexibit moments.",
        metavar="FILE|task:NAME",
    ),
]
Data = Annotated[
    Path | None, typer.Option(help="With task:NAME, the folder with the task's data; the hub if not given.")
]
Texts = Annotated[
    int | None,
    typer.Option(
        help=f"With --calibrate: texts at most, drawn with --seed; {LIMIT} if not given.",
        min=1,
        show_default=False,
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        help=f"With --calibrate: tokens of a text at most, {LENGTH} if not given; a task may have its own.",
        min=1,
        show_default=False,
    ),
]


def calibrating(
    source: Path,
    out: Path,
    what: str | None,
    data: Path | None,
    texts: int | None,
    length: int | None,
    seed: int,
) -> Callable[[PreTrainedModel], Calibration] | None:
    """What gives a model its calibration, with the tokenizer in its folder; None if there is to be none.

    Finished layers are kept beside ``out``, so that the same command goes on after it was killed.

    Raises:
        LexibitError: what is named is not there, or an option is of something else.
    """
    given = [name for name, value in (("--texts", texts), ("--length", length)) if value is not None]
    if given and what is None:
        raise LexibitError(f"{given[0]} limits what a model is calibrated on: name that with --calibrate")
    if what is None:
        if data is not None:
            raise LexibitError("--data has the data of a task: name it with --calibrate task:NAME")
        return None
    name = what.removeprefix(_TASK) if what.startswith(_TASK) else None
    if name is not None:
        tasks.task(name)
    elif data is not None:
        raise LexibitError(
            f"--data has the data of a task, and --calibrate names the file {what}: leave one out"
        )
    elif what.endswith(".safetensors"):
        if given:
            raise LexibitError(f"{what} was gathered before, and {given[0]} limits nothing now: leave it out")
        gathered = load_moments(Path(what))
        return lambda _: Calibration(gathered=gathered)
    lines = checkpoint.read_texts(Path(what), 1 << 40) if name is None else []
    if source.is_file():
        raise no_model(source)
    tokenizer = checkpoint.load_tokenizer(source)

    def calibrate(model: PreTrainedModel) -> Calibration:
        limits = {"limit": texts or LIMIT, "max_length": length or LENGTH, "seed": seed}
        if name is None:
            batches = of_texts(model, tokenizer, lines, **limits)
        else:
            batches = of_task(model, tokenizer, name, data, **limits)
        return Calibration(batches, folder=out.with_name(f".{out.name}.calibration"))

    return calibrate
