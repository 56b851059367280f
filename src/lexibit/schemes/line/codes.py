"""From levels to codes: the limits between levels, and the interval that each value falls in.

A limit is a float32, and a value belongs above it if it is larger, so that comparing float32 values with
it is exact and fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Codes = NDArray[np.uint8]

CHUNK = 1 << 16  # values converted at a time, so that no long temporary array is made


def midpoints(levels: Floats) -> Floats:
    """Thresholds [G, k - 1] between levels [G, k]."""
    middle: Floats = levels[:, 1:] / 2 + levels[:, :-1] / 2
    return middle


def floor32(x: NDArray[Any]) -> Singles:
    """The largest float32 not above each float64: a limit that leaves x itself below."""
    with np.errstate(over="ignore"):  # beyond float32 is beyond all values
        near = x.astype(np.float32)
        return np.where(near > x, np.nextafter(near, np.float32(-np.inf)), near)


def under32(x: NDArray[Any]) -> Singles:
    """The largest float32 below each float64: a limit that leaves x itself above."""
    with np.errstate(over="ignore"):
        near = x.astype(np.float32)
        return np.where(near >= x, np.nextafter(near, np.float32(-np.inf)), near)


def nearest(values: Singles, levels: NDArray[Any]) -> Codes:
    """Index uint8 [G, S] of the level nearest to each value; levels [G, k] ascend, k <= 256.

    A value halfway between two levels takes the lower one.
    """
    return intervals(values, floor32(midpoints(np.asarray(levels, dtype=np.float64))))


def intervals(values: Singles, limits: Singles, names: Codes | None = None) -> Codes:
    """The interval between limits that each value [G, S] falls in: uint8 [G, S].

    The limits [G, k - 1] ascend, k <= 256. Intervals are called by their numbers, or by names [G, k].
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if names is None:
        names = np.broadcast_to(
            np.arange(limits.shape[1] + 1, dtype=np.uint8), (len(limits), limits.shape[1] + 1)
        )
    codes = np.empty(values.shape, dtype=np.uint8)
    for rows, columns in blocks(values.shape):
        _name(values[rows, columns], limits[rows], names[rows], codes[rows, columns])
    return codes


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most CHUNK entries that make up an array [G, S]: which rows, which columns."""
    groups, size = shape
    step = max(1, CHUNK // max(size, 1))
    for g in range(0, groups, step):
        for s in range(0, size, CHUNK):
            yield slice(g, g + step), slice(s, s + CHUNK)


def _name(values: Singles, limits: Singles, names: Codes, codes: Codes) -> None:
    """Write the names [g, k] of the intervals that values [g, s] fall in into codes [g, s]."""
    if limits.shape[1] < 32:  # comparing with all of them is a few vector instructions each
        codes[...] = names[:, :1]
        for limit, change in zip(limits.T, (names[:, 1:] ^ names[:, :-1]).T, strict=True):
            codes ^= (values > limit[:, None]) * change[:, None]
    else:
        found = torch.searchsorted(torch.from_numpy(limits), torch.from_numpy(np.ascontiguousarray(values)))
        codes[...] = np.take_along_axis(names, found.numpy(), axis=1)
