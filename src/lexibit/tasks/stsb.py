"""STS-B: how alike are two sentences, from 0 to 5?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexibit.tasks.metrics import PEARSON, SPEARMAN
from lexibit.tasks.sentences import SentenceTask


class STSB(SentenceTask):
    """The Semantic Textual Similarity Benchmark (Cer et al. 2017) as a regression, as in GLUE."""

    name: ClassVar[str] = "sts-b"
    metrics = (PEARSON, SPEARMAN)
    least: ClassVar[int] = 3
    folder: ClassVar[str] = "STS-B"
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train.tsv", "glue_train.tsv"),
        "dev": ("dev.tsv", "glue_dev.tsv"),
    }
    columns = ("sentence1", "sentence2", "score")
    hub: ClassVar[tuple[str, str | None]] = ("nyu-mll/glue", "stsb")
    hub_columns: ClassVar[tuple[str, ...]] = ("sentence1", "sentence2", "label")
    labels = ()
