"""What tells inputs from others: digests of what is in files, folders and examples."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from lexibit import checkpoint, tasks
from lexibit.errors import LexibitError


def of(*parts: Any) -> str:
    """Of plain values, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def of_file(file: Path) -> str:
    """Of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@cache
def of_path(path: Path) -> str:
    """Of a file, or of a folder's files and their names, hidden ones aside; read once a process.

    Raises:
        LexibitError: it is not there, or cannot be read.
    """
    try:
        if path.is_file():
            return of_file(path)
        if not path.is_dir():
            raise LexibitError(f"{path}: no such file or folder")
        return of(
            sorted(
                (str(file.relative_to(path)), of_file(file))
                for file in path.rglob("*")
                if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
        )
    except OSError as error:
        raise LexibitError(f"{path}: cannot be read: {error.strerror or error}") from error


@cache
def of_examples(task: str, data: str | None, *splits: str) -> str:
    """Of a task's examples, whatever else lies beside them; read once a process."""
    chosen = tasks.task(task)
    return tasks.digest(*(chosen.read(None if data is None else Path(data), split) for split in splits))


@cache
def located(source: str) -> Path:
    """Where a model is on this disk; looked for once a process, as the hub is asked each time."""
    return checkpoint.find(source).absolute()


def of_model(source: str) -> str:
    """Of a model's folder or file, on this disk or the hub."""
    return of_path(located(source))
