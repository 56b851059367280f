"""A folder in the making: what is finished of it outlives a kill, and the next run goes on from there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from lexibit.errors import FormatError, LexibitError
from lexibit.files import (
    cannot_write,
    exists_already,
    finish_folder,
    occupied,
    of_the_disk,
    parents_of,
    sync,
)

_logger = logging.getLogger("lexibit")
_JOURNAL, _LOCK, _FOLDER = "journal.jsonl", "lock", "folder"
_TRIES = 100


class Unfinished:
    """What :func:`unfinished` gives.

    Attributes:
        folder: where to write; it holds what an earlier run wrote.
        finished: the tensors that are finished, and their checksums.
        begun_before: whether an earlier run finished some of them.
    """

    def __init__(self, work: Path, key: str) -> None:
        """Take up what is there, or begin anew if it has another key."""
        self.folder = work / _FOLDER
        self.finished: dict[str, str] = {}
        self.begun_before = False
        self._journal = work / _JOURNAL
        lines = _lines(self._journal)
        if self.folder.is_dir() and lines[:1] == [{"key": key}]:
            for line in lines[1:]:
                self.finished |= line
            self.begun_before = bool(self.finished)
            _logger.warning("%s: goes on, with %d tensors finished", work, len(self.finished))
            return
        if self._journal.exists():
            _logger.warning("%s: is of another model, configuration or version: begins anew", work)
        self._journal.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._append({"key": key})

    def clear(self, kept: Iterable[str]) -> None:
        """Remove all but these files: what an earlier run wrote of the others may be cut short, or old."""
        kept = set(kept)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in kept:
                path.unlink()

    def finish(self, checksums: Mapping[str, str]) -> None:
        """Note tensors that are written."""
        self.finished |= checksums
        self._append(checksums)

    def _append(self, line: Mapping[str, str]) -> None:
        with self._journal.open("ab") as file:
            # a line begins with its end, lest it go on from one that a kill cut short
            file.write(b"\n" + json.dumps(line).encode())


def _lines(journal: Path) -> list[dict[str, str]]:
    """The lines of a journal that are whole."""
    lines = []
    try:
        text = journal.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return lines


@contextmanager
def unfinished(out: Path, key: str) -> Iterator[Unfinished]:
    """A folder to write to that appears at ``out`` when the work inside ended well, synced to the disk.

    If it did not, and tensors were finished, they stay beside ``out``, in ``.NAME.unfinished``; else, or if
    what was asked for is wrong and will not be asked for again, nothing is left. One process at a time works
    on it.

    Args:
        out: the new folder.
        key: what tells this work from others: unfinished work of another key is begun anew, and that is said.

    Raises:
        LexibitError: ``out`` exists, is being written by another process, or cannot be written.
    """
    out = out.absolute()
    if occupied(out):
        raise exists_already(out)
    work = out.with_name(f".{out.name}.unfinished")
    is_new = not work.exists()
    unfinished: Unfinished | None = None
    whole = useless = False
    with parents_of(out):
        lock = _locked(work, out)
        try:
            if occupied(out):  # by a process that ended just now
                whole = True
                raise exists_already(out)
            unfinished = Unfinished(work, key)
            yield unfinished
            finish_folder(unfinished.folder)
            os.replace(unfinished.folder, out)
            sync(out.parent)
            whole = True
        except LexibitError as error:
            # what another copy of the file may cure, and what an earlier run finished, is kept
            earlier = unfinished is not None and unfinished.begun_before
            useless = not isinstance(error, FormatError) and not earlier
            raise
        except (OSError, SafetensorError) as error:
            if not of_the_disk(error):
                raise
            if is_new if unfinished is None else not unfinished.finished:
                raise cannot_write(out, error) from error
            raise cannot_write(out, error, f"what is finished is kept in {work}") from error
        finally:
            if whole or useless or (is_new if unfinished is None else not unfinished.finished):
                _remove(work)
            else:
                _logger.warning("%s: keeps what is finished: the same command goes on with it", work)
            lock.release()


def _locked(work: Path, out: Path) -> BaseFileLock:
    """The lock of a folder, which is made if it is not there."""
    for _ in range(_TRIES):
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock = FileLock(work / _LOCK, timeout=0)
            lock.acquire()
            return lock
        except FileNotFoundError:
            continue  # whoever had it removed it just now
        except Timeout as error:
            raise LexibitError(
                f"{out}: another process is writing it: wait for it, or choose another folder"
            ) from error
        except OSError as error:
            raise LexibitError(f"{out}: cannot be written: {error.strerror or error}") from error
    raise LexibitError(f"{out}: cannot be written: {work} comes and goes: choose another folder")


def _remove(work: Path) -> None:
    """Remove a folder whose lock is held: the lock last, as whoever takes it next may begin at once."""
    shutil.rmtree(work / _FOLDER, ignore_errors=True)
    with suppress(OSError):
        (work / _JOURNAL).unlink(missing_ok=True)
        (work / _LOCK).unlink(missing_ok=True)
        work.rmdir()
