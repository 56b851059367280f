"""``lexibit dequantize``: a quantized folder as plain float."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexibit import checkpoint
from lexibit.cli.show import Json, console, print_json, size


def dequantize(
    quantized: Annotated[
        str, typer.Argument(help="A quantized folder or file, or a hub name.", metavar="DIR")
    ],
    out: Annotated[Path, typer.Argument(help="The new folder, or file for a file; must not exist yet.")],
    json: Json = False,
) -> None:
    """Write a quantized folder as a plain float one, which any tool loads without lexibit.

    Every weight is what its codes say; it takes the bytes of the float model again.

    [bold]Examples[/]

    lexibit dequantize ./minilm-4bit ./minilm-float

    lexibit dequantize ./packed.safetensors ./plain.safetensors --json
    """
    nbytes = checkpoint.dequantize_to(checkpoint.find(quantized), out)
    if json:
        print_json({"out": str(out), "file_bytes": nbytes})
        return
    console.print(f"[bold]{out}[/]: plain float, {size(nbytes)} on disk", highlight=False)
