"""Tasks on one sentence or two: which class they are of, or how much of something they have."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from lexibit import checkpoint
from lexibit.batches import batches, give_padding, longest
from lexibit.errors import LexibitError, unknown
from lexibit.nn.modes import evaluating
from lexibit.tasks import tables
from lexibit.tasks.base import Examples, Features, Trainable, named
from lexibit.tasks.metrics import Outcomes
from lexibit.tasks.tables import Row


class Example(NamedTuple):
    """One or two texts, and the name of their class, or their value."""

    texts: tuple[str, ...]
    label: str | float


class SentenceTask(Trainable):
    """Classification, or regression, of one sentence or a pair.

    A task of GLUE (Wang et al. 2018) says where its files are and what their columns are called; labels
    are in the order of GLUE.

    Attributes:
        folder: the sub-folder that the official data has.
        files: by split, the file's possible names (shell patterns).
        columns: the names of the columns of texts, and last of the label, in the file.
        header: all columns of a file that does not name them.
        hub: data set and subset on the hub.
        hub_columns: the names of the columns there, if they are others.
        hub_splits: by split, what it is called on the hub.
        labels: the names of the classes, none for regression.
        spellings: how labels may be written in a file.
    """

    folder: ClassVar[str] = ""
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("train.tsv",), "dev": ("dev.tsv",)}
    columns: tuple[str, ...]
    header: ClassVar[tuple[str, ...] | None] = None
    hub: ClassVar[tuple[str, str | None]]
    hub_columns: ClassVar[tuple[str, ...]] = ()
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "dev": "validation"}
    labels: tuple[str, ...]
    spellings: ClassVar[Mapping[str, str]] = {}

    def read(self, data: Path | None, split: str) -> Examples:
        """Texts and labels; see :meth:`Task.read`."""
        if split not in self.files:
            raise unknown("split", split, self.files)
        if data is None:
            rows = tables.from_hub(*self.hub, self.hub_splits[split])
            return self._examples(self.hub[0], rows, self.hub_columns or self.columns)
        file = tables.find(data, self.files[split], [self.folder])
        if file is None:
            names = " or ".join(self.files[split])
            raise LexibitError(
                f"{data}: no {names} in it, nor in its folder {self.folder}: {self.name} needs it as its "
                f"{split} split"
            )
        return self._examples(str(file), tables.read(file, header=self.header), self.columns)

    def _examples(self, where: str, rows: list[Row], columns: Sequence[str]) -> list[Example]:
        *names, label = columns
        texts = [tables.column(where, rows, name) for name in names]
        labels = tables.column(where, rows, label)
        return [
            Example(tuple(map(str, some)), self._label(f"{where}: row {number}", value))
            for number, (some, value) in enumerate(zip(zip(*texts, strict=True), labels, strict=True), 1)
        ]

    def _label(self, where: str, value: Any) -> str | float:
        if not self.labels:
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise LexibitError(f"{where}: its label {value!r} is no number, which {self.name} needs")
            return number
        if isinstance(value, int) and 0 <= value < len(self.labels):
            return self.labels[value]
        name = self.spellings.get(str(value), str(value))
        if name not in self.labels:
            known = [*self.labels, *self.spellings]
            raise LexibitError(
                f"{where}: its label {value!r} is none of {self.name}'s: {', '.join(known[:20])}"
            )
        return name

    def _classes(self, examples: Examples) -> Sequence[str]:
        """The names of the classes that a model is to learn from examples, none for regression."""
        return self.labels

    def model(self, folder: Path, examples: Examples) -> PreTrainedModel:
        """The model with a head for as many classes; see :meth:`Trainable.model`."""
        classes = self._classes(examples)
        # of one label transformers makes a regression, with the squared error for a loss
        names = dict(enumerate(classes)) or {0: "LABEL_0"}
        return checkpoint.load_with_head(
            folder,
            "AutoModelForSequenceClassification",
            id2label=names,
            label2id={name: number for number, name in names.items()},
            problem_type="single_label_classification" if classes else "regression",
        )

    def features(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
    ) -> Sequence[Features]:
        """Tokens and label; see :meth:`Trainable.features`."""
        places = self._places(model)
        labels = _numbers(model, examples, places)
        texts = [example.texts for example in examples]
        tokens = tokenizer(
            *map(list, zip(*texts, strict=True)), truncation=True, max_length=longest(model, tokenizer)
        )
        taken = inspect.signature(model.forward).parameters
        names = [name for name in tokens if name in taken]
        return [
            {name: tokens[name][index] for name in names} | {"labels": label}
            for index, label in enumerate(labels)
        ]

    def collate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[Features]], Mapping[str, Tensor]]:
        """Padding to the longest; see :meth:`Trainable.collate`."""
        give_padding(tokenizer)
        return DataCollatorWithPadding(tokenizer)

    def check_teacher(self, model: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse one of other classes, or in another order; see :meth:`Trainable.check_teacher`."""
        ours, theirs = self._places(model), self._places(teacher)
        if ours != theirs:
            raise LexibitError(
                f"the teacher {named(teacher)} has the classes {', '.join(_in_order(theirs))}, the model "
                f"{', '.join(_in_order(ours))}: give a teacher with the same ones in the same order"
            )

    def outcomes(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Outcomes:
        """Prediction and label of every example; see :meth:`Task.outcomes`.

        Classes by their number in the task's own order; a prediction of none is -1.
        """
        places = self._places(model)
        wanted = max(len(places), 1)
        found = np.empty((len(examples), 2))
        found[:, 1] = _numbers(model, examples, {name: number for number, name in enumerate(places)})
        texts = [example.texts for example in examples]
        with evaluating(model), torch.inference_mode():
            for chosen, inputs in batches(model, tokenizer, texts, size=batch_size, progress=progress):
                logits = getattr(model(**inputs), "logits", None)
                if not isinstance(logits, Tensor) or logits.shape != (len(chosen), wanted):
                    raise LexibitError(
                        f"{named(model)} gives no logits of {wanted} classes a text, which "
                        f"{self.name} needs: train one with lexibit finetune"
                    )
                if places:
                    # the model's own order of classes may be another; NaN is no class
                    of_class = logits[:, list(places.values())].float()
                    predicted = of_class.argmax(-1).masked_fill(of_class.isnan().any(-1), -1)
                else:
                    predicted = logits[:, 0].float()
                found[chosen, 0] = predicted.cpu().numpy()
        return found

    def _places(self, model: PreTrainedModel) -> dict[str, int]:
        """Where the model's logits have each class, in the task's own order; empty for regression."""
        wanted = max(len(self.labels), 1)
        theirs = dict(getattr(model.config, "id2label", None) or {})
        if len(theirs) != wanted:
            raise LexibitError(
                f"{named(model)} has {len(theirs)} classes, {self.name} has {wanted}: train a model for it "
                "with lexibit finetune"
            )
        names = [str(theirs[place]).casefold() for place in sorted(theirs)]
        ours = [label.casefold() for label in self.labels]
        if not ours or names == [f"label_{place}" for place in range(wanted)]:
            return {label: place for place, label in enumerate(self.labels)}
        if sorted(names) != sorted(ours):
            raise LexibitError(
                f"{named(model)} has the classes {', '.join(map(str, theirs.values()))}, {self.name} has "
                f"{', '.join(self.labels)}: train a model for it with lexibit finetune, or, if these are "
                "other names for the same, set id2label in its config.json"
            )
        return {label: names.index(folded) for label, folded in zip(self.labels, ours, strict=True)}


def _in_order(places: Mapping[str, int]) -> list[str]:
    return sorted(places, key=lambda name: places[name])


def _numbers(model: PreTrainedModel, examples: Examples, numbers: Mapping[str, int]) -> list[int | float]:
    """The examples' labels as numbers: of their class, or what they are if there are no classes.

    Raises:
        LexibitError: the model has no such class.
    """
    if not numbers:
        return [float(example.label) for example in examples]
    for example in examples:
        if example.label not in numbers:
            raise LexibitError(
                f"{named(model)} has no class {example.label!r}, which the data has; its classes are "
                f"{', '.join(list(numbers)[:20])}: train it on data with this label, or correct id2label in "
                "its config.json"
            )
    return [numbers[example.label] for example in examples]
