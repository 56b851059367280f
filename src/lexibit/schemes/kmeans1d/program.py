"""The exact dynamic program over windows of boundaries, for many groups at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lexibit.schemes.line.codes import Floats, Ints
from lexibit.schemes.line.sorted import Sorted


def best_cuts(data: Sorted, low: Ints, high: Ints) -> Ints:
    """The boundaries [G, k - 1] of the cheapest partition with boundaries in low..high [G, k - 1].

    Costs of intervals satisfy the quadrangle inequality, so the best start of a cluster moves right with
    its end. Halving the ends again and again, each level looks at every start about once: a window of w
    positions costs w log w, not w^2. The windows of all groups are worked on together, one behind the
    other.
    """
    groups, count = low.shape
    here = _Window.of(data, np.zeros(groups, np.int64), np.zeros(groups, np.int64))
    cost = np.zeros(groups)
    passed = []
    for j in range(count + 1):
        last = np.full(groups, data.size)
        there = _Window.of(data, low[:, j], high[:, j]) if j < count else _Window.of(data, last, last)
        cost, start = _cheapest_starts(here, cost, there)
        passed.append((here, start))
        here = there
    cuts = np.empty_like(low)
    at = passed[-1][1]
    for j in range(count, 0, -1):
        cuts[:, j - 1] = passed[j][0].at[at]
        at = passed[j - 1][1][at]
    return cuts


@dataclass
class _Window:
    """The positions at [n] that one boundary may have, one group behind the other.

    group [n] is whose they are, first [G + 1] where each group's begin, sums [3, n] the prefix sums.
    """

    at: Ints
    group: Ints
    first: Ints
    sums: Floats

    @classmethod
    def of(cls, data: Sorted, low: Ints, high: Ints) -> _Window:
        """The positions low..high [G] that do not part equal values."""
        count = high - low + 1
        group = np.repeat(np.arange(len(low)), count)
        at = np.arange(len(group)) - np.repeat(np.cumsum(count) - count - low, count)
        inside = (at > low[group]) & (at < data.size)
        x = data.x
        inside &= x[group, at - 1] == x[group, np.minimum(at, data.size - 1)]
        at, group = at[~inside], group[~inside]
        first = np.searchsorted(group, np.arange(len(low) + 1))
        return cls(at, group, first, data.sums_along(group, at))


def _cheapest_starts(here: _Window, cost: Floats, there: _Window) -> tuple[Floats, Ints]:
    """For every position there: the least cost up to it, and the index here where its cluster starts."""
    begin, end = here.first[there.group], here.first[there.group + 1] - 1
    span = int(max(here.at.max(), there.at.max())) + 1
    order = np.searchsorted(here.group * span + here.at, there.group * span + there.at, "right")
    end = np.maximum(np.minimum(end, order - 1), begin)  # a cluster does not end before it starts
    local = np.arange(len(there.at)) - there.first[there.group]
    size = there.first[there.group + 1] - there.first[there.group]
    base = cost - here.sums[2]
    total, start = np.empty(len(there.at)), np.empty(len(there.at), np.int64)
    stride = 1 << (int(size.max()) - 1).bit_length()
    while stride:
        new = np.flatnonzero((local + 1) % (2 * stride) == stride)
        low = np.where(local[new] >= stride, start[new - stride], begin[new])
        after = np.minimum(new + stride, len(start) - 1)
        high = np.where(local[new] + stride < size[new], start[after], end[new])
        high = np.minimum(high, end[new])
        total[new], start[new] = _cheapest(here, base, there.sums[:, new], np.minimum(low, high), high)
        stride >>= 1
    return total + there.sums[2], start


def _cheapest(here: _Window, base: Floats, ends: Floats, low: Ints, high: Ints) -> tuple[Floats, Ints]:
    """For clusters that end at sums ends [3, n]: the least cost over starts low..high here, and where."""
    count = high - low + 1
    first = np.cumsum(count) - count
    own = np.repeat(np.arange(len(low)), count)
    a = np.arange(len(own)) - np.repeat(first - low, count)
    weight = ends[0][own] - here.sums[0][a]
    square = ends[1][own] - here.sums[1][a]
    square *= square
    # an empty cluster costs nothing
    np.divide(square, weight, out=square, where=weight > 0)
    cost = base[a] - square
    cost[weight < 0] = np.inf
    least = np.minimum.reduceat(cost, first)
    hit = np.flatnonzero(cost == least[own])
    return least, a[hit[np.searchsorted(own[hit], np.arange(len(low)))]]
