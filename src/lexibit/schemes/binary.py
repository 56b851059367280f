"""Binary codes: every weight is a sum of a few scales, each added or subtracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lexibit.errors import LexibitError, unknown
from lexibit.levels import LevelForm
from lexibit.schemes.base import Scheme
from lexibit.schemes.line.codes import Codes, Floats, Singles, blocks, intervals, midpoints, under32
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
        for part, data in by_chunks(x, None if importance is None else importance.numpy()):
            found = _grown(data, bits, refit=self.method == "refined")
            if self.method == "alternating":
                found = _alternated(data, found, _ROUNDS if self.rounds is None else self.rounds)
            scales[part] = found.scales
            found.code(x[part], codes[part])
        return torch.from_numpy(scales.astype(np.float32)), torch.from_numpy(codes)


@dataclass(frozen=True)
class _Planes:
    """Binary codes of groups.

    The values of a group are parted by ascending limits (float32 [G, 2^q - 1], file `line.codes`); order
    (uint8 [G, 2^q], or [1, 2^q] for all groups) has the code of each interval; scales are [G, q].
    """

    limits: Singles
    order: Codes
    scales: Floats

    def code(self, values: Singles, codes: Codes) -> None:
        """Write the codes of values [G, S] into codes."""
        found = intervals(values, self.limits)
        for rows, columns in blocks(values.shape):
            order = self.order if len(self.order) == 1 else self.order[rows]
            codes[rows, columns] = np.take_along_axis(order, found[rows, columns].astype(np.intp), axis=1)


def _grown(data: Sorted, bits: int, refit: bool) -> _Planes:
    """Greedy codes, plane by plane; with refit, all scales are fitted anew after each plane."""
    groups = len(data.x)
    limits, scales = np.empty((groups, 0), np.float32), np.empty((groups, 0))
    order = np.zeros((1, 1), np.uint8)
    edge = np.full((groups, 1), np.inf, np.float32)
    for plane in range(bits):
        # the sign of the residual parts every interval at its level, or leaves it whole
        level = (_signs(order, plane) * scales[:, None]).sum(axis=2)
        split = np.clip(under32(level), np.hstack([-edge, limits]), np.hstack([limits, edge]))
        limits, old = np.empty((groups, 2 * limits.shape[1] + 1), np.float32), limits
        limits[:, ::2], limits[:, 1::2] = split, old
        order = np.stack([order, order | np.uint8(1 << plane)], axis=2).reshape(1, -1)
        weight, total = _sums(data, limits)
        if refit:
            scales = _least_squares(weight, total, _signs(order, plane + 1))
        else:
            # sum m |r|: above the level less below it
            residual = total - np.repeat(level, 2, axis=1) * weight
            size = (residual[:, 1::2] - residual[:, ::2]).sum(axis=1, keepdims=True)
            scales = np.hstack([scales, size / weight.sum(axis=1, keepdims=True)])
    return _Planes(limits, order, scales)


def _alternated(data: Sorted, start: _Planes, rounds: int) -> _Planes:
    """Scales for the codes and codes for the scales, in turn; and scales once more."""
    bits = start.scales.shape[1]
    signs = _signs(np.arange(1 << bits, dtype=np.uint8)[None], bits)
    limits, order = start.limits, start.order
    weight, total = _sums(data, limits)
    for _ in range(rounds):
        levels = _least_squares(weight, total, _signs(order, bits)) @ signs[0].T
        new = np.argsort(levels, axis=1, kind="stable").astype(np.uint8)
        limits = under32(midpoints(np.take_along_axis(levels, new.astype(np.intp), axis=1)))
        before, (weight, total) = weight, _sums(data, limits)
        done = np.array_equal(weight, before) and np.array_equal(np.broadcast_to(order, new.shape), new)
        order = new
        if done:
            break
    return _Planes(limits, order, _least_squares(weight, total, _signs(order, bits)))


def _sums(data: Sorted, limits: Singles) -> tuple[Floats, Floats]:
    """Weight, and weight times value, of every interval: [G, 2^q] each."""
    weight, total, _ = data.parts(limits)
    return weight, total + data.centre[:, None] * weight


def _signs(order: Codes, planes: int) -> Floats:
    """The codes [G, n] as their planes, -1 or +1: [G, n, planes]."""
    bit = (order[:, :, None] >> np.arange(planes, dtype=np.uint8)) & 1
    return 2 * bit.astype(np.float64) - 1


def _least_squares(weight: Floats, total: Floats, signs: Floats) -> Floats:
    """Scales [G, q] of least squared error, from the sums and planes of every interval."""
    all_weight = weight.sum(axis=1)
    turned = signs.transpose(0, 2, 1)
    products = turned @ (signs * weight[:, :, None]) / all_weight[:, None, None]
    target = turned @ total[:, :, None] / all_weight[:, None, None]
    scales: Floats = np.empty((len(weight), signs.shape[2]))
    regular = np.linalg.det(products) > _SINGULAR
    scales[regular] = np.linalg.solve(products[regular], target[regular])[:, :, 0]
    if not regular.all():
        inverse = np.linalg.pinv(products[~regular], rcond=1e-9, hermitian=True)
        scales[~regular] = (inverse @ target[~regular])[:, :, 0]
    return scales
