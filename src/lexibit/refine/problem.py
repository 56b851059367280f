"""What is to be minimised, and what is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from lexibit.groups import Groups
from lexibit.levels import LevelForm
from lexibit.ops.assign import Ladders
from lexibit.threads import side_by_side

ROWS = 256  # of a matrix that are worked on in one piece
COLUMNS = 64  # whose codes are found before the other columns hear of it

Out = TypeVar("Out")


@dataclass(frozen=True)
class Solution:
    """Levels and codes.

    Attributes:
        levels: float32 ``[groups, form.width(bits)]``.
        codes: uint8 ``[rows, columns]``.
    """

    levels: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Problem:
    """A matrix whose rows are what a layer's outputs are made with, and the second moments of its inputs.

    Attributes:
        target: float32 ``[rows, columns]``.
        moments: float32 ``[columns, columns]``, symmetric, positive definite.
        of_row, of_column: int32, whose sum is the number of a weight's group.
        form: of the levels.
        bits: width of a code.
    """

    target: Tensor
    moments: Tensor
    of_row: Tensor
    of_column: Tensor
    form: LevelForm
    bits: int

    @classmethod
    def of(
        cls, matrix: Tensor, moments: Tensor, groups: Groups, form: LevelForm, bits: int, axis: int
    ) -> Problem:
        """The problem for a stored matrix whose input channels lie on an axis: 1 (columns), or 0."""
        runs = -(-groups.columns // groups.block[1])
        of_row = (torch.arange(groups.rows) // groups.block[0] * runs).int()
        of_column = (torch.arange(groups.columns) // groups.block[1]).int()
        if axis == 0:
            matrix, of_row, of_column = matrix.T.contiguous(), of_column, of_row
        return cls(matrix, moments, of_row, of_column, form, bits)

    def ordered(self, order: Tensor) -> Problem:
        """The same with its columns in another order."""
        return replace(
            self,
            target=self.target[:, order].contiguous(),
            moments=self.moments[order][:, order].contiguous(),
            of_column=self.of_column[order].contiguous(),
        )

    def without(self, added: Tensor) -> Problem:
        """The same for codes to which something is added: float32 like the target."""
        return replace(self, target=self.target - added)

    @cached_property
    def diagonal(self) -> Tensor:
        """Of the moments."""
        return self.moments.diagonal().contiguous()

    def table(self, levels: Tensor) -> Tensor:
        """The levels, expanded: ``[groups, 2**bits]``."""
        return self.form.expand(levels, self.bits)

    def ladders(self, levels: Tensor) -> Ladders:
        """The levels in ascending order."""
        return Ladders.of(self.table(levels))

    def groups_of(self, rows: slice, columns: slice) -> Tensor:
        """The group of each weight of a part: int64."""
        return self.of_row[rows, None].long() + self.of_column[columns]

    def decoded(self, solution: Solution, rows: slice = slice(None)) -> Tensor:
        """What the codes stand for, of some rows."""
        table = self.table(solution.levels)
        group = self.groups_of(rows, slice(None))
        return table.take(group.mul_(table.shape[1]).add_(solution.codes[rows]))

    def pieces(self, work: Callable[[slice], Out]) -> list[Out]:
        """Work on all rows, a piece at a time, side by side."""
        rows = len(self.target)
        return list(side_by_side(work, [slice(at, min(at + ROWS, rows)) for at in range(0, rows, ROWS)]))

    def error(self, solution: Solution) -> float:
        """What is minimised."""

        def of(rows: slice) -> float:
            lost = self.target[rows] - self.decoded(solution, rows)
            return float((lost @ self.moments).mul_(lost).double().sum())

        return sum(self.pieces(of))
