"""Linear clusters: equal bins between the smallest and the largest weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lexibit.schemes.base import Scheme

# Values binned at a time: bounds the float64 scratch space.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Linear(Scheme):
    """Zhao et al. 2020, eq. 2-4.

    The paper says: ``width = (max - min) / 2^k``, the bin of ``w`` is ``floor((w - min) / width)``,
    and every weight becomes the mean of its bin's members; one set of bins a matrix. Q-BERT's
    group-wise form is ``groups="blocks:128"``.

    We chose: the maximum belongs to the last bin; the level of an empty bin, which no weight uses, is
    the bin's middle; with importances the mean is weighted, the bins are not.
    """

    name: ClassVar[str] = "linear"

    @property
    def weighs(self) -> bool:
        """Its means are weighted."""
        return True

    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Levels and codes; see :meth:`Scheme.fit`."""
        count = 1 << bits
        low = values.amin(1, keepdim=True).double()
        width = (values.amax(1, keepdim=True).double() - low) / count
        codes = torch.empty(values.shape, dtype=torch.uint8)
        total = torch.zeros(len(values) * count, dtype=torch.float64)
        weight = torch.zeros_like(total)
        columns = max(_CHUNK // len(values), 1)
        first = torch.arange(len(values))[:, None] * count
        for start in range(0, values.shape[1], columns):
            part = values[:, start : start + columns].double()
            # a group of equal weights has no width: all go to bin 0
            bins = ((part - low) / width).nan_to_num_(0.0).clamp_(0, count - 1)
            codes[:, start : start + columns] = bins
            slot = (codes[:, start : start + columns] + first).view(-1)
            if importance is None:
                mass = torch.ones_like(part)
            else:
                mass = importance[:, start : start + columns].double()
            total += torch.bincount(slot, (part * mass).view(-1), minlength=len(total))
            weight += torch.bincount(slot, mass.view(-1), minlength=len(total))
        middle = low + width * (torch.arange(count) + 0.5)
        mean = (total / weight).view(-1, count)
        return torch.where(weight.view(-1, count) > 0, mean, middle).float(), codes
