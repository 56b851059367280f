"""MRPC: do two sentences say the same?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexibit.tasks.metrics import ACCURACY, F1
from lexibit.tasks.sentences import SentenceTask


class MRPC(SentenceTask):
    """The Microsoft Research Paraphrase Corpus (Dolan and Brockett 2005), as in GLUE."""

    name: ClassVar[str] = "mrpc"
    metrics = (ACCURACY, F1)
    folder: ClassVar[str] = "MRPC"
    columns = ("#1 String", "#2 String", "Quality")
    hub: ClassVar[tuple[str, str | None]] = ("nyu-mll/glue", "mrpc")
    hub_columns: ClassVar[tuple[str, ...]] = ("sentence1", "sentence2", "label")
    labels = ("not_equivalent", "equivalent")
    spellings: ClassVar[Mapping[str, str]] = {"0": "not_equivalent", "1": "equivalent"}
