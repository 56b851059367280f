"""The options that say what a model is calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from lexibit import checkpoint, tasks
from lexibit.calibration import Calibration, load_moments, of_task, of_texts
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
Texts = Annotated[int, typer.Option(help="With --calibrate: texts at most, drawn with --seed.", min=1)]
Length = Annotated[
    int,
    typer.Option(help="With --calibrate: tokens of a text at most; a task may have its own length.", min=1),
]


def calibrating(
    source: Path, out: Path, what: str | None, data: Path | None, texts: int, length: int, seed: int
) -> Callable[[PreTrainedModel], Calibration] | None:
    """What gives a model its calibration, with the tokenizer in its folder; None if there is to be none.

    Finished layers are kept beside ``out``, so that the same command goes on after it was killed.

    Raises:
        LexibitError: what is named is not there.
    """
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
        gathered = load_moments(Path(what))
        return lambda _: Calibration(gathered=gathered)
    lines = checkpoint.read_texts(Path(what), 1 << 40) if name is None else []
    if source.is_file():
        raise no_model(source)
    tokenizer = checkpoint.load_tokenizer(source)

    def calibrate(model: PreTrainedModel) -> Calibration:
        limits = {"limit": texts, "max_length": length, "seed": seed}
        if name is None:
            batches = of_texts(model, tokenizer, lines, **limits)
        else:
            batches = of_task(model, tokenizer, name, data, **limits)
        return Calibration(batches, folder=out.with_name(f".{out.name}.calibration"))

    return calibrate
