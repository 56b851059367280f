"""Sorted groups of numbers, with the sums and look-ups that every search for levels needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lexibit.schemes.line.codes import CHUNK, Floats, Ints, Singles, floor32

_BLOCK = 64  # values per stored prefix sum in long groups; a look-up sums part of one block
_SHORT = 8192  # groups up to this length store a prefix sum for every value
_GROUPS = 1 << 18  # values of short groups that are sorted and worked on together,
_MOST = 1 << 12  # and groups
_FEW = 4  # groups up to which a search in each is a call of its own


@dataclass
class Sorted:
    """Sorted groups and their prefix sums.

    x [G, S] are the values; w [G, S] their weights or None; centre [G] the medians; table
    [3, G, m + 1] the sums of weight * (x - centre) ** (0, 1, 2) from the median to each block end.
    A *position* p stands for the gap before x[p]; all other values are relative to the centre.
    """

    x: Singles
    w: Singles | None
    centre: Floats
    table: Floats
    block: int

    @classmethod
    def of(cls, values: Singles, weights: Singles | None, *, squares: bool = True) -> Sorted:
        """Sort values [G, S] with their weights [G, S]; without squares, sums have two rows, not three."""
        if weights is None:
            x, w = np.sort(values, axis=1), None
        else:
            x, w = _sort_pairs(*_positive(values, weights))
        centre = x[:, x.shape[1] // 2].astype(np.float64)
        block = 1 if x.shape[1] <= _SHORT else _BLOCK
        return cls(x, w, centre, _prefix_table(x, w, centre, block, 3 if squares else 2), block)

    @property
    def size(self) -> int:
        """Values per group, S."""
        return int(self.x.shape[1])

    @property
    def rows(self) -> Ints:
        """Row numbers [G, 1], to index with."""
        return np.arange(len(self.x))[:, None]

    def pick(self, rows: Ints) -> Sorted:
        """The groups with these numbers [g]."""
        if np.array_equal(rows, np.arange(len(self.x))):
            return self
        w = None if self.w is None else self.w[rows]
        return Sorted(self.x[rows], w, self.centre[rows], self.table.take(rows, axis=1), self.block)

    def distinct(self, k: int) -> NDArray[np.bool_]:
        """Which groups [G] have more than k distinct values."""
        count = np.ones(len(self.x), dtype=np.int64)
        for s in range(0, self.size - 1, CHUNK):
            part = self.x[:, s : s + CHUNK + 1]
            count += (part[:, 1:] != part[:, :-1]).sum(axis=1)
            if (count > k).all():
                break
        return count > k

    def sums(self, at: Ints) -> Floats:
        """Prefix sums [3, G, m] at the positions [G, m]."""
        return self._sums(self.rows, at)

    def _sums(self, rows: Ints, at: Ints) -> Floats:
        """Prefix sums at the positions [g, m] of the groups rows [g, 1]."""
        block = at // self.block
        flat = self.table.reshape(len(self.table), -1)
        found: Floats = flat.take(rows * self.table.shape[2] + block, axis=1)
        if self.block == 1:
            return found
        index = block[:, :, None] * self.block + np.arange(self.block)
        keep = index < at[:, :, None]
        np.minimum(index, self.size - 1, out=index)
        x = self.x[rows[:, :, None], index] - self.centre[rows[:, :, None]]
        w = keep if self.w is None else keep * self.w[rows[:, :, None], index]
        found += _moments(x, w, np.empty_like(found))
        return found

    def sums_along(self, group: Ints, at: Ints) -> Floats:
        """Prefix sums [3, n] at many positions [n], ascending in each of the groups [n]."""
        if self.block == 1:
            found: Floats = self.table[:, group, at]
            return found
        sums = np.empty((3, len(at)))
        # a group at a time, as the sums of one may drown those of another
        cuts = np.flatnonzero(np.diff(group, prepend=-1, append=-1))
        parts = [
            slice(s, min(s + CHUNK, end)) for begin, end in pairwise(cuts) for s in range(begin, end, CHUNK)
        ]
        for part in parts:
            g, p = group[part], at[part]
            # neighbours go on from each other's sums
            start = np.flatnonzero(np.diff(p, prepend=-2) != 1)
            index = np.minimum(p, self.size - 1)
            x = (self.x[g, index] - self.centre[g])[None, :, None]
            w = None if self.w is None else self.w[g, index][None, :, None]
            each = _moments(x, w, np.empty((3, 1, len(g))))[:, 0]
            total = np.cumsum(each, axis=1) - each
            base = self._sums(g[start, None], p[start, None])[:, :, 0] - total[:, start]
            sums[:, part] = total + np.repeat(base, np.diff(start, append=len(p)), axis=1)
        return sums

    def value(self, at: Ints) -> Floats:
        """Values [G, m] at the positions [G, m], the last one for the end."""
        index = np.minimum(np.maximum(at, 0), self.size - 1)
        found: Floats = self.x[self.rows, index] - self.centre[:, None]
        return found

    def find(self, limits: Floats, right: bool = False) -> Ints:
        """How many values [G, m] are below the limits [G, m]; with `right`, or equal to them."""
        limits = limits + self.centre[:, None]
        # float64 limits would convert the whole table
        return self._search(floor32(limits) if right else -floor32(-limits), right)

    def parts(self, limits: Singles) -> Floats:
        """Sums [3, G, m + 1] of the values between limits [G, m], which are absolute (file `codes`)."""
        return between(self.sums(self.ends(self._search(limits, right=True))))

    def _search(self, limits: Singles, right: bool) -> Ints:
        """How many values [G, m] are below the absolute limits [G, m]; with `right`, or equal to them."""
        if len(self.x) <= _FEW:
            return search_rows(self.x, limits, right)
        # one search for all groups, among whole numbers that ascend from each group to the next
        found = np.searchsorted(self._keys, _keys(limits).ravel(), "right" if right else "left")
        return found.reshape(limits.shape) - self.rows * self.size

    @cached_property
    def _keys(self) -> Ints:
        return _keys(self.x).ravel()

    def ends(self, cuts: Ints) -> Ints:
        """The k - 1 inner boundaries [G, k - 1] with the two outer ones [G, k + 1]."""
        ends = np.empty((len(cuts), cuts.shape[1] + 2), dtype=np.int64)
        ends[:, 0], ends[:, 1:-1], ends[:, -1] = 0, cuts, self.size
        return ends

    def snap(self, at: Ints) -> Ints:
        """The positions [G, m], those inside a run of equal values moved to its nearer end."""
        x = self.value(at)
        inside = (at > 0) & (at < self.size) & (self.value(at - 1) == x)
        if not inside.any():
            return at
        left, right = self.find(x), self.find(x, right=True)
        return np.where(inside, np.where(at - left <= right - at, left, right), at)


def by_chunks(
    values: Singles, weights: Singles | None, *, squares: bool = True
) -> Iterator[tuple[slice, Sorted]]:
    """The groups of values [G, S], S > 0, sorted a few at a time: which groups, and these."""
    groups, size = values.shape
    step = min(max(1, _GROUPS // size), _MOST)
    for g in range(0, groups, step):
        part = slice(g, g + step)
        some = None if weights is None else weights[part]
        yield part, Sorted.of(values[part], some, squares=squares)


def search_rows(table: NDArray[Any], limits: NDArray[Any], right: bool = False) -> Ints:
    """np.searchsorted of the limits [G, m] in each ascending row of the table [G, n]."""
    side: Literal["left", "right"] = "right" if right else "left"
    return np.stack([np.searchsorted(*row, side) for row in zip(table, limits, strict=True)])


def _keys(x: Singles) -> Ints:
    """Whole numbers [G, m] in the order of the group first, and of the float32 x [G, m] in it then."""
    ordered = _flip((x + np.float32(0)).view(np.int32)).astype(np.int64)  # no -0.0
    return ordered + (np.arange(len(x))[:, None] << 32)


def between(sums: Floats) -> Floats:
    """Sums [3, G, m - 1] of the parts between neighbouring prefix sums [3, G, m]."""
    parts: Floats = sums[:, :, 1:] - sums[:, :, :-1]
    return parts


def means(parts: Floats, otherwise: Floats) -> Floats:
    """Means [G, m] from sums [3, G, m], `otherwise` where there is no weight."""
    found = otherwise.copy()
    np.divide(parts[1], parts[0], out=found, where=parts[0] > 0)
    return found


def errors(parts: Floats) -> Floats:
    """Squared errors [G, m] about the means from sums [3, G, m]."""
    square = np.divide(parts[1] ** 2, parts[0], out=np.zeros_like(parts[1]), where=parts[0] > 0)
    found: Floats = np.maximum(parts[2] - square, 0)
    return found


def _moments(x: Floats, w: NDArray[Any] | None, sums: Floats) -> Floats:
    """Sums [powers, G, m] of w * x ** (0, 1, 2) over the last axis of x, w [G, m, b]; written to sums."""
    wx = x if w is None else w * x
    sums[0] = x.shape[2] if w is None else w.sum(axis=2, dtype=np.float64)
    # of one value there is nothing to add up
    sums[1] = wx.sum(axis=2) if x.shape[2] > 1 else wx[:, :, 0]
    if len(sums) > 2:
        np.einsum("gmb,gmb->gm", wx, x, out=sums[2])
    return sums


def _positive(values: Singles, weights: Singles) -> tuple[Singles, Singles]:
    """Values and weights [G, S] without weights that are zero in effect.

    A value of weight zero must not become a centroid, so it is replaced with the largest of the
    others; a group of zero weights gets ones.
    """
    weights = np.asarray(weights, dtype=np.float32)
    if weights.min() > 0:
        return values, weights
    weights = np.where((weights > 0).any(axis=1, keepdims=True), weights, np.float32(1))
    none = weights <= 0
    weights[none] = 0  # also turns -0.0 into 0.0
    largest = np.where(none, -np.inf, values).max(axis=1, keepdims=True)
    return np.where(none, largest, values).astype(np.float32), weights


def _sort_pairs(values: Singles, weights: Singles) -> tuple[Singles, Singles]:
    """Values and weights [G, S], sorted by value; views of one array of pairs.

    One 64-bit key per pair, the value (as an integer in the same order) above the weight, is
    much faster to sort than an index is to make and follow.
    """
    pairs = np.empty((*values.shape, 2), dtype="<i4")
    parts = [(slice(None), slice(s, s + CHUNK)) for s in range(0, values.shape[1], CHUNK)]
    for part in parts:
        pairs[(*part, 1)] = _flip((values[part] + np.float32(0)).view(np.int32))  # no -0.0
        pairs[(*part, 0)] = np.ascontiguousarray(weights[part]).view(np.int32)
    pairs.view("<i8")[..., 0].sort(axis=1)
    for part in parts:
        pairs[(*part, 1)] = _flip(pairs[(*part, 1)])
    floats = pairs.view("<f4")
    return floats[..., 1], floats[..., 0]


def _flip(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Bits of a float32 as an integer in the same order, and back."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _prefix_table(x: Singles, w: Singles | None, centre: Floats, block: int, powers: int) -> Floats:
    """Sums [powers, G, m + 1] from the median to the end of each whole block of x [G, S]."""
    groups, size = x.shape
    blocks = size // block
    middle = blocks // 2
    table = np.empty((powers, groups, blocks + 1))
    rows, columns = max(CHUNK // size, 1), max(CHUNK // block, 1)
    for g in range(0, groups, rows):
        for b in range(0, blocks, columns):
            part = (slice(g, g + rows), slice(b * block, min(b + columns, blocks) * block))
            wide = (x[part] - centre[part[0], None]).reshape(len(x[part]), -1, block)
            heavy = None if w is None else w[part].astype(np.float64).reshape(wide.shape)
            _moments(wide, heavy, table[:, part[0], b + 1 : b + columns + 1])
    # outwards from the median, so that neither side drowns the other
    summed = table if w is not None else table[1:]
    right, left = summed[:, :, middle + 1 :], summed[:, :, middle:0:-1]
    np.cumsum(right, axis=2, out=right)
    np.cumsum(left, axis=2, out=left)
    np.negative(summed[:, :, 1 : middle + 1], out=summed[:, :, :middle])
    table[:, :, middle] = 0
    if w is None:
        table[0] = (np.arange(blocks + 1) - middle) * block
    return table
