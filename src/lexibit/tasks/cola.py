"""CoLA: is a sentence good English?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexibit.tasks.metrics import MATTHEWS
from lexibit.tasks.sentences import SentenceTask


class CoLA(SentenceTask):
    """The Corpus of Linguistic Acceptability (Warstadt et al. 2019), as in GLUE."""

    name: ClassVar[str] = "cola"
    metrics = (MATTHEWS,)
    folder: ClassVar[str] = "CoLA"
    header: ClassVar[tuple[str, ...] | None] = ("source", "label", "mark", "sentence")
    columns = ("sentence", "label")
    hub: ClassVar[tuple[str, str | None]] = ("nyu-mll/glue", "cola")
    labels = ("unacceptable", "acceptable")
    spellings: ClassVar[Mapping[str, str]] = {"0": "unacceptable", "1": "acceptable"}
