"""Features that differ from epoch to epoch, so that a model sees no text twice in the same way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, overload

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lexibit.tasks.base import Features


class Epochs(Sequence[Features]):
    """Features whose random choices depend on seed, epoch and place alone.

    So a run that is resumed in the middle of an epoch sees what an unbroken one sees. An
    :class:`EpochCallback` tells them seed and epoch; how many they are depends on neither.

    Attributes:
        ordered: whether they must be given in their order, one at a time.
        seed: of all random choices.
        epoch: which one it is, from 0.
    """

    ordered: ClassVar[bool] = False
    seed: int = 0
    epoch: int = 0

    def generator(self, *place: int) -> np.random.Generator:
        """Random numbers of this seed and epoch, at a place."""
        return np.random.default_rng([self.seed, self.epoch, *place])

    @abstractmethod
    def feature(self, index: int) -> Features:
        """The features at a place, from 0."""

    @overload
    def __getitem__(self, index: int) -> Features: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Features]: ...
    def __getitem__(self, index: int | slice) -> Features | Sequence[Features]:
        places = range(len(self))[index]
        return self.feature(places) if isinstance(places, int) else [self.feature(place) for place in places]

    def __iter__(self) -> Iterator[Features]:
        return (self.feature(index) for index in range(len(self)))


class EpochCallback(TrainerCallback):
    """What tells features the trainer's seed, and each epoch, also the one in which a run is resumed."""

    def __init__(self, features: Epochs) -> None:
        self.features = features

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell them, before the first batch is asked for."""
        self.features.seed = args.seed
        self.features.epoch = int(state.epoch or 0)
