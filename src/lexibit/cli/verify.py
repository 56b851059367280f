"""``lexibit verify``: whether a quantized folder is what was written."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lexibit import checkpoint
from lexibit.cli.show import Json, console, print_json


def verify(
    quantized: Annotated[
        str, typer.Argument(help="A quantized folder or file, or a hub name.", metavar="DIR")
    ],
    json: Json = False,
) -> None:
    """Check that a quantized folder is whole: every tensor's bytes, and every part of every weight.

    Ends with an error that names the file and the tensor if it is not.

    [bold]Examples[/]

    lexibit verify ./minilm-4bit

    lexibit verify ./minilm-4bit/model.safetensors --json
    """
    found = checkpoint.verify(checkpoint.find(quantized))
    if json:
        print_json(asdict(found))
        return
    how = "as they were written" if found.checksums else "well-formed; no checksums, as its format is older"
    console.print(
        f"[bold]{quantized}[/]: {found.tensors} tensors, {found.weights} weights in codes: all {how}",
        highlight=False,
    )
