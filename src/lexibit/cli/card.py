"""``lexibit card``: the model card of a quantized folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lexibit import hub
from lexibit.cli.show import console

BaseModel = Annotated[
    str | None, typer.Option(help="The hub name of the float model.", metavar="USER/NAME", show_default=False)
]


def card(
    folder: Annotated[Path, typer.Argument(help="A quantized folder.", metavar="DIR")],
    name: Annotated[
        str | None,
        typer.Option(
            help="Its name on the hub; the folder's if not given.", metavar="USER/NAME", show_default=False
        ),
    ] = None,
    base_model: BaseModel = None,
    write: Annotated[bool, typer.Option("--write", help="Write it to README.md in the folder.")] = False,
) -> None:
    """Print the model card with which lexibit push uploads a folder, or write it.

    A card that was written is yours: push takes it as it is.

    [bold]Examples[/]

    lexibit card ./minilm-4bit --base-model sentence-transformers/all-MiniLM-L6-v2

    lexibit card ./minilm-4bit --name me/minilm-4bit --write
    """
    text = hub.card(folder, name, base_model)
    if write:
        hub.write_card(folder, text)
        console.print(f"[bold]{folder / hub.README}[/]: written", highlight=False)
    else:
        sys.stdout.write(text)
