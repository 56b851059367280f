"""The three things one does with a weight in codes: decode it, multiply with it, look rows up.

Each is a PyTorch custom operator (``torch.ops.lexibit.*``) with a fake kernel for ``torch.compile``
and, for ``linear``, a gradient. The implementation here is the reference, plain PyTorch on any device;
a faster one for a device is added with ``linear_op.register_kernel("cpu")`` and must agree with it.

All take a weight as the parts and the layout that :class:`lexibit.ops.reference.Stored` names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lexibit.groups import matrix_shape
from lexibit.ops import reference
from lexibit.ops.reference import Stored

# a weight in an operator's schema, as Stored has it
_WEIGHT = (
    "Tensor codes, Tensor levels, Tensor? origins, Tensor? mask, "
    "SymInt[] shape, SymInt bits, SymInt[] block, str form, SymInt[] extra"
)


@torch.library.custom_op("lexibit::decode", mutates_args=(), schema=f"({_WEIGHT}) -> Tensor")
def decode_op(*weight: Any) -> Tensor:
    """The weight: ``shape`` in the dtype of ``levels``."""
    return reference.decode(Stored(*weight))


@decode_op.register_fake
def _(*weight: Any) -> Tensor:
    stored = Stored(*weight)
    return stored.levels.new_empty(stored.shape)


@torch.library.custom_op(
    "lexibit::linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {_WEIGHT}, bool transposed) -> Tensor",
)
def linear_op(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    """``x @ W.T + bias`` (``x @ W + bias`` if ``transposed``), with ``W`` decoded, in the dtype of ``x``."""
    *stored, transposed = weight
    decoded = reference.decode(Stored(*stored))
    with torch.autocast(x.device.type, enabled=False):
        return reference.linear(x, decoded.to(x.dtype), bias, transposed)


@linear_op.register_fake
def _(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    *stored, transposed = weight
    return x.new_empty((*x.shape[:-1], Stored(*stored).shape[1 if transposed else 0]))


@torch.library.custom_op("lexibit::embedding", mutates_args=(), schema=f"(Tensor ids, {_WEIGHT}) -> Tensor")
def embedding_op(ids: Tensor, *weight: Any) -> Tensor:
    """The rows ``ids`` of the weight; only they are decoded."""
    return reference.embedding(ids, Stored(*weight))


@embedding_op.register_fake
def _(ids: Tensor, *weight: Any) -> Tensor:
    stored = Stored(*weight)
    return stored.levels.new_empty((*ids.shape, matrix_shape(tuple(stored.shape))[1]))


def _setup_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, *stored, transposed = inputs
    # the packed weight is kept for the backward pass, never the decoded one
    parts = len(Stored(*stored).parts)
    ctx.save_for_backward(*stored[:parts])
    ctx.layout, ctx.transposed = stored[parts:], transposed


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_x = grad_bias = None
    stored = (*ctx.saved_tensors, *ctx.layout)
    if ctx.needs_input_grad[0]:
        weight = decode_op(*stored).to(grad.dtype)
        grad_x = grad @ (weight.t() if ctx.transposed else weight)
    if ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    # nothing for the weight, and for the flag
    return grad_x, grad_bias, *[None] * len(stored), None


linear_op.register_autograd(_linear_backward, setup_context=_setup_linear)

# what callers use: the registered operators, with types
decode: Callable[..., Tensor] = decode_op
linear: Callable[..., Tensor] = linear_op
embedding: Callable[..., Tensor] = embedding_op
