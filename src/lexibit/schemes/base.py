"""What a scheme is: a way to choose levels and codes for groups of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lexibit.errors import LexibitError, unknown
from lexibit.groups import Groups
from lexibit.levels import LevelForm
from lexibit.packing import MAX_BITS, MIN_BITS


@dataclass(frozen=True)
class Choice:
    """What a scheme chose for a weight.

    Attributes:
        levels: float32 ``[groups, form.width(bits)]``.
        codes: uint8, the stored matrix: the weight's own rows and columns, then the extra ones.
        origins: int32 ``[extra]``, to which row or column each extra one is added; None without any.
        outliers: int64 and float32 ``[outliers]``, places in the weight, row after row, and what is added
            there; None without any.
    """

    levels: Tensor
    codes: Tensor
    origins: Tensor | None = None
    outliers: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to choose levels. A subclass is a frozen dataclass whose fields are its options.

    Attributes:
        name: how users call it.
        groups: which weights share levels if the user does not say.
        min_bits, max_bits: the widths it can work with.
    """

    name: ClassVar[str]
    groups: ClassVar[str] = "matrix"
    min_bits: ClassVar[int] = MIN_BITS
    max_bits: ClassVar[int] = MAX_BITS

    @property
    def form(self) -> LevelForm:
        """The form of the levels it returns."""
        return LevelForm.TABLE

    @property
    def weighs(self) -> bool:
        """Whether it takes importances."""
        return False

    @property
    def separate(self) -> bool:
        """Whether it chooses for a group whatever the other groups of its weight are."""
        return True

    @abstractmethod
    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Choose levels and codes for groups that do not know of each other.

        Args:
            values: float32 ``[groups, size]`` on the CPU, finite, neither axis empty.
            bits: width of a code, within ``min_bits .. max_bits``.
            importance: float32 like ``values``, >= 0 and not all zero in any group, or None; given only
                if ``weighs``.
            seed: of any random choice.

        Returns:
            levels float32 ``[groups, form.width(bits)]`` and codes uint8 ``[groups, size]``.
        """

    def extra(self, channels: int) -> int:
        """How many input channels are stored beyond the ``channels`` of a weight."""
        return 0

    def fault(self, groups: Groups, axis: int) -> str:
        """What is wrong with groups of the stored matrix, empty if nothing is; ``axis`` as for ``choose``."""
        return ""

    def choose(
        self, matrix: Tensor, groups: Groups, bits: int, importance: Tensor | None, seed: int, axis: int
    ) -> Choice:
        """Levels and codes for a whole weight, group by group.

        Args:
            matrix: float32 ``[rows, columns]`` on the CPU, finite.
            groups: of the stored matrix.
            bits: width of a code.
            importance: float32 like ``matrix``, >= 0, or None; given only if ``weighs``. A group whose
                importances are all zero counts as unweighted.
            seed: of any random choice.
            axis: of the input channels: 1 (columns) but for transformers' Conv1D.
        """
        levels = torch.zeros(groups.count, self.form.width(bits))
        weighing = None if importance is None else groups.split(importance)
        parts = []
        for batch, (index, values) in enumerate(groups.split(matrix)):
            m = None
            if weighing is not None:
                m = weighing[batch][1].contiguous()
                nothing = m.amax(1) == 0
                if nothing.any():
                    m = m.masked_fill(nothing[:, None], 1.0)
            levels[index], codes = self.fit(values.contiguous(), bits, m, seed)
            parts.append(codes)
        return Choice(levels, groups.join(parts))

    @classmethod
    def with_options(cls, options: dict[str, Any]) -> Scheme:
        """The scheme with some options set.

        Raises:
            LexibitError: an option the scheme does not have, or a value it refuses.
        """
        for option in options:
            if option not in (names := [field.name for field in fields(cls)]):
                raise unknown(f"option of scheme {cls.name!r}", option, names)
        return cls(**options)

    def check_bits(self, bits: int) -> None:
        """Refuse a width the scheme cannot work with."""
        if not self.min_bits <= bits <= self.max_bits:
            raise LexibitError(
                f"scheme {self.name!r} works with {self.min_bits} to {self.max_bits} bits, "
                f"not {bits}: choose bits in that range or another scheme"
            )
