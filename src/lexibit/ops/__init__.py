"""The three things one does with a weight in codes: decode it, multiply with it, look rows up.

Each is a PyTorch custom operator (``torch.ops.lexibit.*``) with a fake kernel for ``torch.compile``
and, for ``linear``, a gradient. The implementation here is the reference, plain PyTorch on any device;
a faster one for a device is added with ``linear_op.register_kernel("cpu")`` and must agree with it.

All take a weight as its parts ``codes`` (uint8, packed), ``levels`` ([groups, width]), ``origins`` (int32,
or None) and ``mask`` (uint8, packed, or None), and its layout: ``shape``, ``bits``, ``block`` (rows and
columns of a group), ``form`` (see :mod:`lexibit.levels`) and ``extra`` (how many rows and columns are stored
behind its own).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lexibit.groups import matrix_shape
from lexibit.ops import reference


@torch.library.custom_op("lexibit::decode", mutates_args=())
def decode_op(
    codes: Tensor,
    levels: Tensor,
    origins: Tensor | None,
    mask: Tensor | None,
    shape: list[int],
    bits: int,
    block: list[int],
    form: str,
    extra: list[int],
) -> Tensor:
    """The weight: ``shape`` in the dtype of ``levels``."""
    return reference.decode(codes, levels, origins, mask, shape, bits, block, form, extra)


@decode_op.register_fake
def _(
    codes: Tensor,
    levels: Tensor,
    origins: Tensor | None,
    mask: Tensor | None,
    shape: list[int],
    bits: int,
    block: list[int],
    form: str,
    extra: list[int],
) -> Tensor:
    return levels.new_empty(shape)


@torch.library.custom_op("lexibit::linear", mutates_args=())
def linear_op(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    levels: Tensor,
    origins: Tensor | None,
    mask: Tensor | None,
    shape: list[int],
    bits: int,
    block: list[int],
    form: str,
    extra: list[int],
    transposed: bool,
) -> Tensor:
    """``x @ W.T + bias`` (``x @ W + bias`` if ``transposed``), with ``W`` decoded, in the dtype of ``x``."""
    weight = reference.decode(codes, levels, origins, mask, shape, bits, block, form, extra)
    with torch.autocast(x.device.type, enabled=False):
        return reference.linear(x, weight.to(x.dtype), bias, transposed)


@linear_op.register_fake
def _(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    levels: Tensor,
    origins: Tensor | None,
    mask: Tensor | None,
    shape: list[int],
    bits: int,
    block: list[int],
    form: str,
    extra: list[int],
    transposed: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[1 if transposed else 0]))


@torch.library.custom_op("lexibit::embedding", mutates_args=())
def embedding_op(
    ids: Tensor,
    codes: Tensor,
    levels: Tensor,
    origins: Tensor | None,
    mask: Tensor | None,
    shape: list[int],
    bits: int,
    block: list[int],
    form: str,
    extra: list[int],
) -> Tensor:
    """The rows ``ids`` of the weight; only they are decoded."""
    return reference.embedding(ids, codes, levels, origins, mask, shape, bits, block, form, extra)


@embedding_op.register_fake
def _(
    ids: Tensor,
    codes: Tensor,
    levels: Tensor,
    origins: Tensor | None,
    mask: Tensor | None,
    shape: list[int],
    bits: int,
    block: list[int],
    form: str,
    extra: list[int],
) -> Tensor:
    return levels.new_empty((*ids.shape, matrix_shape(tuple(shape))[1]))


def _setup_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, *parts_and_layout, transposed = inputs
    # the packed weight is kept for the backward pass, never the decoded one
    ctx.save_for_backward(*parts_and_layout[:4])
    ctx.layout, ctx.transposed = parts_and_layout[4:], transposed


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = decode_op(*ctx.saved_tensors, *ctx.layout).to(grad.dtype)
        grad_x = grad @ (weight.t() if ctx.transposed else weight)
    if ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    # nothing for the four parts, the five layout arguments and the last flag
    return grad_x, grad_bias, *[None] * 10


linear_op.register_autograd(_linear_backward, setup_context=_setup_linear)

# what callers use: the registered operators, with types
decode: Callable[..., Tensor] = decode_op
linear: Callable[..., Tensor] = linear_op
embedding: Callable[..., Tensor] = embedding_op
