"""What a scheme is: a way to choose levels and codes for groups of weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from lexibit.errors import LexibitError, unknown
from lexibit.levels import LevelForm
from lexibit.packing import MAX_BITS, MIN_BITS


@dataclass(frozen=True)
class Scheme(ABC):
    """A way to choose levels. A subclass is a frozen dataclass whose fields are its options.

    Attributes:
        name: how users call it.
        form: the form of the levels it returns.
        min_bits, max_bits: the widths it can work with.
        weighs: whether it takes importances.
    """

    name: ClassVar[str]
    form: ClassVar[LevelForm] = LevelForm.TABLE
    min_bits: ClassVar[int] = MIN_BITS
    max_bits: ClassVar[int] = MAX_BITS
    weighs: ClassVar[bool] = False

    @abstractmethod
    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Choose levels and codes for groups that do not know of each other.

        Args:
            values: float32 ``[groups, size]`` on the CPU, finite, neither axis empty.
            bits: width of a code, within ``min_bits .. max_bits``.
            importance: float32 like ``values``, >= 0, or None; given only if ``weighs``.
            seed: of any random choice.

        Returns:
            levels float32 ``[groups, form.width(bits)]`` and codes uint8 ``[groups, size]``.
        """

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
