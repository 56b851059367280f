"""QQP: do two questions ask the same?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexibit.tasks.metrics import ACCURACY, F1
from lexibit.tasks.sentences import SentenceTask


class QQP(SentenceTask):
    """Quora Question Pairs, as in GLUE."""

    name: ClassVar[str] = "qqp"
    metrics = (ACCURACY, F1)
    folder: ClassVar[str] = "QQP"
    columns = ("question1", "question2", "is_duplicate")
    hub: ClassVar[tuple[str, str | None]] = ("nyu-mll/glue", "qqp")
    hub_columns: ClassVar[tuple[str, ...]] = ("question1", "question2", "label")
    labels = ("not_duplicate", "duplicate")
    spellings: ClassVar[Mapping[str, str]] = {"0": "not_duplicate", "1": "duplicate"}
