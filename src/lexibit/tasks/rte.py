"""RTE: does one sentence follow from another?"""

from __future__ import annotations

from typing import ClassVar

from lexibit.tasks.metrics import ACCURACY
from lexibit.tasks.sentences import SentenceTask


class RTE(SentenceTask):
    """Recognizing Textual Entailment, three years of it (Dagan et al. 2006 and later), as in GLUE."""

    name: ClassVar[str] = "rte"
    metrics = (ACCURACY,)
    folder: ClassVar[str] = "RTE"
    columns = ("sentence1", "sentence2", "label")
    hub: ClassVar[tuple[str, str | None]] = ("nyu-mll/glue", "rte")
    labels = ("entailment", "not_entailment")
