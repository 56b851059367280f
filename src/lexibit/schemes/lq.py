"""LQ: a symmetric uniform grid that reaches to the largest weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lexibit.levels import LevelForm
from lexibit.schemes.base import Scheme


@dataclass(frozen=True)
class LQ(Scheme):
    """Linear quantization of Hu, Meinel and Yang 2022.

    The paper says: ``n = 2^(k-1) - 1``, ``s = n / max|w|``, ``q = clamp(round(s w), -2^(k-1), n)``
    and ``w^ = q / s``, per tensor. As ``|s w| <= n`` the lowest level stays unused.

    We chose: halves round to even; a group of zeros gets the step 0. One bit leaves ``n = 0`` and no
    step, so the scheme starts at 2 bits.
    """

    name: ClassVar[str] = "lq"
    form: ClassVar[LevelForm] = LevelForm.UNIFORM
    min_bits: ClassVar[int] = 2

    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Levels and codes; see :meth:`Scheme.fit`."""
        offset = 1 << (bits - 1)
        largest = offset - 1
        low, high = values.aminmax(dim=1, keepdim=True)
        step = torch.maximum(high, -low) / largest
        # in a group of zeros 0 / 0 is the code of level zero
        q = (values / step).nan_to_num_(0.0).round_().clamp_(-offset, largest)
        codes = q.add_(offset).to(torch.uint8)
        return torch.cat([step, torch.full_like(step, -offset)], dim=1), codes
