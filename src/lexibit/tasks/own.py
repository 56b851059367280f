"""A user's own data: classes, or values, of texts or of pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from lexibit.errors import LexibitError, unknown
from lexibit.tasks import tables
from lexibit.tasks.base import Examples, named
from lexibit.tasks.metrics import ACCURACY, MACRO_F1, PEARSON, SPEARMAN
from lexibit.tasks.sentences import SentenceTask

# what each split's file may be called, the first that is there
_FILES = {"train": ("train",), "dev": ("dev", "validation", "valid", "test"), "test": ("test",)}
_LABEL_COLUMNS = ("label", "labels", "score", "target")
_TEXT_COLUMNS = (
    ("text",),
    ("sentence",),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "text"),
    ("question", "answer"),
    ("premise", "hypothesis"),
)


class _OwnData(SentenceTask):
    """Data in tables: .csv, .tsv (without quoting), .json (a list of objects) or .jsonl (an object a line).

    A folder has ``train.*``, and ``dev.*`` (or ``validation.*``, ``valid.*`` or ``test.*``, in this order).
    One file alone evaluates, and does not train: it would be training and evaluation data at once.

    Columns go by their names: ``label`` (or ``labels``, ``score``, ``target``), and ``text``, ``sentence`` or
    a pair such as ``sentence1`` and ``sentence2``. What else there is is left alone.
    """

    columns = ()
    labels = ()

    def read(self, data: Path | None, split: str) -> Examples:
        """Texts and labels; see :meth:`Task.read`.

        Raises:
            LexibitError: also where it is not clear which file or column is meant.
        """
        if data is None:
            raise LexibitError(f"{self.name} is on your own data: name its folder, or file, with --data")
        file = _file(data, split)
        rows: list[tables.Row] = tables.read(file)
        return self._examples(str(file), rows, _columns(file, list(rows[0]))) if rows else []


class Classification(_OwnData):
    """Classes of a user's own texts, or pairs of texts.

    A model is trained on the classes of its training data, in order of their names, and keeps their names in
    ``config.json``, by which it is evaluated.
    """

    name: ClassVar[str] = "classification"
    metrics = (ACCURACY, MACRO_F1)

    def _label(self, where: str, value: Any) -> str:
        if not isinstance(value, str | int) or not str(value).strip():
            raise LexibitError(
                f"{where}: its label {value!r} is no class: give a text or a whole number (the task "
                "regression takes any number)"
            )
        return str(value)

    def _classes(self, examples: Examples) -> Sequence[str]:
        classes = sorted({example.label for example in examples})
        if len(classes) < 2:
            raise LexibitError(
                f"all {len(examples)} labels to train on are {classes[0]!r}: {self.name} needs two classes "
                "or more"
            )
        return classes

    def _places(self, model: PreTrainedModel) -> dict[str, int]:
        theirs = dict(getattr(model.config, "id2label", None) or {})
        names = {place: str(theirs[place]) for place in sorted(theirs)}
        distinct = len(set(names.values()))
        if distinct < max(len(names), 2):
            raise LexibitError(
                f"{named(model)} has {distinct} classes by name, {self.name} needs two or more: "
                "train a model for it with lexibit finetune"
            )
        if all(name == f"LABEL_{place}" for place, name in names.items()):
            # what transformers calls classes without names: their numbers name them
            names = {place: str(place) for place in names}
        return {name: place for place, name in names.items()}


class Regression(_OwnData):
    """Values of a user's own texts, or pairs of texts."""

    name: ClassVar[str] = "regression"
    metrics = (PEARSON, SPEARMAN)
    least: ClassVar[int] = 3


def _file(data: Path, split: str) -> Path:
    """The file of a split."""
    if split not in _FILES:
        raise unknown("split", split, _FILES)
    if data.is_file():
        if data.suffix not in tables.SUFFIXES:
            raise LexibitError(f"{data}: give a file that ends in {', '.join(tables.SUFFIXES)}")
        if split == "train":
            raise LexibitError(
                f"{data}: one file cannot be training and evaluation data at once: give a folder with "
                "train.* and dev.*"
            )
        return data
    if not data.is_dir():
        raise LexibitError(f"{data}: no such folder or file")
    for name in _FILES[split]:
        files = [file for suffix in tables.SUFFIXES if (file := data / (name + suffix)).is_file()]
        if len(files) > 1:
            raise LexibitError(
                f"{data}: has {' and '.join(file.name for file in files)}: leave the one that is meant"
            )
        if files:
            return files[0]
    names = " or ".join(f"{name}.*" for name in _FILES[split])
    raise LexibitError(
        f"{data}: no {names} in it, as its {split} split: add one that ends in {', '.join(tables.SUFFIXES)}"
    )


def _columns(file: Path, found: list[str]) -> tuple[str, ...]:
    """The names of the columns of texts, and last of the label."""
    shown = ", ".join(map(str, found))
    labels = [name for name in _LABEL_COLUMNS if name in found]
    if len(labels) != 1:
        raise LexibitError(
            f"{file}: its columns are {shown}: rename them so that one alone is called "
            f"{' or '.join(_LABEL_COLUMNS)}"
        )
    texts = {name for names in _TEXT_COLUMNS for name in names} & set(found)
    for names in _TEXT_COLUMNS:
        if texts == set(names):
            return (*names, *labels)
    raise LexibitError(
        f"{file}: its columns are {shown}: rename them so that the texts are called "
        f"{', or '.join(' and '.join(names) for names in _TEXT_COLUMNS)}, and no other column is"
    )
