"""``lexibit inspect``: what a quantized folder really holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from lexibit import checkpoint
from lexibit.cli.show import Json, beside, console, print_json, size, table


def inspect(
    quantized: Annotated[
        str, typer.Argument(help="A quantized folder or file, or a hub name.", metavar="DIR")
    ],
    against: Annotated[
        str | None,
        typer.Option(help="The float model it was made from: adds each weight's error."),
    ] = None,
    json: Json = False,
) -> None:
    """Show what a quantized folder holds: true bits per weight, and errors.

    Bits per weight are counted from the bytes stored: codes and levels.

    [bold]Examples[/]

    lexibit inspect ./minilm-4bit

    lexibit inspect ./minilm-4bit --against sentence-transformers/all-MiniLM-L6-v2 --json
    """
    folder = checkpoint.find(quantized)
    contents = checkpoint.inspect(folder)
    errors = {}
    if against is not None:
        found = checkpoint.errors_against(folder, checkpoint.find(against))
        errors = {error.name: error for error in found}
    if json:
        document = contents.to_dict()
        for weight in document["weights"]:
            if weight["name"] in errors:
                weight |= asdict(errors[weight["name"]])
        print_json(document)
        return
    columns = ["weight", "scheme", "#bits", "#bytes", "#stored"]
    shown = table(quantized, *columns, *(["#error", "#largest"] if errors else []))
    for name, spec in contents.weights.items():
        shape, block = ("x".join(map(str, axes)) for axes in (spec.shape, spec.block))
        how = f"groups of {block}, {spec.form} {spec.levels_dtype}{beside(spec)}"
        row = [
            f"{escape(name)}\n[dim]{shape}, {how}[/]",
            escape(spec.scheme),
            str(spec.bits),
            size(spec.nbytes),
            f"{spec.bits_per_weight:.4f}",
        ]
        if name in errors:
            row += [f"{errors[name].relative:.5f}", f"{errors[name].largest:.4g}"]
        shown.add_row(*row)
    console.print(shown)
    console.print("stored: bits a weight takes, levels included", style="dim")
    if errors:
        console.print("error: |W - W^|^2 / |W|^2; largest: max |W - W^|", style="dim")
    console.print(
        f"{len(contents.weights)} weights in codes: {contents.bits_per_weight:.4f} stored bits each\n"
        f"whole checkpoint, full-precision parameters and headers too: {size(contents.file_bytes)}, "
        f"{contents.file_bits_per_parameter:.4f} bits per parameter",
        highlight=False,
    )
