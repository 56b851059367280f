"""Scores that ``lexibit evaluate --out`` wrote, read again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexibit.errors import LexibitError


@dataclass(frozen=True)
class ScoreLine:
    """A model's score on a task.

    Attributes:
        model: as it was named to ``lexibit evaluate``, without the folders above it.
        task, split, metric: what was measured, and on which examples.
        value: the score.
        low, high: its 95 % interval; NaN without one.
        examples: how many.
        higher: whether more is better.
    """

    model: str
    task: str
    split: str
    metric: str
    value: float
    low: float
    high: float
    examples: int
    higher: bool

    @property
    def text(self) -> str:
        """The score and its interval for people."""
        if not math.isfinite(self.value):
            return "none"
        interval = f" ({self.low:.2f} to {self.high:.2f})" if math.isfinite(self.low + self.high) else ""
        return f"{self.value:.2f}{interval}"


def read_scores(file: Path) -> list[ScoreLine]:
    """The scores in a JSON file of ``lexibit evaluate --out``.

    Raises:
        LexibitError: it cannot be read, or is no such file.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        lines = [
            ScoreLine(
                model=Path(model).name,
                task=str(document["task"]),
                split=str(document["split"]),
                metric=str(score["metric"]),
                value=_number(score["value"]),
                low=_number(score["low"]),
                high=_number(score["high"]),
                examples=int(score["examples"]),
                higher=bool(score["higher"]),
            )
            for model, scores in document["scores"].items()
            for score in scores
        ]
    except OSError as error:
        raise LexibitError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LexibitError(
            f"{file}: holds no scores ({error}): give a file that lexibit evaluate --out wrote"
        ) from error
    return lines


def _number(value: Any) -> float:
    """What is no number stands as null in JSON."""
    return math.nan if value is None else float(value)
