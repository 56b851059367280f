"""QNLI: does a sentence hold the answer to a question?"""

from __future__ import annotations

from typing import ClassVar

from lexibit.tasks.metrics import ACCURACY
from lexibit.tasks.sentences import SentenceTask


class QNLI(SentenceTask):
    """Question answering as inference, made of SQuAD (Wang et al. 2018), as in GLUE."""

    name: ClassVar[str] = "qnli"
    metrics = (ACCURACY,)
    folder: ClassVar[str] = "QNLI"
    columns = ("question", "sentence", "label")
    hub: ClassVar[tuple[str, str | None]] = ("nyu-mll/glue", "qnli")
    labels = ("entailment", "not_entailment")
