"""What a task is: examples from files, and a score of a model on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

Examples = list[Any]


@dataclass(frozen=True)
class Score:
    """How good a model is on a task.

    Attributes:
        metric: what was measured.
        value: the score; more is better.
        low, high: its 95 % interval, by bootstrap over the examples.
        examples: how many examples.
        seed: of the bootstrap.
        seconds: that the model took.
    """

    metric: str
    value: float
    low: float
    high: float
    examples: int
    seed: int
    seconds: float


class Task(ABC):
    """A task.

    Attributes:
        name: how users call it.
        metric: what is measured.
        files: the file, in the data folder or a sub-folder, that the examples come from.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    files: ClassVar[str]

    @abstractmethod
    def load(self, data: Path, limit: int | None = None, seed: int = 0) -> Examples:
        """Examples from a local folder.

        Args:
            data: the folder.
            limit: take a sample of that many, drawn with ``seed``; all if not given.
            seed: of the sample.

        Raises:
            LexibitError: the file is not there, or not what the task needs.
        """

    def measure(
        self, tokenizer: PreTrainedTokenizerBase, examples: Examples, *, batch_size: int = 64, seed: int = 0
    ) -> Callable[[PreTrainedModel], Score]:
        """A function that gives the score of any model on these examples."""
        return lambda model: self.score(model, tokenizer, examples, batch_size=batch_size, seed=seed)

    @abstractmethod
    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        seed: int = 0,
    ) -> Score:
        """Run the model on all examples and measure.

        Args:
            model: float or quantized.
            tokenizer: its own.
            examples: of :meth:`load`.
            batch_size: texts at a time.
            seed: of the bootstrap.
        """
