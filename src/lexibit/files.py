"""Files that appear only when they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lexibit.errors import LexibitError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when all went well; else nothing is left.

    Raises:
        LexibitError: it cannot be written.
    """
    staged = path.with_name(f".{path.name}.part")
    try:
        yield staged
        sync(staged)
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        raise LexibitError(f"{path}: cannot be written ({error})") from error
    finally:
        staged.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk keep a file or folder, so that a crash cannot take it back."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
