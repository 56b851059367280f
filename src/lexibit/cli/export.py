"""``lexibit export``: a quantized model as an ONNX graph."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lexibit.cli.show import Json, console, print_json, size
from lexibit.onnx import export_onnx


def export(
    quantized: Annotated[str, typer.Argument(help="A quantized folder, or a hub name.", metavar="DIR")],
    out: Annotated[Path, typer.Argument(help="The new file; must not exist yet.", metavar="OUT.onnx")],
    weights: Annotated[
        str,
        typer.Option(
            help="codes: packed codes and levels as they are stored, which the graph looks up; float: what "
            "they say, in the bytes of the float model."
        ),
    ] = "codes",
    json: Json = False,
) -> None:
    """Write a quantized model as an ONNX graph, and check it in ONNX Runtime.

    Numbers of texts and tokens are free; there is no cache.

    [bold]Examples[/]

    lexibit export ./minilm-4bit minilm-4bit.onnx

    lexibit export ./minilm-4bit minilm-float.onnx --weights float --json
    """
    found = export_onnx(quantized, out, weights=weights)
    if json:
        print_json({"out": str(out)} | asdict(found))
        return
    console.print(
        f"[bold]{out}[/]: {', '.join(found.inputs)} -> {', '.join(found.outputs)}; {size(found.nbytes)}; in "
        f"ONNX Runtime its outputs differ by at most {found.difference:.2g}",
        highlight=False,
    )
