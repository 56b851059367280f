"""The forms in which the levels of a group are stored, each in its own smallest.

=============  ===============  ================================================================
form           numbers a group  level of code ``c``
=============  ===============  ================================================================
``table``      2**bits          ``table[c]``
``symmetric``  1                ``scale * (c - 2**(bits - 1))``
``affine``     2                ``scale * (c - 2**(bits - 1)) + middle``, in the order scale, middle
``uniform``    2                ``scale * (c + offset)``, in the order scale, offset; no longer written
``binary``     bits             ``sum_j scale[j] * (+1 if bit j of c is set else -1)``
=============  ===============  ================================================================

Every form expands to a table, so one decoder serves all.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class LevelForm(StrEnum):
    """How a group's levels are stored."""

    TABLE = "table"
    SYMMETRIC = "symmetric"
    AFFINE = "affine"
    UNIFORM = "uniform"
    BINARY = "binary"

    def width(self, bits: int) -> int:
        """Numbers stored for one group."""
        widths = {"table": 1 << bits, "symmetric": 1, "affine": 2, "uniform": 2, "binary": bits}
        return widths[self.value]

    def expand(self, levels: Tensor, bits: int) -> Tensor:
        """Levels ``[groups, width]`` as a table ``[groups, 2**bits]``, in the same dtype."""
        if self is LevelForm.TABLE:
            return levels
        code = torch.arange(1 << bits, device=levels.device)
        # from the middle: a half-precision dtype has these numbers exactly
        centred = (code - (1 << (bits - 1))).to(levels.dtype)
        if self is LevelForm.SYMMETRIC:
            return levels * centred
        if self is LevelForm.AFFINE:
            return levels[:, :1] * centred + levels[:, 1:]
        if self is LevelForm.UNIFORM:
            scale, offset = levels[:, :1], levels[:, 1:]
            return scale * (code.to(levels.dtype) + offset)
        sign = _signs(code, bits)
        # one plane after the other: a fixed order of additions gives the same bits everywhere
        table = levels[:, :1] * sign[:, 0].to(levels.dtype)
        for plane in range(1, bits):
            table = table + levels[:, plane : plane + 1] * sign[:, plane].to(levels.dtype)
        return table

    def pull_back(self, gradient: Tensor, levels: Tensor, bits: int) -> Tensor:
        """The gradient of the levels from that of their table: the transpose of :meth:`expand`.

        Args:
            gradient: ``[groups, 2**bits]``, of the table.
            levels: ``[groups, width]``.
            bits: width of a code.

        Returns:
            ``[groups, width]`` in the gradient's dtype.
        """
        if self is LevelForm.TABLE:
            return gradient
        code = torch.arange(1 << bits, device=gradient.device)
        if self is LevelForm.BINARY:
            return gradient @ _signs(code, bits).to(gradient.dtype)
        centred = (code - (1 << (bits - 1))).to(gradient.dtype)
        if self is LevelForm.SYMMETRIC:
            return (gradient @ centred)[:, None]
        if self is LevelForm.AFFINE:
            return torch.stack([gradient @ centred, gradient.sum(1)], dim=1)
        scale, offset = levels[:, 0].to(gradient.dtype), levels[:, 1:].to(gradient.dtype)
        return torch.stack([(gradient * (code + offset)).sum(1), gradient.sum(1) * scale], dim=1)


def _signs(code: Tensor, bits: int) -> Tensor:
    """Codes as their planes, -1 or +1: ``[codes, bits]``."""
    return ((code[:, None] >> torch.arange(bits, device=code.device)) & 1) * 2 - 1
