"""Binary codes: every weight is a sum of a few scales, each added or subtracted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lexibit.errors import LexibitError, unknown
from lexibit.levels import LevelForm
from lexibit.schemes.base import Scheme
from lexibit.schemes.line.codes import Codes, Floats, Ints, Singles, intervals, midpoints, under32
from lexibit.schemes.line.sorted import Sorted, by_chunks

_METHODS = ("alternating", "greedy", "refined")
_ROUNDS = 15
# Planes whose products have a smaller determinant than this, relative, count as dependent on each other.
_SINGULAR = 1e-10


@dataclass(frozen=True)
class Binary(Scheme):
    """Binary codes, ``w ~ sum_j alpha_j b_j`` with ``b_j`` = -1 or +1, as Kwon, Lee et al. 2020 use them.

    The papers say: minimise ``sum_i m_i (w_i - sum_j alpha_j b_ij)^2`` over the weights ``i`` that share
    scales (an output row by default), with importances ``m``, by

    - ``greedy``: ``b_j = sign(r)``, ``alpha_j = sum m |r| / sum m``, ``r -= alpha_j b_j``, from ``r = w`` on;
    - ``refined`` (Guo et al. 2017): greedy, but all scales are refit by least squares after each new plane;
    - ``alternating`` (Xu et al. 2018): from greedy codes on, repeat: all scales by least squares, ``alpha =
      (B^T M B)^-1 B^T M w``; for every weight the nearest of the ``2^q`` levels. 15 rounds.

    We chose: a weight halfway between two levels, or of residual zero, takes the upper one; alternating ends
    with one more refit of the scales; where planes depend on each other (a group of few distinct weights) the
    smallest scales of those that fit best are taken. All weights of one code lie between two limits, so a
    group is sorted once and a round costs a look-up a level, not a pass over the weights.

    Attributes:
        method: ``greedy``, ``refined`` or ``alternating``.
        rounds: of ``alternating``: 15 by default.
    """

    name: ClassVar[str] = "binary"
    groups: ClassVar[str] = "row"

    method: str = "alternating"
    rounds: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.method not in _METHODS:
            raise unknown("method of scheme 'binary'", self.method, _METHODS)
        if self.rounds is None:
            return
        if self.method != "alternating":
            raise LexibitError(f"binary rounds go with method=alternating, not with {self.method!r}")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 0:
            raise LexibitError(f"binary rounds must be a whole number, 0 or more, not {self.rounds!r}")

    @property
    def form(self) -> LevelForm:
        """A scale a plane."""
        return LevelForm.BINARY

    @property
    def weighs(self) -> bool:
        """It minimises a weighted error."""
        return True

    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Levels and codes; see :meth:`Scheme.fit`."""
        x = values.numpy()
        scales = np.empty((len(x), bits))
        codes = np.empty(x.shape, np.uint8)
        weights = None if importance is None else importance.numpy()
        for part, data in by_chunks(x, weights, squares=False):
            found = _grown(data, bits, refit=self.method == "refined")
            if self.method == "alternating":
                found = _alternated(data, found, _ROUNDS if self.rounds is None else self.rounds)
            scales[part] = found.scales
            codes[part] = found.codes(x[part])
        return torch.from_numpy(scales.astype(np.float32)), torch.from_numpy(codes)


@dataclass(frozen=True)
class _Planes:
    """Binary codes of groups.

    The values of a group are parted by ascending limits (float32 [G, 2^q - 1], file `line.codes`); order
    ([G, 2^q], or [2^q] for all groups) has the code of each interval; scales are [G, q].
    """

    limits: Singles
    order: Ints
    scales: Floats

    def codes(self, values: Singles) -> Codes:
        """The codes of values [G, S]."""
        names = np.broadcast_to(self.order.astype(np.uint8), (len(values), self.order.shape[-1]))
        return intervals(values, self.limits, names)


def _grown(data: Sorted, bits: int, refit: bool) -> _Planes:
    """Greedy codes, plane by plane; with refit, all scales are fitted anew after each plane."""
    groups = len(data.x)
    limits, scales = np.empty((groups, 0), np.float32), np.empty((groups, 0))
    order = np.zeros(1, np.int64)
    edge = np.full((groups, 1), np.inf, np.float32)
    for plane in range(bits):
        # the sign of the residual parts every interval at its level, or leaves it whole
        level = _levels(scales)[:, order]
        split = np.clip(under32(level), np.hstack([-edge, limits]), np.hstack([limits, edge]))
        limits, old = np.empty((groups, 2 * limits.shape[1] + 1), np.float32), limits
        limits[:, ::2], limits[:, 1::2] = split, old
        order = np.stack([order, order | (1 << plane)], axis=1).ravel()
        weight, total = _sums(data, limits)
        if refit:
            scales = _least_squares(weight, total, order)
        else:
            # sum m |r|: above the level less below it
            residual = total - np.repeat(level, 2, axis=1) * weight
            size = (residual[:, 1::2] - residual[:, ::2]).sum(axis=1, keepdims=True)
            scales = np.hstack([scales, size / weight.sum(axis=1, keepdims=True)])
    return _Planes(limits, order, scales)


def _alternated(data: Sorted, start: _Planes, rounds: int) -> _Planes:
    """Scales for the codes and codes for the scales, in turn; and scales once more."""
    limits, order = start.limits, start.order
    weight, total = _sums(data, limits)
    for _ in range(rounds):
        levels = _levels(_least_squares(weight, total, order))
        before, order = (weight, order), np.argsort(levels, axis=1, kind="stable")
        limits = under32(midpoints(np.sort(levels, axis=1)))
        weight, total = _sums(data, limits)
        if np.array_equal(weight, before[0]) and (order == before[1]).all():
            break
    return _Planes(limits, order, _least_squares(weight, total, order))


def _sums(data: Sorted, limits: Singles) -> tuple[Floats, Floats]:
    """Weight, and weight times value, of every interval: [G, 2^q] each."""
    weight, total = data.parts(limits)
    return weight, total + data.centre[:, None] * weight


@cache
def _signs(planes: int) -> Floats:
    """Every code as its planes, -1 or +1: [2^planes, planes]."""
    bit = (np.arange(1 << planes)[:, None] >> np.arange(planes)) & 1
    return 2 * bit.astype(np.float64) - 1


@cache
def _pairs(planes: int) -> tuple[Ints, Ints, Floats]:
    """Every pair j <= k of planes [p], and the product of the two for every code [p, 2^planes]."""
    j, k = np.triu_indices(planes)
    signs = _signs(planes).T
    return j, k, signs[j] * signs[k]


# einsum adds in one order; a matrix product might not, whatever the number of threads


def _levels(scales: Floats) -> Floats:
    """The level of every code: [G, 2^q]."""
    found: Floats = np.einsum("gj,cj->gc", scales, _signs(scales.shape[1]))
    return found


def _least_squares(weight: Floats, total: Floats, order: Ints) -> Floats:
    """Scales [G, q] of least squared error, from the sums of every interval and its code."""
    rows = np.arange(len(weight))[:, None]
    by_code = np.empty((2, *weight.shape))
    by_code[0][rows, order], by_code[1][rows, order] = weight, total
    by_code /= weight.sum(axis=1, keepdims=True)
    planes = (weight.shape[1] - 1).bit_length()
    j, k, both = _pairs(planes)
    products = np.empty((len(weight), planes, planes))
    products[:, j, k] = products[:, k, j] = np.einsum("gc,pc->gp", by_code[0], both)
    target = np.einsum("gc,cj->gj", by_code[1], _signs(planes))[:, :, None]
    scales: Floats = np.empty(target.shape)
    # with a share of the weight behind every code, planes cannot depend on each other
    regular = by_code[0].min(axis=1) * 2**planes > _SINGULAR ** (1 / planes)
    regular[~regular] = np.linalg.det(products[~regular]) > _SINGULAR
    scales[regular] = np.linalg.solve(products[regular], target[regular])
    if not regular.all():
        scales[~regular] = np.linalg.pinv(products[~regular], rcond=1e-9, hermitian=True) @ target[~regular]
    return scales[:, :, 0]
