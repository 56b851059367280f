"""What a task is: examples from files or the hub, and how good a model is on them."""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, permutation_test
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit.errors import LexibitError
from lexibit.tasks.metrics import Metric, Outcomes, quiet

Examples = Sequence[Any]
Features = dict[str, Any]

RESAMPLES = 1000
LEVEL = 0.95  # of all intervals


@dataclass(frozen=True)
class Score:
    """How good a model is on a task, by one metric.

    Attributes:
        metric: what was measured.
        value: the score.
        low, high: its 95 % interval, by bootstrap over the examples.
        examples: how many examples.
        seed: of the bootstrap.
        seconds: that the model took.
        higher: whether more is better.
    """

    metric: str
    value: float
    low: float
    high: float
    examples: int
    seed: int
    seconds: float
    higher: bool = True


@dataclass(frozen=True)
class Difference:
    """How much better or worse one model is than another on the same examples, by one metric.

    Attributes:
        metric: what was measured.
        value: the score of the one less that of the other.
        low, high: its 95 % interval, by bootstrap over the examples, both models on the same ones.
        p: of a permutation test: how often models that are alike differ as much.
    """

    metric: str
    value: float
    low: float
    high: float
    p: float


class Task(ABC):
    """A task: where its examples come from, what a model makes of each, and the metrics over these outcomes.

    Attributes:
        name: how users call it.
        metrics: what is measured; the first counts where one number is wanted.
        least: how few examples make no score.
    """

    name: ClassVar[str]
    metrics: tuple[Metric, ...]
    least: ClassVar[int] = 1

    @property
    def signature(self) -> str | None:
        """What else a score depends on, to be told with it."""
        return None

    @abstractmethod
    def read(self, data: Path | None, split: str) -> Examples:
        """All examples of a split.

        Args:
            data: a local folder; the hub if not given.
            split: ``train`` or ``dev``.

        Raises:
            LexibitError: they are not there, or not what the task needs.
        """

    def load(
        self, data: Path | None, split: str = "dev", *, limit: int | None = None, seed: int = 0
    ) -> Examples:
        """Examples to train or evaluate on.

        Args:
            data: a local folder; the hub if not given.
            split: ``train`` or ``dev``.
            limit: take a sample of that many, drawn with ``seed``, in their order; all if not given.
            seed: of the sample.

        Raises:
            LexibitError: they are not there, too few, or not what the task needs.
        """
        examples = self.read(data, split)
        if limit is not None and limit < len(examples):
            chosen = np.random.default_rng(seed).choice(len(examples), limit, replace=False)
            examples = [examples[index] for index in sorted(chosen)]
        if len(examples) < self.least:
            where = "the hub" if data is None else data
            raise LexibitError(
                f"{where}: {len(examples)} {split} examples are too few for {self.name}: give "
                f"{self.least} or more"
            )
        return examples

    @abstractmethod
    def outcomes(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Outcomes:
        """What a model makes of every example: a row of numbers each, which the metrics take.

        Args:
            model: float or quantized.
            tokenizer: its own.
            examples: of :meth:`load`.
            batch_size: texts at a time.
            progress: whether to draw a progress bar on the terminal.

        Returns:
            float64 ``[examples, numbers]``.

        Raises:
            LexibitError: the model is of another kind than the task needs.
        """

    def scores(self, outcomes: Outcomes, *, seconds: float = math.nan, seed: int = 0) -> list[Score]:
        """The score by every metric, each with its interval.

        Args:
            outcomes: of :meth:`outcomes`.
            seconds: that the model took.
            seed: of the bootstrap.
        """
        return [self._score(metric, outcomes, seconds, seed) for metric in self.metrics]

    @staticmethod
    def _score(metric: Metric, outcomes: Outcomes, seconds: float, seed: int) -> Score:
        value = metric.of(outcomes)
        low, high = _interval(lambda index: metric.of(outcomes[index]), len(outcomes), seed)
        return Score(metric.name, value, low, high, len(outcomes), seed, seconds, metric.higher)

    def differences(self, ours: Outcomes, theirs: Outcomes, *, seed: int = 0) -> list[Difference]:
        """How one model's outcomes differ from another's on the same examples, by every metric.

        Args:
            ours: of the one model.
            theirs: of the other, in the same order.
            seed: of the bootstrap and of the permutations.
        """
        count = len(ours)
        both = np.concatenate([ours, theirs])
        first, second = np.arange(count), np.arange(count, 2 * count)
        found = []
        for metric in self.metrics:

            def difference(one: NDArray[Any], other: NDArray[Any], of: Any = metric.of) -> float:
                return float(of(both[one]) - of(both[other]))

            low, high = _interval(partial(_paired, difference, first, second), count, seed)
            p = _chance(difference, first, second, seed)
            found.append(Difference(metric.name, difference(first, second), low, high, p))
        return found

    def measure(
        self, tokenizer: PreTrainedTokenizerBase, examples: Examples, *, batch_size: int = 64, seed: int = 0
    ) -> Callable[[PreTrainedModel], Score]:
        """A function that gives the score of any model on these examples, by the first metric."""

        def score(model: PreTrainedModel) -> Score:
            start = time.perf_counter()
            outcomes = self.outcomes(model, tokenizer, examples, batch_size=batch_size)
            return self._score(self.metrics[0], outcomes, time.perf_counter() - start, seed)

        return score


class Trainable(Task):
    """A task that a model can be trained on.

    Attributes:
        from_nothing: the models of :mod:`lexibit.models` that can be made for it.
    """

    from_nothing: ClassVar[tuple[str, ...]] = ()

    def texts(self, examples: Examples) -> list[str]:
        """All text of some examples, of which a model made from nothing learns its words."""
        raise NotImplementedError(f"no model is made from nothing for {self.name}")

    @abstractmethod
    def model(self, folder: Path, examples: Examples) -> PreTrainedModel:
        """The float model in a folder with this task's head, a fresh one if it has none.

        Args:
            folder: of a float model.
            examples: that it will be trained on: a user's own data says here what its classes are.

        Raises:
            LexibitError: it cannot be loaded, or has a head for something else.
        """

    @abstractmethod
    def features(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
    ) -> Sequence[Features]:
        """What the model is trained on: its inputs and ``labels``, not padded.

        Raises:
            LexibitError: an example that training cannot use.
        """

    @abstractmethod
    def collate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[Features]], Mapping[str, Tensor]]:
        """What makes a batch of some features."""

    def check_teacher(self, model: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Refuse a teacher whose outputs stand for something else than the model's.

        Outputs of another shape are refused in training; here nothing more is known.

        Raises:
            LexibitError: they do.
        """


def digest(*examples: Examples) -> str:
    """What tells examples from others, in hexadecimal digits."""
    return hashlib.sha256("\n".join(repr(one) for part in examples for one in part).encode()).hexdigest()


def named(model: PreTrainedModel) -> str:
    """A model as errors call it: where it came from, if known, and its class."""
    where = getattr(model, "name_or_path", "")
    return f"{where} ({type(model).__name__})" if where else type(model).__name__


def _paired(of: Callable[..., float], first: Any, second: Any, index: Any) -> float:
    return of(first[index], second[index])


def _chance(of: Callable[..., float], first: NDArray[Any], second: NDArray[Any], seed: int) -> float:
    """How often pairs that change sides at random differ as much; NaN if some then have no difference."""
    if len(first) < 2:
        return math.nan
    with quiet():
        found = permutation_test(
            (first, second),
            of,
            permutation_type="samples",
            vectorized=False,
            n_resamples=RESAMPLES - 1,
            rng=np.random.default_rng(seed),
        )
    # NaN is not as large as anything: counted, it would make chance look small
    known = math.isfinite(found.statistic) and np.isfinite(found.null_distribution).all()
    return float(found.pvalue) if known else math.nan


def _interval(of: Callable[[NDArray[Any]], float], count: int, seed: int) -> tuple[float, float]:
    """The interval of a number that some of ``count`` examples, by their places, give; NaN if it is none."""
    if count < 2 or not math.isfinite(of(np.arange(count))):
        return math.nan, math.nan
    with quiet():
        found = bootstrap(
            (np.arange(count),),
            of,
            vectorized=False,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    # a sample in which all examples are alike may have no correlation
    values = found.bootstrap_distribution[np.isfinite(found.bootstrap_distribution)]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail]) if len(values) else (math.nan, math.nan)
    return float(low), float(high)
