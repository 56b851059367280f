"""The operators of :mod:`lexibit.ops` in ONNX.

torch.onnx goes by the functions' annotations: the parts of a weight are values of the graph, its layout
are plain numbers. The graph computes in float32, so that nothing is converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnxscript import opset18 as op

from lexibit.groups import Groups, matrix_shape
from lexibit.levels import LevelForm
from lexibit.packing import packed_bytes

OPSET = 18

_CODES_IN_A_UNIT = 8
# onnx.TensorProto's numbers
_UINT8, _INT32, _INT64, _BOOL = 2, 6, 7, 9


def translations() -> dict[Any, Any]:
    """What torch.onnx is to make of each of our operators."""
    return {
        torch.ops.lexibit.decode.default: _decode,
        torch.ops.lexibit.linear.default: _linear,
        torch.ops.lexibit.embedding.default: _embedding,
    }


def _decode(
    codes: Any,
    levels: Any,
    origins: Any,
    mask: Any,
    outliers: Any,
    gaps: Any,
    shape: Sequence[int],
    bits: int,
    block: Sequence[int],
    form: str,
    extra: Sequence[int],
) -> Any:
    groups = _groups(shape, block, extra)
    own = matrix_shape(tuple(shape))
    plain = op.Reshape(_unpack(codes, bits, groups.rows * groups.columns), _ints(groups.rows, groups.columns))
    rows = op.Unsqueeze(op.Range(*(_int(number) for number in (0, groups.rows, 1))), _ints(1))
    found = _look_up(plain, rows, levels, bits, groups, form)
    for axis, count in enumerate(extra):
        if count:
            kept = op.Slice(found, _ints(0), _ints(own[axis]), _ints(axis))
            more = op.Slice(found, _ints(own[axis]), _ints(own[axis] + count), _ints(axis))
            along = [1, 1]
            along[axis] = count
            places = op.Expand(op.Reshape(op.Cast(origins, to=_INT64), _ints(*along)), op.Shape(more))
            found = op.ScatterElements(kept, places, more, axis=axis, reduction="add")
    if mask is not None:
        zero = op.Reshape(op.Cast(_unpack(mask, 1, own[0] * own[1]), to=_BOOL), _ints(*own))
        found = op.Where(zero, op.Constant(value_float=0.0), found)
    if outliers is not None:
        places = op.Sub(op.CumSum(op.Add(op.Cast(gaps, to=_INT64), _ints(1)), _ints(0)), _ints(1))
        flat = op.Reshape(found, _ints(-1))
        found = op.ScatterElements(flat, places, outliers, axis=0, reduction="add")
    return op.Reshape(found, _ints(*shape))


def _linear(
    x: Any,
    bias: Any,
    codes: Any,
    levels: Any,
    origins: Any,
    mask: Any,
    outliers: Any,
    gaps: Any,
    shape: Sequence[int],
    bits: int,
    block: Sequence[int],
    form: str,
    extra: Sequence[int],
    transposed: bool,
) -> Any:
    weight = _decode(codes, levels, origins, mask, outliers, gaps, shape, bits, block, form, extra)
    product = op.MatMul(x, weight if transposed else op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _embedding(
    ids: Any,
    codes: Any,
    levels: Any,
    origins: Any,
    mask: Any,
    outliers: Any,
    gaps: Any,
    shape: Sequence[int],
    bits: int,
    block: Sequence[int],
    form: str,
    extra: Sequence[int],
) -> Any:
    own = matrix_shape(tuple(shape))
    if origins is not None or mask is not None or outliers is not None:
        weight = _decode(codes, levels, origins, mask, outliers, gaps, shape, bits, block, form, extra)
        return op.Gather(op.Reshape(weight, _ints(*own)), ids, axis=0)
    # the codes of all rows, one a byte, are what a runtime may keep; levels are looked up for those asked for
    plain = op.Reshape(_unpack(codes, bits, own[0] * own[1]), _ints(*own))
    rows = op.Unsqueeze(op.Cast(ids, to=_INT32), _ints(-1))
    return _look_up(op.Gather(plain, ids, axis=0), rows, levels, bits, _groups(shape, block, extra), form)


def _groups(shape: Sequence[int], block: Sequence[int], extra: Sequence[int]) -> Groups:
    rows, columns = matrix_shape(tuple(shape))
    return Groups(rows + extra[0], columns + extra[1], (block[0], block[1]))


def _ints(*values: int) -> Any:
    """A constant: int64, one axis."""
    return op.Constant(value_ints=list(values))


def _int(value: int) -> Any:
    """A constant: int32, a number."""
    return op.Cast(op.Constant(value_int=value), to=_INT32)


def _bytes(*values: int) -> Any:
    """A constant: uint8, one axis."""
    return op.Cast(_ints(*values), to=_UINT8)


def _unpack(packed: Any, bits: int, count: int) -> Any:
    """What :func:`lexibit.packing.unpack` does, a byte a code at any time."""
    units = -(-count // _CODES_IN_A_UNIT)
    stream = packed
    if missing := units * bits - packed_bytes(count, bits):
        stream = op.Concat(stream, _bytes(*[0] * missing), axis=0)
    stream = op.Reshape(stream, _ints(units, bits))
    places = [divmod(code * bits, 8) for code in range(_CODES_IN_A_UNIT)]
    shifts = [shift for _, shift in places]
    low = op.Gather(stream, _ints(*(byte for byte, _ in places)), axis=1)
    codes = op.BitShift(low, _bytes(*shifts), direction="RIGHT")
    if 8 % bits:
        # a code may straddle two bytes, but for the last of a unit
        high = op.Gather(stream, _ints(*(min(byte + 1, bits - 1) for byte, _ in places)), axis=1)
        # in two steps, as none of 8 is allowed
        high = op.BitShift(high, _bytes(*(7 - shift for shift in shifts)), direction="LEFT")
        codes = op.BitwiseOr(codes, op.BitShift(high, _bytes(1), direction="LEFT"))
    flat = op.Reshape(op.BitwiseAnd(codes, _bytes((1 << bits) - 1)), _ints(-1))
    return op.Slice(flat, _ints(0), _ints(count), _ints(0)) if count % _CODES_IN_A_UNIT else flat


def _look_up(codes: Any, rows: Any, levels: Any, bits: int, groups: Groups, form: str) -> Any:
    """What :meth:`lexibit.groups.Groups.lookup` does, of rows ``[..., 1]`` (int32) and their codes."""
    entry = op.Cast(codes, to=_INT32)
    if groups.count > 1:
        height, width = groups.block
        runs = -(-groups.columns // width)
        group = op.Mul(op.Div(rows, _int(height)), _int(runs))
        if runs > 1:
            columns = op.Range(*(_int(number) for number in (0, groups.columns, 1)))
            group = op.Add(group, op.Div(columns, _int(width)))
        entry = op.Add(entry, op.Mul(group, _int(1 << bits)))
    return op.Gather(op.Reshape(_table(levels, bits, form), _ints(-1)), entry, axis=0)


def _table(levels: Any, bits: int, form: str) -> Any:
    """What :meth:`lexibit.levels.LevelForm.expand` does, in the same order of operations."""

    def numbers(values: Sequence[int]) -> Any:
        return op.Constant(value_floats=[float(value) for value in values])

    def number(index: int) -> Any:
        return op.Gather(levels, _ints(index), axis=1)

    codes = range(1 << bits)
    centred = [code - (1 << (bits - 1)) for code in codes]
    if form == LevelForm.TABLE:
        return levels
    if form == LevelForm.SYMMETRIC:
        return op.Mul(levels, numbers(centred))
    if form == LevelForm.AFFINE:
        return op.Add(op.Mul(number(0), numbers(centred)), number(1))
    if form == LevelForm.UNIFORM:
        return op.Mul(number(0), op.Add(numbers(codes), number(1)))
    planes = [numbers([2 * (code >> plane & 1) - 1 for code in codes]) for plane in range(bits)]
    table = op.Mul(number(0), planes[0])
    for plane in range(1, bits):
        table = op.Add(table, op.Mul(number(plane), planes[plane]))
    return table
