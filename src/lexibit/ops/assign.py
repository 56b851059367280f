"""Codes for some columns of a matrix, one column after the other, each choice moving the next ones' aims.

This is what error feedback and coordinate descent do (:mod:`lexibit.refine`); they differ in what a choice
moves, and by how much.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lexibit.ops import native


class Ladders(NamedTuple):
    """The levels of groups in ascending order.

    Attributes:
        levels: float32 ``[groups, count]``.
        limits: float32 ``[groups, count - 1]``, halfway between neighbours.
        names: uint8 ``[groups, count]``, the code of each level.
    """

    levels: Tensor
    limits: Tensor
    names: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Ladders:
        """The levels of a table, ``[groups, 2**bits]``; of equal ones the smallest code comes first."""
        levels, names = table.float().sort(dim=1, stable=True)
        limits = levels[:, 1:] / 2 + levels[:, :-1] / 2
        return cls(levels.contiguous(), limits.contiguous(), names.to(torch.uint8).contiguous())


def assign(
    target: Tensor, ladders: Ladders, groups: tuple[Tensor, Tensor], coupling: Tensor, values: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Take the nearest level, column by column; a weight halfway between two takes the lower one.

    Args:
        target: float32 ``[rows, columns]``, what each weight aims at; overwritten.
        ladders: the levels.
        groups: int32 ``[rows]`` and ``[columns]``, whose sum is the group of a weight.
        coupling: float32 ``[columns, columns]``: a change in column i moves the target of each later column j
            of its row by ``-change * coupling[i, j]``.
        values: float32 ``[rows, columns]``, what the weights are now; or None.

    Returns:
        codes uint8 ``[rows, columns]``, and the changes, float32 like it: from the values to the levels that
        were taken, or, without values, from these levels to what was aimed at.
    """
    rows, columns = target.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    change = torch.empty(rows, columns)
    if native.chosen().name != native.REFERENCE:
        native.assign(target, ladders, groups, coupling, values, codes, change)
        return codes, change
    for i in range(columns):
        group = (groups[0] + groups[1][i]).long()
        aim = target[:, i : i + 1].contiguous()
        step = torch.searchsorted(ladders.limits[group], aim)
        level = ladders.levels[group].gather(1, step)
        codes[:, i : i + 1] = ladders.names[group].gather(1, step)
        moved = aim - level if values is None else level - values[:, i : i + 1]
        change[:, i : i + 1] = moved
        target[:, i + 1 :] -= moved * coupling[i, i + 1 :]
    return codes, change
