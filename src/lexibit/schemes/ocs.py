"""OCS: outlier channels are split in two, so that a uniform grid needs not reach so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexibit.errors import LexibitError, unknown
from lexibit.groups import Groups
from lexibit.levels import LevelForm
from lexibit.schemes.aciq import ACIQ
from lexibit.schemes.base import Choice, Scheme
from lexibit.schemes.kl import KL
from lexibit.schemes.lq import LQ
from lexibit.schemes.mse import MSE
from lexibit.schemes.uniform import Grid, Uniform

_CLIPS: dict[str, type[Uniform]] = {"max": LQ, "aciq": ACIQ, "mse": MSE, "kl": KL}
_SPLITS = ("grid-aware", "naive")


@dataclass(frozen=True)
class OCS(Scheme):
    """Outlier channel splitting of Zhao et al. 2019, as Hu, Meinel and Yang 2022 use it.

    The papers say: split the input channel that holds the largest ``|w|`` into two halves, ``ceil(r C)``
    times for ``C`` channels, the largest being looked for anew after each split, so that a channel may be
    split again. Then quantize on the symmetric uniform grid whose ``alpha`` is the largest ``|w|`` after
    splitting, per tensor. Naive halves are equal, ``w / 2`` each; grid-aware halves are ``(w - 0.5) / 2`` and
    ``(w + 0.5) / 2`` in units of the grid's step, so that their rounded sum is the rounded ``w``.

    We chose: any clip of the other uniform schemes may set how far the grid reaches, looking at the weights
    after (naive) splitting; of channels that hold equal largest weights the first is split; a channel is a
    column of the stored weight, but for transformers' Conv1D a row. The halves of a grid-aware split need one
    grid, so groups must be whole rows, and the whole matrix where channels are rows.

    The extra channels are stored, each with the number of its origin, and count in bits per weight:
    ``k (1 + r)`` and four bytes a channel.

    Attributes:
        ratio: extra channels by channels: ``r``, 0 to 1.
        split: ``grid-aware`` or ``naive``.
        clip: ``max``, ``aciq``, ``mse`` or ``kl``.
        affine: whether the grid may lie anywhere, or is symmetric about zero.
    """

    name: ClassVar[str] = "ocs"

    ratio: float = 0.05
    split: str = "grid-aware"
    clip: str = "max"
    affine: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float):
            raise LexibitError(f"ocs ratio must be a number from 0 to 1, not {self.ratio!r}")
        if not 0 <= self.ratio <= 1:
            raise LexibitError(f"ocs ratio must be from 0 to 1, not {self.ratio}")
        if self.split not in _SPLITS:
            raise unknown("split of scheme 'ocs'", self.split, _SPLITS)
        if self.clip not in tuple(_CLIPS):
            raise unknown("clip of scheme 'ocs'", self.clip, _CLIPS)
        _ = self._clip

    @property
    def _clip(self) -> Uniform:
        """The scheme that quantizes the split weight."""
        return _CLIPS[self.clip](affine=self.affine)

    @property
    def form(self) -> LevelForm:
        """That of its uniform grid."""
        return self._clip.form

    @property
    def weighs(self) -> bool:
        """Whether its clip does."""
        return self._clip.weighs

    def check_bits(self, bits: int) -> None:
        """Refuse a width that its grid cannot work with."""
        self._clip.check_bits(bits)

    def extra(self, channels: int) -> int:
        """``ceil(r C)``."""
        # a product like 0.07 * 100 = 7.000000000000001 is meant to be 7
        return math.ceil(round(self.ratio * channels, 9))

    def fault(self, groups: Groups, axis: int) -> str:
        """Groups that part the halves of a grid-aware split."""
        if self.split == "naive" or not (groups.runs if axis else groups.count > 1):
            return ""
        needed = "groups of whole rows" if axis else "groups=matrix, as its channels are rows,"
        return f"'ocs' with split=grid-aware has both halves on one grid: choose {needed} or split=naive"

    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Levels and codes for groups whose channels are split already; see :meth:`Scheme.fit`."""
        return self._clip.fit(values, bits, importance, seed)

    def choose(
        self, matrix: Tensor, groups: Groups, bits: int, importance: Tensor | None, seed: int, axis: int
    ) -> Choice:
        """Split, then quantize; see :meth:`Scheme.choose`."""
        count = self.extra(matrix.shape[axis])
        if count == 0 or matrix.numel() == 0:
            return super().choose(matrix, groups, bits, importance, seed, axis)
        largest = matrix.abs().amax(1 - axis).numpy()
        channels = split_channels(largest, count)
        origins = torch.from_numpy(channels.origin)
        along = (1, -1) if axis else (-1, 1)
        halved = matrix.index_select(axis, origins).mul_(torch.from_numpy(channels.share).view(along))
        if importance is not None:
            importance = importance.index_select(axis, origins)
        choice = super().choose(halved, groups, bits, importance, seed, axis)
        codes = choice.codes
        if self.split == "grid-aware":
            # rows of a group are neighbours; if channels are rows, all are one group
            group = torch.arange(groups.rows) // groups.block[0]
            grid = Grid.of(choice.levels[group], self.form, bits)
            shift = torch.from_numpy(channels.shift).view(along)
            codes = grid.codes(halved, shift)
        return Choice(choice.levels, codes, origins[matrix.shape[axis] :].int())


@dataclass(frozen=True)
class Channels:
    """The channels after splitting: those of the weight, then the extra ones.

    Attributes:
        origin: int64, of which channel each holds a part.
        share: float32, which part: 1, 1/2, 1/4, ...
        shift: float32, by how many steps a grid-aware part is moved; the parts of a channel add up to it.
    """

    origin: NDArray[np.int64]
    share: NDArray[np.float32]
    shift: NDArray[np.float32]


def split_channels(largest: NDArray[np.float32], count: int) -> Channels:
    """Split the channel with the largest ``|w|`` in two, ``count`` times.

    Args:
        largest: the largest ``|w|`` of each channel.
        count: how many times.
    """
    channels = len(largest)
    size = np.append(largest, np.zeros(count, np.float32))
    origin = np.arange(channels + count)
    share, shift = np.ones(channels + count, np.float32), np.zeros(channels + count, np.float32)
    for new in range(channels, channels + count):
        old = int(size[:new].argmax())
        size[old] /= 2
        share[old] /= 2
        origin[new], size[new], share[new] = origin[old], size[old], share[old]
        shift[old], shift[new] = (shift[old] - 0.5) / 2, (shift[old] + 0.5) / 2
    return Channels(origin, share, shift)
