"""Exact one-dimensional k-means for many groups of numbers at once.

The optimal clusters of numbers on a line are intervals of the sorted numbers, so a partition is
k - 1 *boundaries* (positions in the sorted group, package `line`).  Trying all of them with dynamic
programming is quadratic; this package narrows the boundaries down first, and never drops one that
an optimal partition could use:

1. *Upper bound.*  A companding start and Lloyd steps give a partition of cost U (file `lloyd`).
2. *Windows.*  Positions are thinned to a grid.  A dynamic program bounds every partition that rounds
   to a given position from below; positions whose bound is above U are dropped, and the grid is
   made finer where it was coarsest, until the windows are narrow (file `windows`).
3. *Exact program.*  Over the positions in the windows, in time w log w (file `program`).  Windows
   that stay wide, as near-tied partitions leave them, cost time and never the result.

Sums are float64, taken about the median, outwards from it, so that no offset drowns the data.
Values so far out that a 1e-16th of their square is felt (1e7 times the width of the rest) do cost
the optimum its last digits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lexibit.schemes.kmeans1d.lloyd import centroids_of, compand, lloyd, spread
from lexibit.schemes.kmeans1d.program import best_cuts
from lexibit.schemes.kmeans1d.windows import windows
from lexibit.schemes.line.codes import Floats, Singles, midpoints
from lexibit.schemes.line.counted import counted
from lexibit.schemes.line.sorted import Sorted, between, by_chunks, means

__all__ = ["companding", "optimal", "plusplus"]

_MANY = 1 << 18  # values of a group above which it pays to look whether they are of few kinds
_PAIRS = 1 << 17  # pairs of grid positions, over groups, that are looked at together


def optimal(values: Singles, k: int, weights: Singles | None = None) -> Floats:
    """Centroids [G, k], ascending, of the best partition of each group of values [G, S].

    Args:
        values: finite float32 [G, S], in any order.
        k: number of clusters, 1 to 256.
        weights: float32 [G, S], not negative; a group of zero weights counts as unweighted.

    Returns:
        float64 [G, k].  A group with fewer distinct values than k returns those, the largest
        repeated; an empty group returns zeros.
    """
    return _by_chunks(values, k, weights, _solve)


def _solve(data: Sorted, k: int) -> Floats:
    """Centroids [G, k] of the best partition of groups with more than k distinct values."""
    groups = len(data.x)
    low = np.zeros((groups, k - 1), dtype=np.int64)
    high = low.copy()
    if k > 1:
        step = max(1, _PAIRS // (8 * k) ** 2)
        for g in range(0, groups, step):
            some = np.arange(g, min(g + step, groups))
            low[some], high[some] = windows(data.pick(some), k)
    cuts = best_cuts(data, low, high) if k > 1 else low
    return centroids_of(data, lloyd(data, cuts, 2)[0])  # rounding aside, it stays where it is


def companding(values: Singles, k: int, iterations: int, weights: Singles | None = None) -> Floats:
    """Centroids [G, k], ascending, of a companding start and at most `iterations` Lloyd steps.

    The start has levels of density f^(1/3) for values of density f, which is best for many levels:
    a fast partition near the optimum, without draws.  Shapes and edge cases are those of `optimal`.
    """

    def solve(data: Sorted, k: int) -> Floats:
        return centroids_of(data, lloyd(data, compand(data, 32 * k)(k, 0.0), iterations)[0])

    return _by_chunks(values, k, weights, solve)


def plusplus(
    values: Singles,
    k: int,
    iterations: int,
    rng: np.random.Generator,
    weights: Singles | None = None,
) -> Floats:
    """Centroids [G, k], ascending, of k-means++ and at most `iterations` Lloyd steps.

    The recipe of Zhao et al. (2020, Algorithm 1).  A cluster that becomes empty keeps its
    centroid.  Shapes and edge cases are those of `optimal`; `rng` alone decides the draws.
    """

    def solve(data: Sorted, k: int) -> Floats:
        centroids = spread(data, k, rng)
        for _ in range(iterations):
            before = centroids
            parts = between(data.sums(data.ends(data.find(midpoints(centroids)))))
            centroids = np.sort(means(parts, centroids), axis=1)
            if np.array_equal(before, centroids):
                break
        return centroids + data.centre[:, None]

    return _by_chunks(values, k, weights, solve)


def _by_chunks(
    values: Singles, k: int, weights: Singles | None, solve: Callable[[Sorted, int], Floats]
) -> Floats:
    """Levels [G, k]: `solve` for the groups with more than k distinct values, a few at a time."""
    values = np.asarray(values, dtype=np.float32)
    groups, size = values.shape
    levels = np.zeros((groups, k))
    if size == 0:
        return levels
    if size >= _MANY and weights is None:
        few = [counted(row) for row in values]
        if all(few):
            return np.concatenate([_by_chunks(x[None], k, w[None], solve) for x, w in filter(None, few)])
    for part, data in by_chunks(values, weights):
        many = data.distinct(k)
        for row in np.flatnonzero(~many):
            found = np.unique(data.x[row]).astype(np.float64)
            levels[part][row, : len(found)] = found
            levels[part][row, len(found) :] = found[-1]
        if many.any():
            some = np.flatnonzero(many)
            levels[part][some] = solve(data.pick(some), k)
    return levels
