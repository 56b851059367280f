"""A folder in the making: what is finished of it outlives a kill, and the next run goes on from there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lexibit.errors import FormatError, LexibitError
from lexibit.files import CANNOT_WRITE, exists_already, finish_folder, occupied, sync

_logger = logging.getLogger("lexibit")
_JOURNAL, _LOCK, _FOLDER = "journal.jsonl", "lock", "folder"


class Unfinished:
    """What :func:`unfinished` gives.

    Attributes:
        folder: where to write; it holds what an earlier run wrote.
        finished: the tensors that earlier runs finished, and their checksums.
    """

    def __init__(self, work: Path, key: str) -> None:
        """Take up what is there, or begin anew if it has another key."""
        self.folder = work / _FOLDER
        self.finished: dict[str, str] = {}
        self._journal = work / _JOURNAL
        lines = _lines(self._journal)
        if self.folder.is_dir() and lines[:1] == [{"key": key}]:
            for line in lines[1:]:
                self.finished |= line
            return
        if self._journal.exists():
            _logger.warning("%s: is of another model, configuration or version: begins anew", work)
        self._journal.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._append({"key": key})

    def finish(self, checksums: Mapping[str, str]) -> None:
        """Note tensors that are written."""
        self.finished |= checksums
        self._append(checksums)

    def _append(self, line: Mapping[str, str]) -> None:
        with self._journal.open("ab") as file:
            # a line that a kill cut short ends here; what it said is done again
            end = b"\n" if file.tell() and not _ends_in_newline(self._journal) else b""
            file.write(end + json.dumps(line).encode() + b"\n")


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


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


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
    if occupied(out):
        raise exists_already(out)
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    work = out.with_name(f".{out.name}.unfinished")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / _LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise LexibitError(
            f"{out}: another process is writing it: wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise LexibitError(f"{out}: cannot be written: {error.strerror or error}") from error
    unfinished: Unfinished | None = None
    whole = useless = False
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
        useless = not isinstance(error, FormatError)  # which another copy of the file may cure
        raise
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        kept = f"what is finished is kept in {work}" if _keeps(unfinished) else "nothing was left there"
        raise LexibitError(
            f"{out}: cannot be written ({error}): free some space or choose another disk; {kept}"
        ) from error
    finally:
        if whole or useless or not _keeps(unfinished):
            shutil.rmtree(work, ignore_errors=True)
            for parent in made:
                try:
                    parent.rmdir()
                except OSError:
                    break  # it holds the finished folder
        else:
            _logger.warning("%s: keeps what is finished: the same command goes on with it", work)
        lock.release()


def _keeps(unfinished: Unfinished | None) -> bool:
    return unfinished is not None and bool(unfinished.finished)
