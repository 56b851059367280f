"""The operators in plain PyTorch: right everywhere, and what every faster kernel is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lexibit.groups import Groups, matrix_shape
from lexibit.levels import LevelForm
from lexibit.packing import unpack, unpack_rows

# Codes decoded at a time: the scratch space (codes, indices) stays near 10 MB for any weight.
_CHUNK = 1 << 20


def decode(codes: Tensor, levels: Tensor, shape: list[int], bits: int, block: list[int], form: str) -> Tensor:
    """The weight, ``shape`` in the dtype of ``levels``."""
    groups = Groups(*matrix_shape(tuple(shape)), (block[0], block[1]))
    out = levels.new_empty(groups.rows, groups.columns)
    if out.numel() == 0:
        return out.view(shape)
    table = LevelForm(form).expand(levels, bits)
    # eight rows of codes are whole bytes: a chunk that begins there begins at a byte
    step = max(_CHUNK // (8 * groups.columns), 1) * 8
    for start in range(0, groups.rows, step):
        stop = min(start + step, groups.rows)
        first = start * groups.columns * bits // 8
        part = unpack(codes[first:], bits, (stop - start) * groups.columns)
        rows = torch.arange(start, stop, device=codes.device)
        out[start:stop] = groups.lookup(part.view(-1, groups.columns), table, rows)
    return out.view(shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The very call that the float module makes, so that the results agree to the last bit."""
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], weight.shape[1])


def embedding(
    ids: Tensor,
    codes: Tensor,
    levels: Tensor,
    shape: list[int],
    bits: int,
    block: list[int],
    form: str,
) -> Tensor:
    """The rows ``ids`` of the weight: ``[*ids.shape, columns]``."""
    groups = Groups(*matrix_shape(tuple(shape)), (block[0], block[1]))
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"rows are looked up by int64 or int32, not {ids.dtype}")
    rows = ids.reshape(-1).long()
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < groups.rows):
        raise IndexError(f"row {int(rows.min())} or {int(rows.max())} of {groups.rows} rows")
    if rows.numel() * groups.columns == 0:
        return levels.new_empty(*ids.shape, groups.columns)
    row_bits = groups.columns * bits
    if row_bits % 8 == 0:
        picked = codes.view(groups.rows, row_bits // 8)[rows].view(-1)
        part = unpack(picked, bits, len(rows) * groups.columns).view(-1, groups.columns)
    else:
        part = unpack_rows(codes, bits, groups.columns, rows)
    table = LevelForm(form).expand(levels, bits)
    return groups.lookup(part, table, rows).view(*ids.shape, groups.columns)
