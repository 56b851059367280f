"""Files that appear only when they are whole."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any

from safetensors import SafetensorError

from lexibit.errors import LexibitError

# what the system says when it is the disk
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when all went well; else nothing is left.

    Raises:
        LexibitError: it cannot be written.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.part")
    try:
        yield staged
        staged.chmod(0o666 & ~umask())
        sync(staged)
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error  # without the name of what is staged
        raise LexibitError(f"{path}: cannot be written ({reason})") from error
    finally:
        staged.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text to a file.

    Raises:
        LexibitError: it cannot be written.
    """
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document to a file.

    Raises:
        LexibitError: it cannot be written.
    """
    write_text(path, to_json(value) + "\n")


def to_json(value: Any) -> str:
    """A JSON document; what is not finite, and so no JSON, is null."""
    return json.dumps(finite(value), indent=2, allow_nan=False, default=str)


def finite(value: Any) -> Any:
    """A JSON value with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Have the disk keep a file or folder, so that a crash cannot take it back."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def occupied(out: Path) -> bool:
    """Whether there is something where a new folder is to be; an empty folder is nothing."""
    return out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir())))


def exists_already(out: Path) -> LexibitError:
    """The error for a new folder whose place is taken."""
    return LexibitError(f"{out}: exists already: choose another folder, or remove it first")


def of_the_disk(error: OSError | SafetensorError) -> bool:
    """Whether an error of writing is the disk's, and no fault of the program."""
    return isinstance(error, SafetensorError) or error.errno in _CANNOT_WRITE


def cannot_write(out: Path, error: Exception, left: str = "nothing was left there") -> LexibitError:
    """The error for a new folder that the disk does not take."""
    return LexibitError(f"{out}: cannot be written ({error}): free some space or choose another disk; {left}")


@contextmanager
def parents_of(out: Path) -> Iterator[None]:
    """Folders above ``out`` that are made inside, and are empty then, are removed afterwards."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        yield
    finally:
        for parent in made:
            with suppress(OSError):  # it holds something, or was not made
                parent.rmdir()


def umask() -> int:
    """What the modes of new files lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def finish_folder(folder: Path) -> None:
    """Have the disk keep all of a new folder, with the modes that the umask gives to new files."""
    mask = umask()
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
        sync(path)
    sync(folder)
