"""LQ: a uniform grid that reaches to the largest weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lexibit.schemes.uniform import Uniform


@dataclass(frozen=True)
class LQ(Uniform):
    """Linear quantization of Hu, Meinel and Yang 2022.

    The paper says: ``alpha = max|w|``, per tensor, on the symmetric grid of :class:`Uniform`. As
    ``|s w| <= n`` the lowest level stays unused.

    We chose: with ``affine=True`` the grid reaches from the smallest to the largest weight, which is
    min-max quantization; an honest baseline with ``groups="row"``.
    """

    name: ClassVar[str] = "lq"

    def reach(self, values: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """To the outermost weights; see :meth:`Uniform.reach`."""
        return extremes(values, self.affine)


def extremes(values: Tensor, affine: bool) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of each group, or plus and minus the larger of the two."""
    low, high = (side.double() for side in values.aminmax(dim=1, keepdim=True))
    if affine:
        return low, high
    alpha = high.maximum(-low)
    return -alpha, alpha
