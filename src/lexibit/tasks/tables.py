"""Examples in rows or lines: files of the official data sets, a user's own, and the hub's."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lexibit.errors import LexibitError, needs_extra

Row = dict[str, Any]

SUFFIXES = (".tsv", ".csv", ".json", ".jsonl")


def find(data: Path, names: Iterable[str], folders: Iterable[str] = ()) -> Path | None:
    """The first file that is there of some names (shell patterns), in a folder or its sub-folders.

    Raises:
        LexibitError: there is no such folder.
    """
    if not data.is_dir():
        raise LexibitError(f"{data}: no such folder: name with --data the folder that has the task's data")
    for name in names:
        for folder in (data, *(data / folder for folder in folders)):
            for found in sorted(folder.glob(name)):
                if found.is_file():
                    return found
    return None


def read(file: Path, *, header: Sequence[str] | None = None, quoted: bool | None = None) -> list[Row]:
    """The rows of a file by column: .tsv, .csv, .json (a list of objects) or .jsonl (one a line).

    Args:
        file: UTF-8, with or without a byte-order mark.
        header: the names of the columns, for a file that does not have them in its first line.
        quoted: whether double quotes enclose texts; only in .csv if not given.

    Raises:
        LexibitError: it cannot be read, or a row has fewer columns than its header.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            if file.suffix == ".jsonl":
                rows = [json.loads(line) for line in opened if line.strip()]
            elif file.suffix == ".json":
                rows = json.load(opened)
            else:
                return _separated(file, list(_lines(opened, file, quoted)), header)
    except LexibitError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise LexibitError(f"{file}: cannot be read as {file.suffix[1:]} in UTF-8: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LexibitError(f"{file}: must hold a list of objects, a row each")
    return rows


def _lines(opened: Iterable[str], file: Path, quoted: bool | None) -> Iterable[list[str]]:
    comma = file.suffix == ".csv" if quoted is None else quoted
    return csv.reader(
        opened,
        delimiter="," if file.suffix == ".csv" and comma else "\t",
        quoting=csv.QUOTE_MINIMAL if comma else csv.QUOTE_NONE,
    )


def _separated(file: Path, lines: list[list[str]], header: Sequence[str] | None) -> list[Row]:
    first = 1
    if header is None:
        if not lines:
            raise LexibitError(f"{file}: is empty: its first line must name the columns")
        header, lines, first = lines[0], lines[1:], 2
    rows = []
    for number, line in enumerate(lines, first):
        if not line:
            continue
        if len(line) < len(header):
            raise LexibitError(
                f"{file}: row {number} has {len(line)} columns, not {len(header)}: {', '.join(header)}"
            )
        rows.append(dict(zip(header, line, strict=False)))
    return rows


def lines(file: Path) -> list[str]:
    """The lines of a text file, which may be compressed.

    Raises:
        LexibitError: it cannot be read.
    """
    try:
        stored = file.read_bytes()
        text = (gzip.decompress(stored) if file.suffix == ".gz" else stored).decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise LexibitError(f"{file}: cannot be read as text in UTF-8: {error}") from error
    # no other of Unicode's line ends ends a line: WikiText has some within, and pairs of files go by lines
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def from_hub(name: str, subset: str | None, split: str) -> list[Row]:
    """The rows of a data set on the Hugging Face hub.

    Raises:
        LexibitError: the hub does not give it.
    """
    with needs_extra("tasks"):
        import datasets
    try:
        return list(datasets.load_dataset(name, subset, split=split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LexibitError(
            f"{name}: the hub did not give this data set ({reason}): name a local folder with --data"
        ) from error


def column(where: str, rows: list[Row], name: str) -> list[Any]:
    """The values of a column.

    Raises:
        LexibitError: a row does not have it.
    """
    for number, row in enumerate(rows, 1):
        if row.get(name) is None:
            raise LexibitError(
                f"{where}: row {number} has no {name!r}: its columns are {', '.join(map(str, row))}"
            )
    return [row[name] for row in rows]
