"""The folder of a study: what its steps made, and its results, a data set of Parquet files."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from lexibit.errors import LexibitError
from lexibit.files import replacing, to_json, write_json
from lexibit.study import digests
from lexibit.study.steps import Step

if TYPE_CHECKING:
    import pandas as pd

_logger = logging.getLogger("lexibit")

_STUDY, _RECORD, _WEIGHTS, _DIGEST = "study.json", "step.json", "weights.json", b"lexibit.digest"

# the folders of steps whose files this process found whole
_whole: set[Path] = set()

SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("study", pa.string()),
        ("model", pa.string()),
        ("task", pa.string()),
        ("scheme", pa.string()),
        ("bits", pa.int64()),
        ("groups", pa.string()),
        ("importance", pa.string()),
        ("tuned", pa.bool_()),
        ("seed", pa.int64()),
        ("metric", pa.string()),
        ("score", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("higher", pa.bool_()),
        ("examples", pa.int64()),
        ("split", pa.string()),
        ("bytes", pa.int64()),
        ("parameters", pa.int64()),
        ("bits_per_weight", pa.float64()),
        ("bits_per_parameter", pa.float64()),
        ("finetune_seconds", pa.float64()),
        ("quantize_seconds", pa.float64()),
        ("tune_seconds", pa.float64()),
        ("evaluate_seconds", pa.float64()),
        ("peak_memory", pa.int64()),
        ("model_key", pa.string()),
        ("commands", pa.string()),
        ("versions", pa.string()),
        ("machine", pa.string()),
        ("at", pa.string()),
        ("error", pa.string()),
    ]
)
"""The columns of the results; docs/studies.md says what each is."""


class Store:
    """A study's folder.

    Attributes:
        folder: holds ``study.json``, ``steps`` (a folder each), ``results`` (a Parquet file a cell) and
            ``locks``.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder; nothing is made yet."""
        self.folder = folder.absolute()
        self.steps = self.folder / "steps"
        self.results = self.folder / "results"
        self._locks = self.folder / "locks"

    def begin(self, about: Mapping[str, Any]) -> None:
        """Make the folder, and note whose it is.

        Raises:
            LexibitError: it is the folder of something else, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self.folder.iterdir() if not path.name.startswith(f".{_STUDY}.")}
            if names - {_STUDY, "steps", "results", "locks"}:
                raise LexibitError(f"{self.folder}: holds something else than a study: choose another folder")
            for folder in (self.steps, self.results, self._locks):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise LexibitError(f"{self.folder}: cannot be written: {error.strerror or error}") from error
        write_json(self.folder / _STUDY, about)

    @contextmanager
    def claimed(self, step: Step) -> Iterator[bool]:
        """Whether a step is this process's to do: False if another process is at it."""
        lock = FileLock(self._locks / step.name, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def begin_step(self, step: Step) -> None:
        """Make a step's folder; what an earlier run of the same command left in it is gone on with."""
        folder = self.steps / step.name
        folder.mkdir(exist_ok=True)
        out = step.out(self.steps)
        if (folder / _RECORD).exists():
            # what was noted is not what is there
            (folder / _RECORD).unlink()
            (folder / _WEIGHTS).unlink(missing_ok=True)
            if out.is_dir():
                shutil.rmtree(out)
            out.unlink(missing_ok=True)
        words = step.words(self.steps)
        for said in [*folder.glob("*.training/run.json"), *folder.glob("*/*.training/run.json")]:
            # training goes on only from what it calls the same: the same content elsewhere begins anew
            if any(_named(said, place) not in (None, *words) for place in ("model", "data", "teacher")):
                shutil.rmtree(said.parent)

    def finish_step(self, step: Step, record: Mapping[str, Any]) -> None:
        """Note that a step is done, with the checksums of what it made."""
        folder = self.steps / step.name
        write_json(folder / _RECORD, dict(record) | {"files": _checksums(step.out(self.steps))})
        _whole.add(folder)

    def weights_file(self, step: Step) -> Path:
        """Where what is known of each weight of a step's model stands (:func:`weights`)."""
        return self.steps / step.name / _WEIGHTS

    def record(self, step: Step) -> dict[str, Any]:
        """What was noted of a step that is done."""
        found: dict[str, Any] = json.loads((self.steps / step.name / _RECORD).read_text(encoding="utf-8"))
        return found

    def is_done(self, step: Step) -> bool:
        """Whether a step was done, and all that it made is there and whole."""
        if self.steps / step.name in _whole:
            return True
        try:
            files = self.record(step)["files"]
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            files = None
        if files is None or files != _checksums(step.out(self.steps)):
            _logger.warning("%s: is damaged, and made anew", self.steps / step.name)
            return False
        _whole.add(self.steps / step.name)
        return True

    def scores(self, step: Step) -> dict[str, Any]:
        """What an evaluation measured."""
        found: dict[str, Any] = json.loads(step.out(self.steps).read_text(encoding="utf-8"))
        return found

    def write_rows(self, cell: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a cell.

        Raises:
            LexibitError: they cannot be written.
        """
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
        table = table.replace_schema_metadata({_DIGEST: _digest(table)})
        with replacing(self.results / f"{cell}.parquet") as staged:
            pq.write_table(table, staged)

    def read_rows(self, cell: str) -> list[dict[str, Any]] | None:
        """The rows of a cell; None if there are none, or the file is damaged."""
        table = _read(self.results / f"{cell}.parquet")
        if table is None:
            return None
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows


def is_study(folder: str | Path) -> bool:
    """Whether a folder is a study's."""
    return (Path(folder) / _STUDY).is_file()


def about(folder: str | Path) -> dict[str, Any]:
    """What is said of a study: its name, about, published, and its cells in their order.

    Raises:
        LexibitError: it is no study's folder, or cannot be read.
    """
    folder = Path(folder)
    try:
        found = json.loads((folder / _STUDY).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LexibitError(f"{folder}: is no study's folder: 'lexibit study run FILE' makes one") from error
    except (OSError, ValueError) as error:
        raise LexibitError(f"{folder / _STUDY}: cannot be read ({error}): run the study again") from error
    if not isinstance(found, dict) or not isinstance(found.get("cells", []), list):
        raise LexibitError(f"{folder / _STUDY}: is none of a study: run the study again")
    return {"name": folder.name, "about": "", "published": None, "cells": []} | found


def results(folder: str | Path) -> pd.DataFrame:
    """The results of a study: a line for each cell and metric, in the order of the study.

    Cells of what the study asked for before, and no longer, are not among them. Files that are damaged are
    left out, and that is said: the next run makes them anew.

    Raises:
        LexibitError: it is no study's folder.
    """
    tables = []
    for cell in about(folder)["cells"]:
        file = Path(folder) / "results" / f"{cell}.parquet"
        table = _read(file)
        if table is not None:
            tables.append(table.replace_schema_metadata(None))
        elif file.exists():
            _logger.warning("%s: is damaged, and left out: run the study again", file)
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    return table.to_pandas()


def weights(folder: str | Path, model: str) -> list[dict[str, Any]] | None:
    """What is known of each weight of a quantized model, by the ``model_key`` of its row.

    Returns:
        As :func:`lexibit.description.describe`; None if it is not there.
    """
    try:
        found: list[dict[str, Any]] = json.loads(
            (Path(folder) / "steps" / model / _WEIGHTS).read_text("utf-8")
        )
    except (OSError, ValueError):
        return None
    return found


def _read(file: Path) -> pa.Table | None:
    """A file of results; None if it is not there, or not what was written, or another cell's."""
    try:
        table = pq.read_table(file, memory_map=False)
        whole = (table.schema.metadata or {}).get(_DIGEST) == _digest(table)
        whole &= set(table["cell"].to_pylist()) == {file.stem}
    except (OSError, pa.ArrowException, ValueError, KeyError):
        return None
    return table if whole and table.schema.equals(SCHEMA) else None


def _named(said: Path, place: str) -> str | None:
    """What training that was interrupted says that it worked on."""
    try:
        value = json.loads(said.read_text(encoding="utf-8")).get(place)
    except (OSError, ValueError, AttributeError):
        return None
    return None if value is None else str(value)


def _digest(table: pa.Table) -> bytes:
    return hashlib.sha256(to_json(table.to_pylist()).encode()).hexdigest().encode()


def _checksums(out: Path) -> dict[str, str] | None:
    """The digest of every file that a step made; None if there are none."""
    if out.is_file():
        return {out.name: digests.of_file(out)}
    if not out.is_dir():
        return None
    files = sorted(file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): digests.of_file(file) for file in files}
