"""``lexibit report``: a page of charts on a quantized model or a study, or a model card."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from lexibit import checkpoint, hub
from lexibit import report as reports
from lexibit.cli.options import BaseModel
from lexibit.cli.show import console, size
from lexibit.errors import LexibitError
from lexibit.files import write_text
from lexibit.scores import read_scores


def report(
    source: Annotated[
        str,
        typer.Argument(help="A quantized folder or file, a hub name, or a study's folder.", metavar="DIR"),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The file to write: a page, or with --card the card.", metavar="FILE"
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The float model it was made from: adds errors and histograms.", metavar="MODEL"),
    ] = None,
    search: Annotated[
        Path | None,
        typer.Option(
            help="The plan of lexibit search; the folder's own search.json if not given.", metavar="PLAN.json"
        ),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(
            help="Scores that lexibit evaluate --out wrote; may be given more than once.", metavar="FILE"
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Make the model card instead, with which lexibit push uploads.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            help="With --card: its name on the hub; the folder's if not given.",
            metavar="USER/NAME",
            show_default=False,
        ),
    ] = None,
    base_model: BaseModel = None,
    write: Annotated[
        bool, typer.Option("--write", help="With --card: write it to README.md in the folder.")
    ] = False,
) -> None:
    """Make one HTML page of charts and tables on a quantized model or a study, or print a model card.

    The page opens in any browser without a network. A card that was written to its folder is yours:
    lexibit push takes it as it is.

    [bold]Examples[/]

    lexibit report ./minilm-4bit -o report.html --against sentence-transformers/all-MiniLM-L6-v2

    lexibit report ./my-study -o study.html

    lexibit report ./minilm-4bit --card --name me/minilm-4bit --scores scores.json --write
    """
    lines = [line for file in scores or [] for line in read_scores(file)]
    if card:
        _refuse("goes with a page: leave out --card", {"against": against, "search": search})
        if write and out is not None:
            raise LexibitError("--write and --out are two places: give one of them")
        text = hub.card(Path(source), name, base_model, lines)
        if write:
            out = Path(source) / hub.README
            hub.write_card(Path(source), text)
        elif out is None:
            sys.stdout.write(text)
            return
        else:
            write_text(out, text)
        console.print(f"[bold]{out}[/]: written", highlight=False)
        return
    _refuse("goes with --card", {"name": name, "base-model": base_model, "write": write or None})
    if out is None:
        raise LexibitError("give the page a place: -o FILE.html")
    if _is_study(Path(source)):
        beside = {"against": against, "search": search, "scores": scores}
        _refuse("goes with a quantized model, and this is a study's folder: leave it out", beside)
        text = reports.of_study(Path(source))
    else:
        floats = None if against is None else checkpoint.find(against)
        text = reports.of_checkpoint(checkpoint.find(source), floats, search, lines)
    write_text(out, text)
    console.print(f"[bold]{out}[/]: written, {size(len(text.encode()))}", highlight=False)


def _refuse(why: str, options: Mapping[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            raise LexibitError(f"--{name} {why}")


def _is_study(folder: Path) -> bool:
    if not folder.is_dir() or (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
        return False  # a model, which needs none of the packages of studies
    from lexibit import study

    return study.is_study(folder)
