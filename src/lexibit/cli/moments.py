"""``lexibit moments``: gather what a model's weights meet, once for many quantizations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexibit import checkpoint
from lexibit.calibration import gather, save_moments
from lexibit.cli.calibrating import Calibrate, Data, Length, Texts, calibrating
from lexibit.cli.options import Model
from lexibit.cli.show import console, size
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.plan import Plan


def moments(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The new file, NAME.safetensors.")],
    calibrate: Calibrate = None,
    data: Data = None,
    texts: Texts = None,
    length: Length = None,
    seed: Annotated[int, typer.Option(help="Of the draw of texts.")] = 0,
) -> None:
    """Gather the second moments of every layer's inputs, for lexibit quantize --calibrate.

    Quantizing with the file needs no text and no run of the model; but each layer is calibrated as if all
    others stayed float, which keeps less: at 2 bits the outputs may lose three times as much.

    [bold]Examples[/]

    lexibit moments ./my-bert my-bert-moments.safetensors --calibrate my-texts.txt

    lexibit quantize ./my-bert ./my-bert-3bit --bits 3 --calibrate my-bert-moments.safetensors
    """
    if calibrate is None:
        raise LexibitError("name with --calibrate the text to gather moments on")
    if out.suffix != ".safetensors":
        raise LexibitError(f"{out}: moments are kept in a .safetensors file: name it so")
    if out.exists():
        raise LexibitError(f"{out}: exists already: choose another name, or remove it first")
    source = checkpoint.find(model)
    batches_of = calibrating(source, out, calibrate, data, texts, length, seed)
    loaded = checkpoint.load_float(source)
    assert batches_of is not None
    given = batches_of(loaded)
    if given.gathered is not None:
        raise LexibitError(f"{calibrate}: holds moments already: give it to lexibit quantize --calibrate")
    plan = Plan.of(loaded, LexibitConfig(heads=True))
    found = gather(loaded, plan, given.batches, progress=console.is_terminal)
    save_moments(found, out)
    console.print(
        f"[bold]{out}[/]: what {len(found)} weights meet; {size(out.stat().st_size)}", highlight=False
    )
