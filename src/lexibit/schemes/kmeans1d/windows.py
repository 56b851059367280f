"""Windows that the boundaries of an optimal partition cannot leave.

An optimal partition has its threshold t halfway between two centroids c < c', a distance D = c' - c
apart. Rounding its boundary to an end of the grid cell that holds it moves points x of that cell only,
each at an extra cost of 2 D |x - t|. Rounding down when t is below the mean of the cell and up otherwise
keeps the boundaries in order, and costs at most D * sum |x - mean| <= D * h, with
h = sqrt(weight of the cell * squared error of the cell). As D = (c' - t) + (t - c), each part belongs to
one cluster. So a dynamic program over "cost of the cluster - its share of the rounding" bounds from
below every partition whose boundaries round to given positions; a position whose bound is above the cost
of a partition that we have cannot be in the optimum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lexibit.schemes.kmeans1d.lloyd import compand, lloyd
from lexibit.schemes.line.codes import Floats, Ints
from lexibit.schemes.line.sorted import Sorted, between, errors, means

_CELLS = 8  # cells a cluster in the first grid
_NARROW = 1500  # positions a window, on average, from which the exact program takes over
_PASSES = 24  # grids at most; the exact program can take any windows


def windows(data: Sorted, k: int) -> tuple[Ints, Ints]:
    """Windows low, high [G, k - 1] that hold the boundaries of a best partition into k >= 2 clusters.

    Every group has more than k distinct values.
    """
    low = np.ones((len(data.x), k - 1), dtype=np.int64)
    high = np.full_like(low, data.size - 1)
    cut = compand(data, 4 * _CELLS * k)
    bound = lloyd(data, cut(k, 0.0), 12)[1]
    grid = _distinct(data.ends(cut(_CELLS * k, 1.0)), data.size)
    for _ in range(_PASSES):
        new_low, new_high, bound = _Grid(data, grid, low, high).viable(bound)
        low, high = np.maximum(low, new_low), np.minimum(high, new_high)
        if int((high - low).sum()) <= _NARROW * low.size:
            break
        grid = _finer(data, grid, low, high)
    return low, high


def _distinct(at: Ints, size: int) -> Ints:
    """The distinct ones of the positions [G, m], ascending; padded with the size."""
    at = np.sort(at, axis=1)
    again = at[:, 1:] == at[:, :-1]
    at[:, 1:][again] = size
    at.sort(axis=1)
    return at[:, : at.shape[1] - int(again.sum(axis=1).min())]


def _finer(data: Sorted, grid: Ints, low: Ints, high: Ints) -> Ints:
    """A grid without the positions outside of all windows, its cells of largest error cut in four."""
    left, right = grid[:, None, :-1], grid[:, None, 1:]
    covered = ((left < high[:, :, None]) & (right > low[:, :, None])).any(axis=1)
    error = np.where(covered, errors(between(data.sums(grid))), 0)
    most = min(5 * (low.shape[1] + 1), error.shape[1])
    worst = np.argpartition(-error, most - 1, axis=1)[:, :most]
    a, b = grid[data.rows, worst], grid[data.rows, worst + 1]
    mean = data.find(means(data.sums(b) - data.sums(a), data.value(a)))
    # by count and by value: halving the count alone would take long to single out an outlier
    cuts = [(a + b) // 2, mean, (a + mean) // 2, (mean + b) // 2]
    inside = (grid[:, None] >= low[:, :, None]) & (grid[:, None] <= high[:, :, None])
    kept = np.where(inside.any(axis=1), grid, data.size)
    ends = data.ends(low)[:, :1], data.ends(high)[:, -1:]
    return _distinct(
        np.concatenate([*ends, kept, low, high, data.snap(np.concatenate(cuts, 1))], 1), data.size
    )


class _Grid:
    """Positions [G, m] from 0 to the size, and lower bounds of what clusters between them cost.

    spans[j] [G, w] are the indices of the positions that boundary j may round to; a shorter span than the
    widest of the groups repeats its last. costs[j] [G, w, w'] are those of clusters from span j to j + 1.
    """

    def __init__(self, data: Sorted, at: Ints, low: Ints, high: Ints) -> None:
        self.data, self.at = data, at
        # a boundary in low..high rounds to an end of its cell
        first = (at[:, None] <= low[:, :, None]).sum(axis=2) - 1
        last = (at[:, None] < high[:, :, None]).sum(axis=2)
        cell = np.arange(at.shape[1] - 1)
        inside = ((first[:, :, None] <= cell) & (cell < last[:, :, None])).any(axis=1)
        facts = _facts(data, at, inside)
        outer = np.zeros_like(data.rows)
        self.spans = [outer]
        for begin, end in zip(first.T, last.T, strict=True):
            width = int((end - begin).max()) + 1
            self.spans.append(np.minimum(begin[:, None] + np.arange(width), end[:, None]))
        self.spans.append(outer + at.shape[1] - 1)
        ends = [facts[:, data.rows, span] for span in self.spans]
        ends[0][-1] = ends[-1][-1] = 0  # the ends of the group are not rounded
        # before any windows are known, all inner spans are the whole grid
        alike = bool((first == first[:, :1]).all() and (last == last[:, :1]).all())
        self.costs: list[Floats] = []
        for j in range(len(ends) - 1):
            if alike and 1 < j < len(ends) - 2:
                self.costs.append(self.costs[1])
            else:
                self.costs.append(_costs(ends[j][:, :, :, None], ends[j + 1][:, :, None, :]))

    def viable(self, bound: Floats) -> tuple[Ints, Ints, Floats]:
        """Windows low, high [G, k - 1], and a lower cost [G] of a partition if one was found."""
        rows, m = np.arange(len(self.at)), self.at.shape[1]
        ahead = [np.zeros((len(rows), 1))]
        for cost in self.costs[:-1]:
            ahead.append((ahead[-1][:, :, None] + cost).min(axis=1))
        bound = np.minimum(bound, lloyd(self.data, self._path(ahead), 2)[1])
        rounding = 1e-9 * bound + 1e-13 * np.abs(self.data.table[2]).max(axis=1)
        low = np.empty((len(rows), len(ahead) - 1), dtype=np.int64)
        high = np.empty_like(low)
        behind = np.zeros((len(rows), 1))
        for j in range(len(ahead) - 1, 0, -1):
            behind = (self.costs[j] + behind[:, None]).min(axis=2)
            viable = ahead[j] + behind <= (bound + rounding)[:, None]
            start = self.spans[j][rows, viable.argmax(axis=1)]
            stop = self.spans[j][rows, -1 - viable[:, ::-1].argmax(axis=1)]
            low[:, j - 1] = self.at[rows, np.maximum(start - 1, 0)]
            high[:, j - 1] = self.at[rows, np.minimum(stop + 1, m - 1)]
        return low, high, bound

    def _path(self, ahead: list[Floats]) -> Ints:
        """The boundaries [G, k - 1] of a cheapest path."""
        rows = np.arange(len(self.at))
        at = np.zeros_like(rows)
        cuts = []
        for j in range(len(ahead) - 1, 0, -1):
            at = (ahead[j] + self.costs[j][rows, :, at]).argmin(axis=1)
            cuts.append(self.at[rows, self.spans[j][rows, at]])
        return np.stack(cuts[::-1], axis=1)


def _facts(data: Sorted, at: Ints, inside: NDArray[np.bool_]) -> Floats:
    """What clusters need to know of the positions [G, m]: [10, G, m].

    The three prefix sums; two of them one position earlier, and later, if the cell there is `inside`
    [G, m - 1] a window; the means of the cells before and after, between which lies the threshold of a
    boundary that rounds to the position; and the larger h of these cells.
    """
    sums = data.sums(at)
    parts = between(sums)
    left, right = data.value(at[:, :-1]), data.value(at[:, 1:] - 1)
    gap = np.sqrt(np.maximum(parts[0], 0) * errors(parts) * (1 + 1e-9))
    gap = np.where(inside & (left != right), gap, 0)
    mean = means(parts, left)
    facts = np.empty((10, *at.shape))
    facts[:3] = sums
    facts[3:5], facts[5:7] = sums[:2], sums[:2]
    facts[3:5, :, 1:] = np.where(inside, sums[:2, :, :-1], sums[:2, :, 1:])
    facts[5:7, :, :-1] = np.where(inside, sums[:2, :, 1:], sums[:2, :, :-1])
    facts[7, :, 0], facts[7, :, 1:] = left[:, 0], mean
    facts[8, :, -1], facts[8, :, :-1] = right[:, -1], mean
    facts[9] = 0
    facts[9, :, 1:] = gap
    np.maximum(facts[9, :, :-1], gap, out=facts[9, :, :-1])
    return facts


def _costs(a: Floats, b: Floats) -> Floats:
    """Lower bounds of the cost of a cluster from a to b, from the facts of both, broadcast.

    The rounding costs h_a (c - t_a) + h_b (t_b - c) at most, where t_a, t_b are the thresholds and c the
    centroid before rounding. c is at least the mean with both ends one cell earlier, and at most that
    with both ends one cell later.
    """
    with np.errstate(all="ignore"):  # empty clusters and a > b are mended
        weight = b[0] - a[0]
        cost: Floats = b[1] - a[1]
        cost *= cost
        cost /= weight
        np.subtract(b[2] - a[2], cost, out=cost)
        np.maximum(cost, 0, out=cost)
        np.copyto(cost, 0, where=weight == 0)
        np.copyto(cost, np.inf, where=weight < 0)
        share = b[4] - a[4]
        share /= b[3] - a[3]
        np.fmax(share, a[7], out=share)
        np.subtract(b[8], share, out=share)
        np.fmax(share, 0, out=share)
        share *= b[9]
        cost -= share
        np.subtract(b[6], a[6], out=share)
        share /= b[5] - a[5]
        np.fmin(share, b[8], out=share)
        share -= a[7]
        np.fmax(share, 0, out=share)
        share *= a[9]
        cost -= share
    return cost
