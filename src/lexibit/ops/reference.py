"""The operators in plain PyTorch: right everywhere, and what every faster kernel is tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lexibit.groups import Groups, matrix_shape
from lexibit.levels import LevelForm
from lexibit.packing import unpack, unpack_places, unpack_rows

# Codes decoded at a time: the scratch space (codes, indices) stays near 10 MB for any weight.
_CHUNK = 1 << 20


class Stored(NamedTuple):
    """A weight as the operators take it: its parts, then its layout.

    Attributes:
        codes: packed codes of the stored matrix, uint8.
        levels: ``[groups, width]``.
        origins: int32 ``[sum(extra)]``, what each extra row or column is added to; or None.
        mask: packed bits, uint8, 1 for a weight that is zero; or None.
        outliers: what is added to a few weights, in the dtype of the levels; or None.
        gaps: how many weights lie in front of each of these, behind the one before it: uint16; or None.
        shape: the weight's own.
        bits: width of a code.
        block: rows and columns of a group.
        form: of the levels (see :mod:`lexibit.levels`).
        extra: how many rows and columns are stored behind its own.
    """

    codes: Tensor
    levels: Tensor
    origins: Tensor | None
    mask: Tensor | None
    outliers: Tensor | None
    gaps: Tensor | None
    shape: list[int]
    bits: int
    block: list[int]
    form: str
    extra: list[int]

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """The tensors."""
        return self[:6]

    @property
    def groups(self) -> Groups:
        """The groups of the stored matrix."""
        rows, columns = matrix_shape(tuple(self.shape))
        return Groups(rows + self.extra[0], columns + self.extra[1], (self.block[0], self.block[1]))

    def table(self) -> Tensor:
        """The levels, expanded: ``[groups, 2**bits]``."""
        return LevelForm(self.form).expand(self.levels, self.bits)


def decode(weight: Stored) -> Tensor:
    """The weight, ``shape`` in the dtype of ``levels``."""
    groups = weight.groups
    out = weight.levels.new_empty(groups.rows, groups.columns)
    table = weight.table()
    for rows, codes in _unpacked(weight):
        out[rows[0] : rows[-1] + 1] = groups.lookup(codes, table, rows)
    for axis in (0, 1):
        if weight.extra[axis] and weight.origins is not None:
            out = _add_extra(out, weight.origins, axis)
    if weight.mask is not None:
        out.masked_fill_(unpack(weight.mask, 1, out.numel()).view(out.shape).bool(), 0.0)
    return add_outliers(out.view(weight.shape), weight)


def add_outliers(decoded: Tensor, weight: Stored) -> Tensor:
    """What the codes say, and the outliers added to it, in place."""
    if weight.outliers is not None and weight.gaps is not None:
        decoded.view(-1).index_add_(0, unpack_places(weight.gaps), weight.outliers)
    return decoded


def add_outliers_of_rows(looked_up: Tensor, rows: Tensor, weight: Stored) -> Tensor:
    """What the codes say of some rows, ``[n, columns]``, and the outliers in them added to it, in place."""
    if weight.outliers is None or weight.gaps is None:
        return looked_up
    columns = looked_up.shape[1]
    places = unpack_places(weight.gaps)
    ends = torch.stack([rows, rows + 1]) * columns
    first, end = torch.searchsorted(places, ends)
    count = end - first
    to = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    behind = count.cumsum(0) - count
    mine = torch.arange(len(to), device=rows.device) - (behind - first)[to]
    flat = looked_up.view(-1)
    flat.index_add_(0, to * columns + places[mine] % columns, weight.outliers[mine])
    return looked_up


def _unpacked(weight: Stored, ids: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """The stored matrix, or the rows ``ids`` of it, a chunk at a time.

    Returns:
        Which rows (int64 ``[n]``), and their codes (uint8 ``[n, columns]``).
    """
    groups, bits = weight.groups, weight.bits
    if groups.rows * groups.columns == 0:
        return
    # eight rows of codes are whole bytes: a chunk that begins there begins at a byte
    step = max(_CHUNK // (8 * groups.columns), 1) * 8
    if ids is not None:
        wanted = ids.reshape(-1).long()
        for start in range(0, len(wanted), step):
            rows = wanted[start : start + step]
            yield rows, _rows(weight.codes, bits, groups, rows)
        return
    for start in range(0, groups.rows, step):
        rows = torch.arange(start, min(start + step, groups.rows), device=weight.codes.device)
        first = start * groups.columns * bits // 8
        codes = unpack(weight.codes[first:], bits, len(rows) * groups.columns)
        yield rows, codes.view(-1, groups.columns)


def _add_extra(stored: Tensor, origins: Tensor, axis: int) -> Tensor:
    """The matrix without its extra rows (axis 0) or columns (axis 1), each added to its origin."""
    own = stored.shape[axis] - len(origins)
    # contiguous, so that it is a weight like any other
    kept = stored.narrow(axis, 0, own).contiguous()
    return kept.index_add_(axis, origins, stored.narrow(axis, own, len(origins)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The very call that the float module makes, so that the results agree to the last bit."""
    if not transposed:
        if x.dim() < 3 or x.is_contiguous():
            return F.linear(x, weight, bias)
        # what F.linear makes of such an x if the weight is a parameter that is trained, as it is elsewhere
        folded = (x.reshape(-1, x.shape[-1]) @ weight.t()).view(*x.shape[:-1], weight.shape[0])
        return folded if bias is None else folded.add_(bias)
    flat = x.reshape(-1, x.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], weight.shape[1])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""What may follow a product at once."""

# What a token's greatest magnitude counts as at least: the inverse of a smaller one would be infinite.
_LEAST = 2.0**-100


def linear_rounded(x: Tensor, weight: Stored, bias: Tensor | None, activation: str, compute: str) -> Tensor:
    """``activation(x @ W.T + bias)`` with the tokens and the levels rounded, float32.

    In bfloat16 all are rounded to the nearest. In int8 we chose: a token's numbers become multiples of 1/127
    of its greatest magnitude, a group's levels go in equal steps from its least to its greatest, 255 or so
    many fewer that an even grid lies on whole ones (252 with 3 bits); both are rounded to the nearest, and
    whole numbers are added up. There a token with a number that is not finite
    gives NaN, and so does a row with such a level. Outliers meet the tokens as they are, in float32.
    """
    table = weight.table().to(x.dtype)
    if compute == "int8":
        (rounded, scale), levels = rounded_tokens(x), rounded_levels(table)
    else:
        (rounded, levels), scale = (one.bfloat16().to(x.dtype) for one in (x, table)), x.new_ones(())
    in_codes = weight._replace(levels=levels, form=LevelForm.TABLE.value, outliers=None, gaps=None)
    decoded = decode(in_codes)
    product = linear(rounded, decoded, None, False) * scale
    if weight.outliers is not None:
        own = weight._replace(outliers=weight.outliers.to(decoded.dtype))
        beside = add_outliers(torch.zeros_like(decoded), own)
        product = product + linear(x, beside.to(x.dtype), None, False)
    return ACTIVATIONS[activation](product if bias is None else product + bias)


def rounded_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, like ``x``, and what they are to be multiplied with: ``[..., 1]``."""
    if not x.shape[-1]:
        return x, x.new_zeros(*x.shape[:-1], 1)
    most = x.abs().amax(-1, keepdim=True).clamp(min=_LEAST)
    finite = most.isfinite()
    # a plain number over a tensor would be its inverse times the number, and rounded twice
    rounded = (x * (x.new_tensor(127.0) / most)).round().where(finite, 0.0)
    return rounded, (most / 127.0).where(finite, torch.nan)


def rounded_levels(table: Tensor) -> Tensor:
    """The levels of each group, one of 256 evenly spaced numbers at most each: ``[groups, 2**bits]``."""
    low, high = table.aminmax(dim=-1, keepdim=True)
    extent = high - low
    between = table.shape[-1] - 1
    steps = float(255 // between * between)
    inverse = (table.new_tensor(steps) / extent).where(extent > _LEAST, 0.0)
    levels = low + ((table - low) * inverse).round() * (extent / steps)
    return levels.where(table.isfinite().all(-1, keepdim=True), torch.nan)


def embedding(ids: Tensor, weight: Stored) -> Tensor:
    """The rows ``ids`` of the weight: ``[*ids.shape, columns]``."""
    rows, columns = matrix_shape(tuple(weight.shape))
    wanted = checked_rows(ids, rows)
    if wanted.numel() * columns == 0:
        return weight.levels.new_empty(*ids.shape, columns)
    if weight.extra[0]:
        # any row may have extra ones behind the last
        return decode(weight).view(rows, columns)[wanted].view(*ids.shape, columns)
    groups = weight.groups
    out = groups.lookup(_rows(weight.codes, weight.bits, groups, wanted), weight.table(), wanted)
    if weight.origins is not None:
        out = _add_extra(out, weight.origins, 1)
    if weight.mask is not None:
        zero = _rows(weight.mask, 1, Groups(rows, columns, (1, columns)), wanted)
        out.masked_fill_(zero.bool(), 0.0)
    out = add_outliers_of_rows(out, wanted, weight)
    return out.view(*ids.shape, columns)


def checked_rows(ids: Tensor, rows: int) -> Tensor:
    """The numbers of rows that are looked up, int64 ``[n]``.

    Raises:
        TypeError: they are no whole numbers.
        IndexError: some are not from 0 to ``rows - 1``.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"rows are looked up by int64 or int32, not {ids.dtype}")
    wanted = ids.reshape(-1).long()
    if wanted.numel() and not (int(wanted.min()) >= 0 and int(wanted.max()) < rows):
        first = wanted[(wanted < 0) | (wanted >= rows)][0]
        raise IndexError(f"row {int(first)} of {rows} rows")
    return wanted


def levels_gradient(gradient: Tensor, ids: Tensor | None, weight: Stored) -> Tensor:
    """The gradient of the levels: each weight's, added up over the weights that a number stands for.

    Args:
        gradient: of the weight, in its shape; or of the rows ``ids``, ``[*ids.shape, columns]``.
        ids: which rows; None for all, once each.
        weight: the weight.

    Returns:
        Like the levels.
    """
    groups, width = weight.groups, 1 << weight.bits
    # float64, and one addition after the other: the same sums whatever the number of threads
    sums = torch.zeros(groups.count * width, dtype=torch.float64, device=gradient.device)
    for rows, codes, part in _with_gradient(gradient, ids, weight):
        sums.index_add_(0, groups.entry(codes, width, rows).view(-1), part.reshape(-1).double())
    table = sums.view(groups.count, width)
    levels = LevelForm(weight.form).pull_back(table, weight.levels, weight.bits)
    return levels.to(weight.levels.dtype)


def members(weight: Stored) -> Tensor:
    """How many weights have each code, zeros of a mask left out: float64 ``[groups, 2**bits]``."""
    one = torch.ones((), device=weight.codes.device).expand(weight.shape)
    as_table = weight._replace(levels=weight.levels.double(), form=LevelForm.TABLE)
    return levels_gradient(one, None, as_table)


def _with_gradient(
    gradient: Tensor, ids: Tensor | None, weight: Stored
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The stored matrix a chunk at a time: which rows, their codes, and their gradients."""
    rows, columns = matrix_shape(tuple(weight.shape))
    gradient = gradient.reshape(-1, columns)
    if ids is not None and (weight.extra[0] or weight.mask is not None):
        # rows behind the last have a part in them, or some of their weights have none
        gradient = gradient.new_zeros(rows, columns).index_add_(0, ids.reshape(-1).long(), gradient)
        ids = None
    if weight.mask is not None:
        zero = unpack(weight.mask, 1, gradient.numel()).view(gradient.shape).bool()
        gradient = gradient.masked_fill(zero, 0.0)
    extra = None if weight.origins is None else weight.origins.long()
    origin = torch.arange(rows, device=gradient.device)
    if extra is not None and weight.extra[0]:
        origin = torch.cat([origin, extra])
    done = 0
    for at, codes in _unpacked(weight, ids):
        part = gradient[origin[at]] if ids is None else gradient[done : done + len(at)]
        done += len(at)
        if extra is not None and weight.extra[1]:
            # an extra column is added to its origin, and has the gradient of it
            part = torch.cat([part, part[:, extra]], dim=1)
        yield at, codes, part


def _rows(packed: Tensor, bits: int, groups: Groups, rows: Tensor) -> Tensor:
    """Some rows of a packed matrix, without unpacking the others: uint8 ``[n, columns]``."""
    row_bits = groups.columns * bits
    if row_bits % 8:
        return unpack_rows(packed, bits, groups.columns, rows)
    picked = packed.view(groups.rows, row_bits // 8)[rows].view(-1)
    return unpack(picked, bits, len(rows) * groups.columns).view(-1, groups.columns)
