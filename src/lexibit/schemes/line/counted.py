"""Many numbers of few kinds: values that came from 16 bits, and how often each occurs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lexibit.schemes.line.codes import CHUNK, Singles

_KINDS = 1 << 16
_MOST = 1 << 24  # up to here, float32 counts exactly


def counted(values: Singles) -> tuple[Singles, Singles] | None:
    """The distinct ones of many values, ascending, and their counts; None if they are not of 16 bits.

    A value that occurs very often is listed several times, so that float32 holds its counts.

    Args:
        values: finite float32 [S].

    Returns:
        float32 [n] and float32 [n], n <= 65536 but for those.
    """
    for as_bits, as_values in ((_bfloat16, _from_bfloat16), (_float16, _from_float16)):
        counts = np.zeros(_KINDS, dtype=np.int64)
        for s in range(0, len(values), CHUNK):
            part = values[s : s + CHUNK]
            bits = as_bits(part)
            if not np.array_equal(as_values(bits), part):
                break
            counts += np.bincount(bits, minlength=_KINDS)
        else:
            kinds = np.flatnonzero(counts)
            x, often = as_values(kinds.astype(np.uint16)), counts[kinds]
            order = np.argsort(x, kind="stable")
            x, often = x[order], often[order]
            times = -(-often // _MOST)
            return np.repeat(x, times), np.repeat((often / times).astype(np.float32), times)
    return None


def _bfloat16(values: Singles) -> NDArray[np.uint16]:
    bits: NDArray[np.uint16] = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return bits


def _from_bfloat16(bits: NDArray[np.uint16]) -> Singles:
    found: Singles = (bits.astype(np.uint32) << 16).view(np.float32)
    return found


def _float16(values: Singles) -> NDArray[np.uint16]:
    with np.errstate(over="ignore"):  # beyond float16: then it is not of 16 bits
        return values.astype(np.float16).view(np.uint16)


def _from_float16(bits: NDArray[np.uint16]) -> Singles:
    return bits.view(np.float16).astype(np.float32)
