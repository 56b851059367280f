"""``lexibit push``: a quantized folder to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexibit import hub
from lexibit.cli.options import BaseModel
from lexibit.cli.show import Json, console, print_json


def push(
    folder: Annotated[Path, typer.Argument(help="A quantized folder.", metavar="DIR")],
    name: Annotated[str, typer.Argument(help="Its name on the hub.", metavar="USER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    base_model: BaseModel = None,
    json: Json = False,
) -> None:
    """Upload a quantized folder to the Hugging Face hub, with a model card.

    The folder is verified first. The card goes to its README.md; lexibit report --card shows it.

    [bold]Examples[/]

    lexibit push ./minilm-4bit me/minilm-4bit --base-model sentence-transformers/all-MiniLM-L6-v2

    lexibit push ./my-bert-3bit me/my-bert-3bit --private
    """
    url = hub.push(folder, name, private=private, base_model=base_model)
    if json:
        print_json({"url": url})
        return
    console.print(f"[bold]{folder}[/] -> {url}", highlight=False)
