"""What the experiments of this folder share: commands of lexibit whose results stay in a folder of runs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from lexibit.cli import app
from lexibit.errors import LexibitError


def lexibit(*arguments: object) -> None:
    """Run a command in this process, which spares the imports; what it prints is in its files too."""
    print("$ lexibit", *arguments, flush=True)
    with redirect_stdout(StringIO()):
        try:
            app(list(map(str, arguments)), standalone_mode=False)
        except LexibitError as error:
            sys.exit(f"error: {error}")


def scores(model: Path, task: str, options: Sequence[object]) -> list[dict[str, Any]]:
    """A model's scores, evaluated once."""
    file = model.with_name(model.name + ".json")
    if not file.exists():
        lexibit("evaluate", model, "--task", task, *options, "--out", file)
    (found,) = json.loads(file.read_text(encoding="utf-8"))["scores"].values()
    return list(found)


def kept(score: dict[str, Any], of: dict[str, Any]) -> float:
    """The share of a score that is left; of a perplexity, which is better when it is lower, its inverse."""
    # a constant prediction has no correlation: it is worth nothing
    value = 0.0 if score["value"] is None else score["value"]
    return value / of["value"] if score["higher"] else of["value"] / value


def megabytes(folder: Path) -> float:
    """The bytes of a folder's weights, in millions."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def by_name(kind: Callable[[str], Any]) -> Callable[[str], dict[str, Any]]:
    """An option's type: ``a=1,b=2`` as a dictionary."""
    return lambda text: {
        name: kind(value) for name, value in (part.split("=") for part in text.split(",") if part)
    }


def numbers(text: str) -> list[int]:
    """An option's type: ``1,2`` as a list."""
    return [int(part) for part in text.split(",")]


def command(script: str) -> str:
    """The line that was typed, to be typed again."""
    return shlex.join(["python", f"examples/{script}", *sys.argv[1:]])
