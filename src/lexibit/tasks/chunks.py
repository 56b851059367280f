"""A text in chunks that go on from each other, for a model that carries its state."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexibit.errors import LexibitError
from lexibit.tasks.base import Features
from lexibit.tasks.epochs import Epochs


class Chunks(Epochs):
    """A text cut into columns of the same length, read side by side, a chunk of all columns at a time.

    Merity et al. 2017 say: a chunk's length is drawn from a normal distribution around ``bptt``, or, one time
    in twenty, around half of it, with a deviation of 5, so that chunks do not end at the same words in every
    epoch. We chose: 5 words or more, as in the authors' code; the lengths are drawn once for all seeds, and
    shuffled in every epoch, so that all epochs have as many steps. What is left over behind the last column
    is not used.

    A feature is a batch of its own: ``input_ids`` and the next words, ``shift_labels``, both
    ``[columns, length]``, and ``reset``, true for the first chunk of an epoch.

    Args:
        tokens: the text, int64 ``[n]``.
        columns: how many.
        bptt: the usual length of a chunk.

    Raises:
        LexibitError: the text has fewer words than it is to have columns.
    """

    ordered: ClassVar[bool] = True

    def __init__(self, tokens: Tensor, *, columns: int, bptt: int) -> None:
        length = (len(tokens) - 1) // columns
        if length < 1:
            raise LexibitError(
                f"the training text has {len(tokens)} tokens, too few to be read in {columns} columns: give "
                "more text, or the model a smaller batch_columns"
            )
        self.inputs = tokens[: columns * length].view(columns, length)
        self.targets = tokens[1 : columns * length + 1].view(columns, length)
        self.lengths = _lengths(length, bptt)

    def __len__(self) -> int:
        return len(self.lengths)

    def feature(self, index: int) -> Features:
        """The chunk at a place."""
        lengths = self.generator().permutation(self.lengths)
        start = int(lengths[:index].sum())
        part = slice(start, start + int(lengths[index]))
        return {
            "input_ids": self.inputs[:, part],
            "shift_labels": self.targets[:, part],
            "reset": torch.tensor(index == 0),
        }


def _lengths(total: int, bptt: int) -> NDArray[np.int64]:
    """How long the chunks of columns of ``total`` words are."""
    rng = np.random.default_rng(0)
    lengths = []
    while total:
        usual = bptt if rng.random() < 0.95 else bptt / 2
        lengths.append(min(max(round(rng.normal(usual, 5)), 5), total))
        total -= lengths[-1]
    return np.array(lengths)
