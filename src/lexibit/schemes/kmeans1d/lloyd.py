"""Starts, and Lloyd steps on boundaries."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lexibit.schemes.line.codes import Floats, Ints, midpoints
from lexibit.schemes.line.sorted import Sorted, between, errors, means, search_rows


def lloyd(data: Sorted, cuts: Ints, steps: int) -> tuple[Ints, Floats]:
    """Boundaries [G, k - 1] after at most some Lloyd steps, and their squared error [G]."""
    ends = data.ends(cuts)
    parts = between(data.sums(ends))
    for _ in range(steps):
        centroids = np.maximum.accumulate(means(parts, data.value(ends[:, :-1])), axis=1)
        new = data.ends(data.find(midpoints(centroids)))
        if np.array_equal(new, ends):
            break
        ends, parts = new, between(data.sums(new))
    return ends[:, 1:-1], errors(parts).sum(axis=1)


def centroids_of(data: Sorted, cuts: Ints) -> Floats:
    """Centroids [G, k], ascending, of the clusters between boundaries [G, k - 1]."""
    ends = data.ends(cuts)
    found = means(between(data.sums(ends)), data.value(ends[:, :-1]))
    return np.sort(found, axis=1) + data.centre[:, None]


def compand(data: Sorted, cells: int) -> Callable[[int, float], Ints]:
    """A function that cuts every group in m parts for which good levels are about equally dense.

    The best levels of a density f have density f^(1/3), here estimated from cells of equal
    counts.  `even` mixes in equal counts, so that far outliers do not take all the parts.
    """
    cells = min(data.size, cells)
    at = np.repeat(np.arange(cells + 1)[None] * data.size // cells, len(data.x), axis=0)
    x = data.value(at)
    weight = np.maximum(between(data.sums(at))[0], 0)
    measure = np.cbrt(weight * (x[:, 1:] - x[:, :-1]) ** 2)
    measure /= measure.sum(axis=1, keepdims=True)
    weight /= weight.sum(axis=1, keepdims=True)

    def cut(m: int, even: float) -> Ints:
        """Boundaries [G, m - 1]."""
        total = np.zeros(at.shape)
        np.cumsum(measure + even * weight, axis=1, out=total[:, 1:])
        goal = total[:, -1:] * (np.arange(1, m) / m)
        cell = np.clip(search_rows(total, goal), 1, cells)
        start, stop = total[data.rows, cell - 1], total[data.rows, cell]
        share = np.clip((goal - start) / np.maximum(stop - start, 1e-300), 0, 1)
        left, right = at[data.rows, cell - 1], at[data.rows, cell]
        return data.snap((left + share * (right - left)).astype(np.int64))

    return cut


def spread(data: Sorted, k: int, rng: np.random.Generator) -> Floats:
    """k-means++ start: k centroids [G, k], ascending, drawn by squared distance.

    The values nearest to a centroid are an interval, so the distances up to any position follow
    from prefix sums and a draw is a bisection: no array of all distances is needed.
    """
    groups = len(data.x)
    draws = rng.random((groups, k))
    first = np.zeros((groups, 1), dtype=np.int64)
    last = np.full((groups, 1), data.size)
    weigh = np.array([1.0, 0.0, 0.0])[:, None, None]
    goal = draws[:, :1] * (data.sums(last) - data.sums(first))[0]
    centroids = data.value(_reach(data, first, last, weigh, goal))
    for i in range(1, k):
        ends = data.ends(data.find(midpoints(centroids)))
        square = np.stack([centroids**2, -2 * centroids, np.ones_like(centroids)])
        mass = np.maximum((between(data.sums(ends)) * square).sum(axis=0), 0)
        total = np.cumsum(mass, axis=1)
        goal = draws[:, i : i + 1] * total[:, -1:]
        at = np.minimum((total <= goal).sum(axis=1, keepdims=True), i - 1)
        goal = goal - np.take_along_axis(total - mass, at, axis=1)
        weigh = np.take_along_axis(square, at[None], axis=2)
        first = np.take_along_axis(ends, at, axis=1)
        last = np.take_along_axis(ends, at + 1, axis=1)
        new = data.value(_reach(data, first, last, weigh, goal))
        centroids = np.sort(np.concatenate([centroids, new], axis=1), axis=1)
    return centroids


def _reach(data: Sorted, first: Ints, last: Ints, weigh: Floats, goal: Floats) -> Ints:
    """First value [G, 1] in first..last at which the weighed sums from `first` pass the goal."""
    base = data.sums(first)
    low, high = first, np.maximum(last - 1, first)
    for _ in range(data.size.bit_length()):
        middle = (low + high) >> 1
        passed = ((data.sums(middle + 1) - base) * weigh).sum(axis=0) > goal
        low = np.where(passed, low, np.minimum(middle + 1, high))
        high = np.where(passed, middle, high)
    return low
