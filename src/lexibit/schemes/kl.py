"""KL: a uniform grid that is clipped where the weights' distribution is changed least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import xlogy
from torch import Tensor

from lexibit.schemes.line.codes import Floats, Ints, blocks
from lexibit.schemes.lq import extremes
from lexibit.schemes.uniform import Uniform

_BINS = 2048
_SHARES = np.arange(1, 129) / 128  # thresholds tried, as shares of the way to the outermost weight
_EQUAL = 1e-9  # divergences that differ by less are equal: they come from rounded sums
_LEVELS = 1 << 18  # levels, over groups and thresholds, that are worked on together


@dataclass(frozen=True)
class KL(Uniform):
    """Clipping by minimum Kullback-Leibler divergence, as in the reference code of OCS (Zhao et al. 2019).

    The source says (after Migacz 2017): of a histogram of the weights, ``P`` is the part up to the threshold,
    with all that is beyond counted to its last bins, and ``Q`` is what quantization leaves of that part: the
    bins of a level share its weights evenly, but for the bins that were empty. The threshold of least
    ``KL(P || Q)`` is taken.

    We chose: 2048 bins between the outermost weights (plus and minus the larger, if the grid is symmetric),
    and 128 thresholds, for an affine grid on the way from the middle outwards. What is beyond a threshold is
    counted to the first and the last bin of the part that hold any weight; if the outermost level holds none
    while weights lie beyond, the threshold is out of the question. Of equal ones the largest is taken. The
    divergence prefers few clipped weights over a small error: a baseline, not a recommendation.
    """

    name: ClassVar[str] = "kl"

    def reach(self, values: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """To the best threshold; see :meth:`Uniform.reach`."""
        low, high = extremes(values, self.affine)
        share = np.empty((len(values), 1))
        at_once = max(_LEVELS // (len(_SHARES) << bits), 1)
        for start in range(0, len(values), at_once):
            part = slice(start, start + at_once)
            counts = _histogram(values[part], low[part], high[part])
            divergence = _divergences(counts, _edges(bits, self.affine))
            least = divergence.min(axis=1, keepdims=True)
            # the last threshold that is as good as any
            share[part] = np.where(divergence <= least + _EQUAL, _SHARES, 0).max(axis=1, keepdims=True)
        middle = (low + high) / 2
        wide = (high - low) / 2 * torch.from_numpy(share)
        return middle - wide, middle + wide


def _histogram(values: Tensor, low: Tensor, high: Tensor) -> Floats:
    """How many of each group's values [G, S] lie in each of equal bins from low to high: [G, bins]."""
    counts = np.zeros(len(values) * _BINS)
    scale = torch.where(high > low, _BINS / (high - low), 0.0)
    for rows, columns in blocks(tuple(values.shape)):
        at = (values[rows, columns].double() - low[rows]).mul_(scale[rows]).long().clamp_(0, _BINS - 1)
        at += torch.arange(len(values))[rows, None] * _BINS
        counts += np.bincount(at.view(-1).numpy(), minlength=len(counts))
    return counts.reshape(-1, _BINS)


def _edges(bits: int, affine: bool) -> Ints:
    """The bins [T, 2^bits + 1] where the cells of the levels begin and end, for every threshold."""
    levels = np.arange(1 << bits)
    # the cells' ends in units of the threshold: halfway between levels, and half a step beyond the outermost
    if affine:
        ends = (np.append(levels, 1 << bits) - 0.5) * 2 / ((1 << bits) - 1) - 1
    else:
        half = 1 << (bits - 1)
        ends = (np.append(levels, 1 << bits) - half - 0.5) / (half - 1)
    return np.clip(np.rint((1 + _SHARES[:, None] * ends) * _BINS / 2), 0, _BINS).astype(np.int64)


def _divergences(counts: Floats, edges: Ints) -> Floats:
    """KL(P || Q) [G, T] of each group's histogram [G, bins] and cells [T, L + 1]."""
    p = counts / counts.sum(axis=1, keepdims=True)
    mass, entropy, filled = (_prefix(part) for part in (p, _xlogx(p), p > 0))
    # of each cell: its mass, its sum of p log p, its bins that hold any
    cell, cell_entropy, cell_filled = (
        prefix[:, edges[:, 1:]] - prefix[:, edges[:, :-1]] for prefix in (mass, entropy, filled)
    )
    inside = cell.sum(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.log(cell / np.maximum(cell_filled, 1) / inside[:, :, None])
        found = (cell_entropy - np.where(cell > 0, cell * log_q, 0)).sum(axis=2)
        # the first and the last filled bin of the part take what is beyond
        for end, beyond in ((0, mass[:, edges[:, 0]]), (-1, 1 - mass[:, edges[:, -1]])):
            held = _outermost(p, edges[:, end], end)
            moved = _xlogx(held + beyond) - _xlogx(held) - beyond * log_q[:, :, end]
            found += np.where(beyond > 1e-12, np.where(cell[:, :, end] > 0, moved, np.inf), 0)
    return np.where(np.isnan(found), np.inf, found)


def _outermost(p: Floats, at: Ints, end: int) -> Floats:
    """What the first filled bin from each of at [T] on holds, or (end -1) the last one before: [G, T]."""
    bins = np.arange(_BINS)
    if end == 0:
        ahead = np.where(p > 0, bins, _BINS - 1)[:, ::-1]
        near = np.minimum.accumulate(ahead, axis=1)[:, ::-1][:, np.minimum(at, _BINS - 1)]
    else:
        near = np.maximum.accumulate(np.where(p > 0, bins, 0), axis=1)[:, np.maximum(at - 1, 0)]
    return np.take_along_axis(p, near, axis=1)


def _prefix(x: NDArray[Any]) -> Floats:
    """Sums [G, n + 1] of what stands before each of x [G, n]."""
    sums = np.zeros((len(x), x.shape[1] + 1))
    np.cumsum(x, axis=1, out=sums[:, 1:])
    return sums


def _xlogx(x: Floats) -> Floats:
    found: Floats = xlogy(x, x)
    return found
