"""k-bit codes <-> bytes, for every k from 1 to 8.

The packed form is one stream of bits, least significant bit first: code ``i`` takes the bits
``i*k .. i*k + k - 1``, whatever the byte borders, so that ``n`` codes take ``ceil(n*k / 8)`` bytes
and 3-bit codes take 3 bits. The bits after the last code are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_BITS, MAX_BITS = 1, 8

MAX_GAP = (1 << 16) - 1

# Eight codes of k bits fill k whole bytes: the unit in which both directions work.
_UNIT = 8
_CHUNK = 1 << 20  # codes packed at a time, whole units, so that no copy of all is made


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8, any shape, every value below ``2**bits``; read in row-major order.
        bits: 1 to 8.

    Returns:
        uint8 ``[ceil(codes.numel() * bits / 8)]``.
    """
    flat = codes.reshape(-1)
    packed = torch.empty(packed_bytes(len(flat), bits), dtype=torch.uint8, device=codes.device)
    for first in range(0, len(flat), _CHUNK):
        part = _pack(flat[first : first + _CHUNK], bits)
        packed[first * bits // 8 :][: len(part)] = part
    return packed


def _pack(codes: Tensor, bits: int) -> Tensor:
    count = len(codes)
    padded = F.pad(codes, (0, -count % _UNIT)).view(-1, _UNIT)
    out = torch.zeros(padded.shape[0], bits, dtype=torch.uint8, device=codes.device)
    for i in range(_UNIT):
        byte, shift = divmod(i * bits, 8)
        # uint8 shifts drop the bits that leave the byte: those belong to the next one
        out[:, byte] |= padded[:, i] << shift
        if shift + bits > 8:
            out[:, byte + 1] |= padded[:, i] >> (8 - shift)
    return out.view(-1)[: packed_bytes(count, bits)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of a packed stream: uint8 ``[count]``, the inverse of :func:`pack`."""
    units = (count + _UNIT - 1) // _UNIT
    stream = packed[: units * bits]
    stream = F.pad(stream, (0, units * bits - stream.numel())).view(units, bits)
    out = torch.empty(units, _UNIT, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for i in range(_UNIT):
        byte, shift = divmod(i * bits, 8)
        code = stream[:, byte] >> shift
        if shift + bits > 8:
            code = code | (stream[:, byte + 1] << (8 - shift))
        torch.bitwise_and(code, mask, out=out[:, i])
    return out.view(-1)[:count]


def pack_places(places: Tensor) -> Tensor:
    """Ascending places of a few of many things, int64 ``[n]``, as what lies between them: uint16 ``[n]``.

    The first number is how many things lie in front of the first place. None is more than :data:`MAX_GAP`.
    """
    gaps = places.diff(prepend=places.new_full((1,), -1)) - 1
    return gaps.to(torch.uint16)


def unpack_places(gaps: Tensor) -> Tensor:
    """The inverse of :func:`pack_places`: int64 ``[n]``."""
    return gaps.to(torch.int64).add_(1).cumsum(0).sub_(1)


def unpack_rows(packed: Tensor, bits: int, columns: int, rows: Tensor) -> Tensor:
    """The codes of some rows of a packed matrix, without unpacking the others.

    Args:
        packed: the stream of a whole matrix.
        bits: width of a code.
        columns: columns of the matrix.
        rows: int64 ``[n]``, which rows.

    Returns:
        uint8 ``[n, columns]``.
    """
    first = rows[:, None] * (columns * bits)
    bit = first + torch.arange(columns, device=packed.device) * bits
    byte, shift = bit >> 3, bit & 7
    # a code may straddle two bytes; the very last byte has no successor and needs none
    low = packed[byte].int() >> shift
    high = packed[(byte + 1).clamp_(max=packed.numel() - 1)].int() << (8 - shift)
    return ((low | high) & ((1 << bits) - 1)).to(torch.uint8)
