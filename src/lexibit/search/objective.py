"""What a search makes small: a model's loss or metric on training examples, or its distance to itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit.errors import unknown
from lexibit.fidelity import Reference
from lexibit.nn.modes import evaluating
from lexibit.tasks import Examples, Trainable
from lexibit.tasks.lm import LanguageModelling

Objective = Callable[[PreTrainedModel], float]

KINDS = ("loss", "metric")


class Measured(ABC):
    """Something to make small.

    Attributes:
        name: what tables call it.
    """

    name: str

    @abstractmethod
    def __call__(self, model: PreTrainedModel) -> float:
        """Its value for a model; the model is called with the same inputs in the same order every time."""


class Loss(Measured):
    """The mean loss over training examples, without dropout; of SQuAD, over their windows.

    Of language modelling it is the negative log-likelihood of a unit, in nats, as the task counts it.

    Args:
        task: what the model is for.
        model: that will be measured, or one with the same configuration.
        tokenizer: its own.
        examples: of the task.
        batch_size: examples at a time.
    """

    def __init__(
        self,
        task: Trainable,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 32,
    ) -> None:
        self.name = "loss"
        self._task, self._tokenizer, self._examples = task, tokenizer, examples
        self._size = batch_size
        self._batches: list[Mapping[str, Tensor]] = []
        if isinstance(task, LanguageModelling):
            return
        features = list(task.features(model, tokenizer, examples))
        # texts of like length together: the shortest padding, and the same in every run
        features.sort(key=lambda feature: len(feature["input_ids"]))
        collate = task.collate(model, tokenizer)
        for start in range(0, len(features), batch_size):
            self._batches.append(collate(features[start : start + batch_size]))

    def __call__(self, model: PreTrainedModel) -> float:
        """The mean loss."""
        if not self._batches:
            outcomes = self._task.outcomes(model, self._tokenizer, self._examples, batch_size=self._size)
            nats, units = outcomes.sum(0)
            return float(nats / units)
        total, count = 0.0, 0
        with evaluating(model), torch.inference_mode():
            for batch in self._batches:
                inputs = {name: part.to(model.device) for name, part in batch.items()}
                labels = inputs.get("labels")
                # of a sequence of labels the loss is a mean over those that count
                asked = labels if labels is not None and labels.dim() > 1 else None
                weight = len(inputs["input_ids"]) if asked is None else int((asked != -100).sum())
                total += weight * float(model(**inputs).loss)
                count += weight
        return total / count


class Metric(Measured):
    """A task's first metric on training examples, its sign turned if more is better."""

    def __init__(
        self,
        task: Trainable,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 32,
    ) -> None:
        self._metric = task.metrics[0]
        self.name = f"-{self._metric.name}" if self._metric.higher else self._metric.name
        self._task, self._tokenizer, self._examples = task, tokenizer, examples
        self._size = batch_size

    def __call__(self, model: PreTrainedModel) -> float:
        """The metric."""
        outcomes = self._task.outcomes(model, self._tokenizer, self._examples, batch_size=self._size)
        value = self._metric.of(outcomes)
        return -value if self._metric.higher else value


class Distance(Measured):
    """How far a model's outputs on text are from the float model's: ``|A - B|^2 / |A|^2``."""

    def __init__(self, reference: Reference) -> None:
        self.name, self._reference = "distance of the outputs", reference

    def __call__(self, model: PreTrainedModel) -> float:
        """The distance."""
        return self._reference.fidelity(model).relative


def on_task(
    kind: str,
    task: Trainable,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    batch_size: int = 32,
) -> Measured:
    """The loss or the metric on some examples.

    Raises:
        LexibitError: another kind, or a model that is not for the task.
    """
    if kind == "loss":
        return Loss(task, model, tokenizer, examples, batch_size=batch_size)
    if kind == "metric":
        return Metric(task, tokenizer, examples, batch_size=batch_size)
    raise unknown("objective", kind, KINDS)
