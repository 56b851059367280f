"""How a model is trained: one record."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lexibit import tuning
from lexibit.errors import LexibitError


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    The papers say (Zhao et al. 2020, 4.2): Adam with a linear schedule, a learning rate of 5e-5; ten times
    that for the levels of quantized layers. We chose the rest. A model may bring its own optimizer and
    learning rate, as the AWD-LSTM does.

    Attributes:
        epochs: passes over the training examples, more than 0.
        learning_rate: at the start; it falls to zero in a line. The model's own if not given, or 5e-5.
        batch_size: examples a step.
        warmup: share of all steps in which the learning rate rises to its start; less than 1.
        weight_decay: of Adam (decoupled); not of levels.
        max_steps: stop after so many steps instead of epochs, if given.
        patience: stop when so many epochs have not bettered the first metric, and keep the best epoch's
            model; train all epochs and keep the last if not given.
        levels_factor: how many times faster levels learn.
        distill: the share of the loss that is the distance to a teacher's outputs, if there is a teacher.
        temperature: by which both models' logits are divided for that distance.
        group_by_length: whether texts of like length come together, which wastes less on padding; the order
            of examples is then less random.
        seed: of everything random: fresh heads, the order of examples, dropout.
    """

    epochs: float = 3.0
    learning_rate: float | None = None
    batch_size: int = 32
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_steps: int | None = None
    patience: int | None = None
    group_by_length: bool = False
    levels_factor: float = tuning.FACTOR
    distill: float = 0.5
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what nothing can be trained with."""
        for name, low, high in (
            ("learning_rate", 0, None),
            ("batch_size", 1, None),
            ("weight_decay", 0, None),
            ("levels_factor", 0, None),
            ("distill", 0, 1),
            ("temperature", 1e-3, None),
            ("seed", 0, None),
            ("max_steps", 1, None),
            ("patience", 1, None),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or value < low or (high is not None and value > high):
                said = f"{low} or more" if high is None else f"from {low} to {high}"
                raise LexibitError(f"{name} must be {said}, not {value}")
        if not 0 < self.epochs < math.inf:
            raise LexibitError(f"epochs must be more than 0, not {self.epochs}")
        if not 0 <= self.warmup < 1:
            raise LexibitError(f"warmup must be 0 or more and less than 1, not {self.warmup}")
