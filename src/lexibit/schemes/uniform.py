"""What all uniform schemes share: a grid of equal steps, and who chooses how far it reaches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lexibit.errors import LexibitError
from lexibit.levels import LevelForm
from lexibit.schemes.base import Scheme
from lexibit.schemes.line.codes import blocks


@dataclass(frozen=True)
class Grid:
    """Equal steps, a grid a group: level ``c`` is ``middle + step * (c - 2^(bits - 1))``.

    Attributes:
        step: float32 ``[groups, 1]``, >= 0.
        middle: float32 ``[groups, 1]``, 0 for a symmetric grid.
        bits: width of a code.
    """

    step: Tensor
    middle: Tensor
    bits: int

    @property
    def half(self) -> int:
        """The code of the middle."""
        return 1 << (self.bits - 1)

    @classmethod
    def symmetric(cls, alpha: Tensor, bits: int) -> Grid:
        """Hu et al.: ``2^(bits-1) - 1`` steps from 0 to ``alpha`` (float64 ``[groups, 1]``)."""
        step = (alpha / ((1 << (bits - 1)) - 1)).float()
        return cls(step, torch.zeros_like(step), bits)

    @classmethod
    def affine(cls, low: Tensor, high: Tensor, bits: int) -> Grid:
        """``2^bits - 1`` steps from ``low`` to ``high`` (float64 ``[groups, 1]``)."""
        step = ((high - low) / ((1 << bits) - 1)).clamp(max=torch.finfo(torch.float32).max)
        return cls(step.float(), (low + step * (1 << (bits - 1))).float(), bits)

    @classmethod
    def of(cls, levels: Tensor, form: LevelForm, bits: int) -> Grid:
        """The grid whose :meth:`levels` these are."""
        step = levels[:, :1]
        return cls(step, levels[:, 1:] if form is LevelForm.AFFINE else torch.zeros_like(step), bits)

    def codes(self, values: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """The codes of the nearest levels, halves to even: uint8 like the float32 ``values``.

        Args:
            values: ``[groups, size]``.
            shift: by how many steps the values are moved first; like the values, or one for some of them.
        """
        out = torch.empty(values.shape, dtype=torch.uint8)
        shift = torch.as_tensor(shift, dtype=torch.float32).expand(values.shape)
        for rows, columns in blocks(values.shape):
            # float64 holds the difference of any two float32
            steps = values[rows, columns].double().sub_(self.middle[rows]).div_(self.step[rows])
            # in a group of equal weights 0 / 0 is the code of the middle
            q = steps.nan_to_num_(0.0).add_(shift[rows, columns]).round_().add_(self.half)
            out[rows, columns] = q.clamp_(0, (1 << self.bits) - 1)
        return out

    def error(self, values: Tensor) -> Tensor:
        """The squared error of each group of float32 values ``[groups, size]``: float64 ``[groups, 1]``."""
        codes = self.codes(values)
        total = torch.zeros(len(values), 1, dtype=torch.float64)
        for rows, columns in blocks(values.shape):
            steps = codes[rows, columns].double().sub_(self.half)
            error = steps.mul_(self.step[rows]).add_(self.middle[rows]).sub_(values[rows, columns])
            total[rows] += _sum(error.square_())
        return total

    def levels(self, form: LevelForm) -> Tensor:
        """The numbers that are stored: float32 ``[groups, form.width(bits)]``."""
        return self.step if form is LevelForm.SYMMETRIC else torch.cat([self.step, self.middle], dim=1)


@dataclass(frozen=True)
class Uniform(Scheme):
    """Uniform levels. A subclass says how far the grid reaches; weights beyond take its last level.

    The papers say (Hu, Meinel and Yang 2022, for all their methods): symmetric about zero, with
    ``n = 2^(k-1) - 1``, ``s = n / alpha``, ``q = clamp(round(s w), -2^(k-1), n)`` and ``w^ = q / s``. One bit
    leaves ``n = 0`` and no step, so a symmetric grid starts at 2 bits. Banner et al. 2019, section 2.3:
    quantization shifts the mean and the deviation of an output channel's weights; they are restored by
    ``xi (w^ + mu)``.

    We chose: halves round to even; the affine grid has ``2^k`` levels from ``low`` to ``high``; the bias
    correction works on a group, so that on a channel is ``groups="row"``, restores both exactly (weights that
    all took one level are only moved), and costs no more than a number a group, as it moves the levels and
    not the codes.

    Attributes:
        affine: whether the grid may lie anywhere, or is symmetric about zero.
        bias_correction: whether a group's decoded weights get the mean and deviation of its weights.
    """

    affine: bool = False
    bias_correction: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("affine", "bias_correction"):
            if not isinstance(value := getattr(self, option), bool):
                raise LexibitError(f"{self.name} {option} must be true or false, not {value!r}")

    @property
    def form(self) -> LevelForm:
        """A scale a group, and the middle where it is not zero."""
        return LevelForm.AFFINE if self.affine or self.bias_correction else LevelForm.SYMMETRIC

    def check_bits(self, bits: int) -> None:
        """Refuse a width the scheme cannot work with."""
        super().check_bits(bits)
        if bits == 1 and not self.affine:
            raise LexibitError(
                f"scheme {self.name!r} works with 2 to 8 bits, not 1, as a symmetric grid of one bit has no "
                "step: choose more bits or affine=true"
            )

    @abstractmethod
    def reach(self, values: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """How far each group's grid reaches.

        Args:
            values: float32 ``[groups, size]``, finite.
            bits: width of a code.
            importance: float32 like ``values``, or None.

        Returns:
            low and high, as :meth:`between` takes them.
        """

    def between(self, low: Tensor, high: Tensor, bits: int) -> Grid:
        """The grid that reaches so far, float64 ``[groups, 1]``; of a symmetric one, high counts alone."""
        return Grid.affine(low, high, bits) if self.affine else Grid.symmetric(high, bits)

    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Levels and codes; see :meth:`Scheme.fit`."""
        grid = self.between(*self.reach(values, bits, importance), bits)
        codes = grid.codes(values)
        if self.bias_correction:
            grid = _corrected(grid, values, codes)
        return grid.levels(self.form), codes


def _corrected(grid: Grid, values: Tensor, codes: Tensor) -> Grid:
    """The grid moved and stretched so that the decoded groups have the mean and deviation of the values."""
    mean, deviation = moments(values)
    code_mean, code_deviation = moments(codes)
    # a group whose weights all share a level can only be moved
    step = torch.where(code_deviation > 0, deviation / code_deviation, grid.step.double())
    return Grid(step.float(), (mean - step * (code_mean - grid.half)).float(), grid.bits)


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each group ``[groups, size]``: float64 ``[groups, 1]`` each."""
    mean = mean_of(values, lambda x, rows: x)
    return mean, mean_of(values, lambda x, rows: (x - mean[rows]).square_()).sqrt_()


def mean_of(values: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """The mean of a function of each group's values ``[groups, size]``: float64 ``[groups, 1]``.

    The function takes float64 values of some groups, a part of each, and which groups they are.
    """
    total = torch.zeros(len(values), 1, dtype=torch.float64)
    for rows, columns in blocks(values.shape):
        total[rows] += _sum(function(values[rows, columns].double(), rows))
    return total / values.shape[1]


def _sum(part: Tensor) -> Tensor:
    # numpy adds in the same order whatever the number of threads
    return torch.from_numpy(part.numpy().sum(axis=1, keepdims=True))
