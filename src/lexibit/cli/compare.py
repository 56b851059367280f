"""``lexibit compare``: how near a quantized model's outputs stay to the float model's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lexibit import checkpoint
from lexibit.cli.options import Model
from lexibit.cli.show import Json, console, print_json, table


def compare(
    quantized: Annotated[str, typer.Argument(help="A quantized folder, or a hub name.", metavar="DIR")],
    model: Model,
    text: Annotated[Path, typer.Option(help="A text file, one text a line.")],
    limit: Annotated[int, typer.Option(help="Texts at most, from the file's start.", min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(help="Texts at a time.", min=1)] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a text at most.", min=1)] = 128,
    json: Json = False,
) -> None:
    """Compare a quantized model's outputs with the float model's, on your text.

    [bold]Examples[/]

    lexibit compare ./minilm-4bit sentence-transformers/all-MiniLM-L6-v2 --text sentences.txt

    lexibit compare ./gpt2-3bit ./gpt2 --text sentences.txt --limit 100 --json
    """
    result = checkpoint.compare(
        checkpoint.find(quantized),
        checkpoint.find(model),
        checkpoint.read_texts(text, limit),
        batch_size=batch_size,
        max_length=max_length,
    )
    if json:
        print_json(asdict(result))
        return
    shown = table(f"{quantized} against {model}", "measure", "#value")
    shown.add_row("texts", str(result.texts))
    shown.add_row(f"vectors compared ({result.output})", str(result.rows))
    shown.add_row("mean cosine", f"{result.cosine:.5f}")
    shown.add_row("worst cosine", f"{result.worst_cosine:.5f}")
    shown.add_row("relative squared error", f"{result.relative:.5f}")
    if result.agreement is not None:
        shown.add_row("same largest logit", f"{result.agreement:.2%}")
    shown.add_row("seconds, quantized", f"{result.seconds[0]:.2f}")
    shown.add_row("seconds, float", f"{result.seconds[1]:.2f}")
    console.print(shown)
