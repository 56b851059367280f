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
    near = _float32(x)
    return np.where(near > x, np.nextafter(near, np.float32(-np.inf)), near)


def under32(x: NDArray[Any]) -> Singles:
    """The largest float32 below each float64: a limit that leaves x itself above."""
    near = _float32(x)
    return np.where(near >= x, np.nextafter(near, np.float32(-np.inf)), near)


def _float32(x: NDArray[Any]) -> Singles:
    with np.errstate(over="ignore"):  # beyond float32 is beyond all values
        return x.astype(np.float32)


def nearest(values: Singles, levels: NDArray[Any]) -> Codes:
    """Index uint8 [G, S] of the level nearest to each value; levels [G, k] ascend, k <= 256.

    A value halfway between two levels takes the lower one.
    """
    return intervals(values, floor32(midpoints(np.asarray(levels, dtype=np.float64))))


def intervals(values: Singles, limits: Singles) -> Codes:
    """How many of the ascending limits [G, k - 1] each value [G, S] is above: uint8 [G, S], k <= 256."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    codes = np.zeros(values.shape, dtype=np.uint8)
    for rows, columns in blocks(values.shape):
        _count(values[rows, columns], limits[rows], codes[rows, columns])
    return codes


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most CHUNK entries that make up an array [G, S]: which rows, which columns."""
    groups, size = shape
    step = max(1, CHUNK // max(size, 1))
    for g in range(0, groups, step):
        for s in range(0, size, CHUNK):
            yield slice(g, g + step), slice(s, s + CHUNK)


def _count(values: Singles, limits: Singles, codes: Codes) -> None:
    """Write the number of limits [g, k - 1] below each value [g, s] into codes [g, s]."""
    if limits.shape[1] < 32:  # comparing with all of them is a few vector instructions each
        for limit in limits.T:
            codes += values > limit[:, None]
    else:
        found = torch.searchsorted(
            torch.from_numpy(limits), torch.from_numpy(np.ascontiguousarray(values)), out_int32=True
        )
        codes[...] = found.numpy()
