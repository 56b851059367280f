"""Files that appear only when they are whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lexibit.errors import LexibitError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when all went well; else nothing is left.

    Raises:
        LexibitError: it cannot be written.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield staged
        sync(staged)
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        raise LexibitError(f"{path}: cannot be written ({error})") from error
    finally:
        staged.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document to a file.

    Raises:
        LexibitError: it cannot be written.
    """
    with replacing(path) as staged:
        staged.write_text(to_json(value) + "\n", encoding="utf-8")


def to_json(value: Any) -> str:
    """A JSON document; what is not finite, and so no JSON, is null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Have the disk keep a file or folder, so that a crash cannot take it back."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
