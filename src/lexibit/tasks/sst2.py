"""SST-2: does a sentence of a film review like the film?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexibit.tasks.metrics import ACCURACY
from lexibit.tasks.sentences import SentenceTask


class SST2(SentenceTask):
    """The Stanford Sentiment Treebank (Socher et al. 2013), in two classes, as in GLUE."""

    name: ClassVar[str] = "sst-2"
    metrics = (ACCURACY,)
    folder: ClassVar[str] = "SST-2"
    columns = ("sentence", "label")
    hub: ClassVar[tuple[str, str | None]] = ("nyu-mll/glue", "sst2")
    labels = ("negative", "positive")
    spellings: ClassVar[Mapping[str, str]] = {"0": "negative", "1": "positive"}
