"""Finished weights in a folder, so that a calibration that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexibit import format
from lexibit.calibration.report import Calibrated
from lexibit.errors import LexibitError
from lexibit.files import replacing, write_json
from lexibit.plan import PlannedWeight
from lexibit.weight import CodebookWeight

_logger = logging.getLogger("lexibit")
_KEY = "key.json"

_OURS = re.compile(r"key\.json|[0-9a-f]{16}\.(json|safetensors)")

Weights = list[tuple[PlannedWeight, CodebookWeight]]
Done = tuple[Weights, list[Calibrated]]


class Kept:
    """The finished stages and blocks of a calibration.

    Args:
        folder: made if it is not there; None keeps nothing.
        key: what tells this calibration from others: a folder of another one is begun anew, and that is said.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = folder
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [path for path in folder.iterdir() if path.suffix != ".part"]
        except OSError as error:
            raise LexibitError(
                f"{folder}: cannot keep what is finished: {error.strerror or error}"
            ) from error
        if strange := [path.name for path in found if not _OURS.fullmatch(path.name)]:
            raise LexibitError(
                f"{folder}: holds something else than a calibration, like {strange[0]}: choose another folder"
            )
        if found and _read_json(folder / _KEY) == {"key": key}:
            done = sum(path.suffix == ".json" for path in found) - 1
            _logger.warning("%s: goes on from %d finished pieces", folder, done)
            return
        if found:
            _logger.warning("%s: is of another model, text or configuration: begins anew", folder)
        for path in found:
            path.unlink()
        write_json(folder / _KEY, {"key": key})

    def read(self, unit: str, planned: Sequence[PlannedWeight]) -> Done | None:
        """The weights of a unit of work and what became of them; None if it is not finished, or damaged."""
        if self._folder is None or not self._record(unit).is_file():
            return None
        try:
            found = format.read([self._file(unit)])
            told = [Calibrated(**one) for one in json.loads(self._record(unit).read_text("utf-8"))]
            weights = [found[one.name] for one in planned]
            names = [one.name for one in told]
        except (LexibitError, OSError, ValueError, TypeError, KeyError) as error:
            _logger.warning("%s: is damaged (%s): done anew", self._file(unit), error)
            return None
        whole = all(
            isinstance(weight, CodebookWeight) and weight.spec == one.spec
            for one, weight in zip(planned, weights, strict=True)
        )
        if not whole or names != [one.name for one in planned]:
            _logger.warning("%s: is of other weights: done anew", self._file(unit))
            return None
        done = [
            (one, weight)
            for one, weight in zip(planned, weights, strict=True)
            if isinstance(weight, CodebookWeight)
        ]
        return done, told

    def write(self, unit: str, done: Weights, told: Sequence[Calibrated]) -> None:
        """Keep a finished unit of work; it counts when its record is there, which comes last."""
        if self._folder is None:
            return
        with replacing(self._file(unit)) as staged:
            format.write(staged, {planned.name: weight for planned, weight in done})
        write_json(self._record(unit), [asdict(one) for one in told])

    def _file(self, unit: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(unit.encode()).hexdigest()[:16]}.safetensors"

    def _record(self, unit: str) -> Path:
        return self._file(unit).with_suffix(".json")


def _read_json(file: Path) -> Any:
    """What a file says; None if it is no JSON."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def digest(*parts: Any) -> str:
    """What tells some tensors, texts and numbers from others, in hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {list(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            found.update(repr(part).encode())
    return found.hexdigest()
