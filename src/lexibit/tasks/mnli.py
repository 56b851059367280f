"""MNLI: does one sentence follow from another, contradict it, or neither?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lexibit.tasks.metrics import ACCURACY
from lexibit.tasks.sentences import SentenceTask


class MNLI(SentenceTask):
    """Multi-Genre Natural Language Inference (Williams et al. 2018), as in GLUE, on genres that match."""

    name: ClassVar[str] = "mnli"
    metrics = (ACCURACY,)
    folder: ClassVar[str] = "MNLI"
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train.tsv",),
        "dev": ("dev_matched.tsv", "dev_matched*.tsv"),
    }
    columns = ("sentence1", "sentence2", "gold_label")
    hub: ClassVar[tuple[str, str | None]] = ("nyu-mll/glue", "mnli")
    hub_columns: ClassVar[tuple[str, ...]] = ("premise", "hypothesis", "label")
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "dev": "validation_matched"}
    labels = ("entailment", "neutral", "contradiction")


class MNLIMismatched(MNLI):
    """MNLI evaluated on genres that are not those of the training set."""

    name: ClassVar[str] = "mnli-mm"
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train.tsv",),
        "dev": ("dev_mismatched.tsv", "dev_mismatched*.tsv"),
    }
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "dev": "validation_mismatched"}
