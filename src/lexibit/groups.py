"""Which weights of a matrix share their levels.

A group is a block of ``rows x columns`` that holds either whole rows or a run inside one row:

=============  =====================  ==========================================
spelling       block                  meaning
=============  =====================  ==========================================
``matrix``     all rows, all columns  one set of levels for the whole matrix
``row``        1, all columns         each row has its own
``rows:N``     N, all columns         blocks of N consecutive rows
``blocks:N``   ceil(rows / N), all    at most N blocks of rows (Q-BERT's 128)
``columns:N``  1, N                   runs of N columns inside each row
``within:B``   as few as it takes     the fewest rows whose levels take at most B
                                      bits a weight, like 0.2; all if one set takes more
=============  =====================  ==========================================

A remainder makes a smaller last group; nothing is padded on disk and nothing falls back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lexibit.errors import LexibitError, unknown

_DIGITS = 18  # of a number that may count rows or columns
_PLAIN = ("matrix", "row")
_COUNTED = ("rows", "blocks", "columns")
_SPELLINGS = ("auto", "matrix", "row", "rows:N", "blocks:N", "columns:N", "within:B")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight: its last axis are the columns, all others are the rows."""
    return prod(shape[:-1]), shape[-1]


def _bits(spec: str, number: str) -> float:
    try:
        bits = float(number)
    except ValueError:
        bits = math.nan
    if not (bits > 0 and math.isfinite(bits)):
        raise LexibitError(f"groups {spec!r}: write bits a weight, above 0, behind 'within:', like 0.2")
    return bits


@dataclass(frozen=True)
class Groups:
    """A matrix ``[rows, columns]`` cut into blocks of ``block`` = (rows, columns) that share levels."""

    rows: int
    columns: int
    block: tuple[int, int]

    @classmethod
    def parse(cls, spec: str, shape: tuple[int, ...], level_bits: int = 0) -> Groups:
        """The groups that ``spec`` (see the module's table) makes of a weight of this shape.

        Args:
            spec: a spelling.
            shape: the weight's.
            level_bits: what the levels of a group take, for ``within:B``.

        Raises:
            LexibitError: the spelling is unknown or its number is not a positive whole one.
        """
        rows, columns = matrix_shape(shape)
        kind, colon, number = spec.partition(":")
        if kind in _PLAIN and not colon:
            return cls(rows, columns, (max(rows, 1) if kind == "matrix" else 1, max(columns, 1)))
        if kind == "within":
            most = _bits(spec, number)
            affordable = math.floor(rows * columns * most / max(level_bits, 1))
            height = -(-rows // max(affordable, 1))
            return cls(rows, columns, (max(height, 1), max(columns, 1)))
        if kind not in _COUNTED:
            raise unknown("groups", spec, _SPELLINGS)
        if not number.isdecimal() or len(number) > _DIGITS or int(number) == 0:
            raise LexibitError(f"groups {spec[:40]!r}: write a positive whole number after '{kind}:'")
        size = int(number)
        if kind == "columns":
            return cls(rows, columns, (1, max(min(size, columns), 1)))
        height = size if kind == "rows" else -(-rows // size)
        return cls(rows, columns, (max(min(height, rows), 1), max(columns, 1)))

    @property
    def runs(self) -> bool:
        """Whether groups are runs of columns inside a row (else they are whole rows)."""
        return self.block[1] < self.columns

    @property
    def count(self) -> int:
        """How many groups there are; group ``g`` of a run is ``row * runs_in_a_row + run``."""
        if self.rows * self.columns == 0:
            return 0
        return -(-self.rows // self.block[0]) * -(-self.columns // self.block[1])

    @property
    def size(self) -> int:
        """Weights in a full group."""
        return self.block[0] * self.block[1]

    def split(self, matrix: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The groups as batches of equal size: ``[(index [n], values [n, size])]``.

        ``index`` are the groups' numbers. At most two batches: the full groups, and the remainders.
        """
        if self.count == 0:
            return []
        number = torch.arange(self.count)
        if self.runs:
            whole = self.columns // self.block[1] * self.block[1]
            number = number.view(self.rows, -1)
            runs = matrix[:, :whole].reshape(-1, self.block[1])
            batches = [(number[:, : whole // self.block[1]].reshape(-1), runs)]
            if whole < self.columns:
                batches.append((number[:, -1], matrix[:, whole:]))
            return batches
        whole = self.rows // self.block[0]
        height = whole * self.block[0]
        batches = [(number[:whole], matrix[:height].reshape(whole, -1))]
        if height < self.rows:
            batches.append((number[whole:], matrix[height:].reshape(1, -1)))
        return batches

    def join(self, batches: list[Tensor]) -> Tensor:
        """The inverse of :meth:`split`: the batches' values ``[n, size]`` as a matrix."""
        if not batches:
            return torch.empty(self.rows, self.columns, dtype=torch.uint8)
        if self.runs:
            return torch.cat([values.reshape(self.rows, -1) for values in batches], dim=1)
        return torch.cat([values.reshape(-1, self.columns) for values in batches])

    def lookup(self, codes: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        """Some rows' codes replaced by their levels.

        Args:
            codes: uint8 ``[n, columns]``.
            table: ``[count, 2**bits]``, the levels of all groups.
            rows: int64 ``[n]``, which rows of the matrix the codes are.

        Returns:
            ``[n, columns]`` in the table's dtype.
        """
        return table.take(self.entry(codes, table.shape[1], rows))

    def entry(self, codes: Tensor, width: int, rows: Tensor) -> Tensor:
        """Where some rows' codes stand in the levels of all groups, ``[count, width]``, read in one line.

        Args:
            codes: uint8 ``[n, columns]``.
            width: levels of a group, ``2**bits``.
            rows: int64 ``[n]``, which rows of the matrix the codes are.

        Returns:
            int64 ``[n, columns]``.
        """
        if self.count == 1:
            return codes.long()
        group = (rows // self.block[0])[:, None]
        if self.runs:
            run = torch.arange(self.columns, device=codes.device) // self.block[1]
            group = group * -(-self.columns // self.block[1]) + run
        return codes + group * width
