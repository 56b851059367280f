"""MSE: a uniform grid that is clipped where the squared error is least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lexibit.schemes.line.codes import Floats, floor32, midpoints
from lexibit.schemes.line.sorted import Sorted, by_chunks
from lexibit.schemes.uniform import Uniform

_STARTS = 64  # grids tried up to 6 bits
_PHASES = 4  # of an affine grid: how often it is moved by a part of its step
_REFITTED = 4  # of them, the best
_STEPS = 20  # refits at most; more gain less than a part in five hundred


@dataclass(frozen=True)
class MSE(Uniform):
    """Clipping by minimum squared error, as in the reference code of OCS (Zhao et al. 2019).

    The source says: try thresholds up to the largest weight and keep the one whose rounding and clipping
    has the least squared error.

    We chose: 64 grids (fewer above 6 bits), and from the best four of them on, in turn, codes for the grid
    and the grid (its step, and its offset if it is affine) that fits these codes best by least squares, until
    nothing moves, or 20 times. Symmetric grids have 64 thresholds; affine ones have 16 on the way from the
    median outwards, each in four places, a quarter of a step apart, and begin from the best symmetric grid
    too, so that they are never worse. With importances the error is weighted. Weights are sorted first, so
    that all this costs a look-up a level, not a pass over the weights.
    """

    name: ClassVar[str] = "mse"

    @property
    def weighs(self) -> bool:
        """It minimises a weighted error."""
        return True

    def reach(self, values: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """To the best threshold; see :meth:`Uniform.reach`."""
        weights = None if importance is None else importance.numpy()
        low, high = np.empty((len(values), 1)), np.empty((len(values), 1))
        for part, data in by_chunks(values.numpy(), weights):
            known: tuple[Floats, ...] = ()
            if self.affine and bits > 1:
                symmetric = _Search(data, bits, affine=False)
                middle, step = symmetric.best()
                known = middle + symmetric.rule[0] * step, step
            search = _Search(data, bits, self.affine)
            low[part], step = search.best(*known)
            high[part] = low[part] + search.rule[-1] * step
        return torch.from_numpy(low), torch.from_numpy(high)


class _Search:
    """Grids ``origin + step * rule`` for sorted groups; origin and step are float64 [G, 1]."""

    def __init__(self, data: Sorted, bits: int, affine: bool) -> None:
        self.data, self.affine = data, affine
        # the levels in steps: from the first one on, or about zero
        first = 0 if affine else -(1 << (bits - 1))
        self.rule: Floats = np.arange(first, first + (1 << bits), dtype=np.float64)

    def best(self, *known: Floats) -> tuple[Floats, Floats]:
        """Origin and step of the grid with the least error that was found; one that is known counts too."""
        starts = list(self._starts())
        order = np.argsort([self._error(*start) for start in starts], axis=0, kind="stable")
        origins, steps = (np.stack(numbers) for numbers in zip(*starts, strict=True))
        origin, step = self._refit(*known) if known else (origins[0], steps[0])
        error = self._error(origin, step)
        for nth in order[:_REFITTED, None]:
            found = self._refit(*(np.take_along_axis(numbers, nth, 0)[0] for numbers in (origins, steps)))
            new = self._error(*found)
            better = new < error
            error = np.where(better, new, error)
            origin, step = (np.where(better, *pair) for pair in zip(found, (origin, step), strict=True))
        return origin, step

    def _starts(self) -> Iterator[tuple[Floats, Floats]]:
        """Origin and step of every threshold."""
        first, last = (self.data.x[:, at, None].astype(np.float64) for at in (0, -1))
        centre = self.data.centre[:, None] if self.affine else np.zeros_like(first)
        if not self.affine:
            first, last = centre, np.maximum(last, -first)
        # levels that lie close together leave little to try
        starts = _STARTS >> max(len(self.rule).bit_length() - 7, 0)
        phases = _PHASES if self.affine else 1
        for share in np.arange(phases, starts + 1, phases) / starts:
            low = centre + share * (first - centre)
            step = (centre + share * (last - centre) - low) / self.rule[-1]
            for phase in range(phases):
                yield low + step * phase / phases, step

    def _refit(self, origin: Floats, step: Floats) -> tuple[Floats, Floats]:
        """Origin and step after codes and grid were fitted to each other, in turn."""
        before = None
        for _ in range(_STEPS):
            parts = self._parts(origin, step)
            if before is not None and np.array_equal(before, parts[0]):
                break
            before = parts[0]
            origin, step = self._fitted(parts, origin, step)
        return origin, step

    def _parts(self, origin: Floats, step: Floats) -> Floats:
        """Sums [3, G, 2^bits] of the values of each code, about the centre."""
        return self.data.parts(floor32(midpoints(origin + step * self.rule)))

    def _error(self, origin: Floats, step: Floats) -> Floats:
        """Squared error [G, 1]."""
        weight, total, square = self._parts(origin, step)
        level = origin + step * self.rule - self.data.centre[:, None]
        error: Floats = (square + level * (level * weight - 2 * total)).sum(axis=1, keepdims=True)
        return error

    def _fitted(self, parts: Floats, origin: Floats, step: Floats) -> tuple[Floats, Floats]:
        """The grid of least squared error for the codes whose sums these are."""
        weight, total, _ = parts
        centre = self.data.centre[:, None]
        if self.affine:
            # a line through the values over their codes
            all_weight = weight.sum(axis=1, keepdims=True)
            rule = self.rule - (weight * self.rule).sum(axis=1, keepdims=True) / all_weight
            mean = total.sum(axis=1, keepdims=True) / all_weight
        else:
            rule, total = self.rule, total + centre * weight
        width = (weight * rule**2).sum(axis=1, keepdims=True)
        slope = (total * rule).sum(axis=1, keepdims=True)
        step = np.divide(slope, width, out=step.copy(), where=width > 0)
        if self.affine:
            origin = centre + mean + step * rule[:, :1]
        return origin, step
