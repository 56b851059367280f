"""Finished weights in a folder, so that a calibration that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexibit import format
from lexibit.calibration.report import Calibrated
from lexibit.calibration.route import Stage
from lexibit.errors import LexibitError
from lexibit.files import replacing, write_json
from lexibit.plan import PlannedWeight
from lexibit.weight import CodebookWeight

_logger = logging.getLogger("lexibit")
_KEY = "key.json"

Done = list[tuple[PlannedWeight, CodebookWeight]]


class Kept:
    """The finished stages of a calibration.

    Args:
        folder: made if it is not there; None keeps nothing.
        key: what tells this calibration from others: a folder of another one is begun anew, and that is said.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = folder
        if folder is None:
            return
        known = folder / _KEY
        if folder.exists():
            if known.is_file() and json.loads(known.read_text("utf-8")) == {"key": key}:
                done = len(list(folder.glob("*.safetensors")))
                _logger.warning("%s: goes on from %d finished layers", folder, done)
                return
            if any(folder.iterdir()) and not known.is_file():
                raise LexibitError(
                    f"{folder}: holds something else than a calibration: choose another folder"
                )
            _logger.warning("%s: is of another model, text or configuration: begins anew", folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        write_json(known, {"key": key})

    def read(self, stage: Stage) -> tuple[Done, list[Calibrated]] | None:
        """The weights of a stage and what became of them, or None if they are not finished."""
        if self._folder is None or not self._record(stage).is_file():
            return None
        found = format.read([self._file(stage)])
        told = json.loads(self._record(stage).read_text("utf-8"))
        done: Done = []
        for planned in stage.weights:
            weight = found[planned.name]
            assert isinstance(weight, CodebookWeight)
            done.append((planned, weight))
        return done, [Calibrated(**one) for one in told]

    def write(self, stage: Stage, done: Done, told: Sequence[Calibrated]) -> None:
        """Keep a finished stage; it counts when its record is there, which comes last."""
        if self._folder is None:
            return
        with replacing(self._file(stage)) as staged:
            format.write(staged, {planned.name: weight for planned, weight in done})
        write_json(self._record(stage), [asdict(one) for one in told])

    def _file(self, stage: Stage) -> Path:
        assert self._folder is not None
        name = hashlib.sha256(stage.weights[0].name.encode()).hexdigest()[:16]
        return self._folder / f"{name}.safetensors"

    def _record(self, stage: Stage) -> Path:
        return self._file(stage).with_suffix(".json")


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
