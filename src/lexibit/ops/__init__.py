"""The three things one does with a weight in codes: decode it, multiply with it, look rows up.

Each is a PyTorch custom operator (``torch.ops.lexibit.*``) with a fake kernel for ``torch.compile``
and gradients, of what goes in and of the levels. The C++ kernels of :mod:`lexibit.ops.native` compute what
they support; all else takes the reference, plain PyTorch on any device.

All take a weight as the parts and the layout that :class:`lexibit.ops.reference.Stored` names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lexibit.errors import LexibitError
from lexibit.groups import matrix_shape
from lexibit.ops import native, reference
from lexibit.ops.native import kernels as kernels
from lexibit.ops.reference import ACTIVATIONS as ACTIVATIONS
from lexibit.ops.reference import Stored

COMPUTE = ("float32", "bfloat16", "int8")
"""What products may be computed with."""

# a weight in an operator's schema, as Stored has it
_WEIGHT = (
    "Tensor codes, Tensor levels, Tensor? origins, Tensor? mask, Tensor? outliers, Tensor? gaps, "
    "SymInt[] shape, SymInt bits, SymInt[] block, str form, SymInt[] extra"
)


def _decode(*weight: Any) -> Tensor:
    """The weight: ``shape`` in the dtype of ``levels``."""
    stored = Stored(*weight)
    return native.decode(stored) if native.takes(stored) else reference.decode(stored)


decode_op = torch.library.custom_op(
    "lexibit::decode", _decode, mutates_args=(), schema=f"({_WEIGHT}) -> Tensor"
)


@decode_op.register_fake
def _(*weight: Any) -> Tensor:
    stored = Stored(*weight)
    return stored.levels.new_empty(stored.shape)


def _linear(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    """``x @ W.T + bias`` (``x @ W + bias`` if ``transposed``), with ``W`` decoded, in the dtype of ``x``."""
    *parts, transposed = weight
    stored = Stored(*parts)
    if native.takes(stored, x, bias):
        return native.linear(x, stored, bias, transposed)
    decoded = reference.decode(stored)
    with torch.autocast(x.device.type, enabled=False):
        return reference.linear(x, decoded.to(x.dtype), bias, transposed)


linear_op = torch.library.custom_op(
    "lexibit::linear",
    _linear,
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {_WEIGHT}, bool transposed) -> Tensor",
)


@linear_op.register_fake
def _(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    *stored, transposed = weight
    return x.new_empty((*x.shape[:-1], Stored(*stored).shape[1 if transposed else 0]))


def _linear_rounded(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    """``activation(x @ W.T + bias)``, with tokens and levels rounded to bfloat16, or to 8 bits."""
    *parts, activation, compute = weight
    stored = Stored(*parts)
    if native.takes_rounded(compute, stored, x, bias):
        return native.linear_rounded(x, stored, bias, activation, compute)
    with torch.autocast(x.device.type, enabled=False):
        return reference.linear_rounded(x, stored, bias, activation, compute)


linear_rounded_op = torch.library.custom_op(
    "lexibit::linear_rounded",
    _linear_rounded,
    mutates_args=(),
    schema=f"(Tensor x, Tensor? bias, {_WEIGHT}, str activation, str compute) -> Tensor",
)


@linear_rounded_op.register_fake
def _(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    *stored, _activation, _compute = weight
    return x.new_empty((*x.shape[:-1], Stored(*stored).shape[0]))


def _embedding(ids: Tensor, *weight: Any) -> Tensor:
    """The rows ``ids`` of the weight; only they are decoded."""
    stored = Stored(*weight)
    if ids.is_cpu and native.takes(stored):
        return native.embedding(ids, stored)
    return reference.embedding(ids, stored)


embedding_op = torch.library.custom_op(
    "lexibit::embedding", _embedding, mutates_args=(), schema=f"(Tensor ids, {_WEIGHT}) -> Tensor"
)


@embedding_op.register_fake
def _(ids: Tensor, *weight: Any) -> Tensor:
    stored = Stored(*weight)
    return stored.levels.new_empty((*ids.shape, matrix_shape(tuple(stored.shape))[1]))


@torch.library.custom_op(
    "lexibit::levels_gradient", mutates_args=(), schema=f"(Tensor gradient, Tensor? ids, {_WEIGHT}) -> Tensor"
)
def levels_gradient_op(gradient: Tensor, ids: Tensor | None, *weight: Any) -> Tensor:
    """The gradient of the levels from that of the weight, or of its rows ``ids``."""
    return reference.levels_gradient(gradient, ids, Stored(*weight))


@levels_gradient_op.register_fake
def _(gradient: Tensor, ids: Tensor | None, *weight: Any) -> Tensor:
    levels = Stored(*weight).levels
    return torch.empty_like(levels)


# Gradients. The packed weight is kept for the backward pass, never the decoded one; codes have no gradient.
# A weight's parts come first, the levels second of them.
_PARTS = 6
_LEVELS = 1


def _of_weight(ctx: Any, first: int, gradient: Callable[[], Tensor], ids: Tensor | None = None) -> list[Any]:
    """The gradients of a weight's parts and layout, which stand from an operator's input ``first`` on."""
    found: list[Any] = [None] * len(ctx.weight_layout) + [None] * _PARTS
    if ctx.needs_input_grad[first + _LEVELS]:
        found[_LEVELS] = levels_gradient_op(gradient(), ids, *ctx.saved_tensors[:_PARTS], *ctx.weight_layout)
    return found


def _setup_decode(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:_PARTS])
    ctx.weight_layout = inputs[_PARTS:]


def _decode_backward(ctx, grad):  # type: ignore[no-untyped-def]
    return tuple(_of_weight(ctx, 0, lambda: grad))


def _setup_embedding(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ids, *weight = inputs
    ctx.save_for_backward(*weight[:_PARTS], ids)
    ctx.weight_layout = weight[_PARTS:]


def _embedding_backward(ctx, grad):  # type: ignore[no-untyped-def]
    return None, *_of_weight(ctx, 1, lambda: grad, ctx.saved_tensors[_PARTS])


def _setup_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, _, *weight, transposed = inputs
    # what the levels' gradient is worked out from
    ctx.save_for_backward(*weight[:_PARTS], x if weight[_LEVELS].requires_grad else None)
    ctx.weight_layout, ctx.transposed = weight[_PARTS:], transposed


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    *parts, x = ctx.saved_tensors
    grad_x = grad_bias = None
    flat = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        weight = decode_op(*parts, *ctx.weight_layout).to(grad.dtype)
        grad_x = grad @ (weight.t() if ctx.transposed else weight)
    if ctx.needs_input_grad[1]:
        grad_bias = flat.sum(0)

    def of_weight() -> Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        product: Tensor = inputs.t() @ flat if ctx.transposed else flat.t() @ inputs
        return product

    # nothing for the flag
    return grad_x, grad_bias, *_of_weight(ctx, 2, of_weight), None


def _linear_rounded_backward(ctx, grad):  # type: ignore[no-untyped-def]
    raise LexibitError(
        "products in int8 or bfloat16 have no gradient: train with lexibit.optimize(model, "
        "compute='float32'), or evaluate under torch.inference_mode()"
    )


decode_op.register_autograd(_decode_backward, setup_context=_setup_decode)
embedding_op.register_autograd(_embedding_backward, setup_context=_setup_embedding)
linear_op.register_autograd(_linear_backward, setup_context=_setup_linear)
linear_rounded_op.register_autograd(_linear_rounded_backward)

# What callers use. Where nobody follows what an operator does, it is done at once: a small product takes less
# time than an operator's way through PyTorch.


def decode(*weight: Any) -> Tensor:
    """:func:`decode_op`."""
    do: Callable[..., Tensor] = _decode if direct(weight[_LEVELS]) else decode_op
    return do(*weight)


def linear(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    """:func:`linear_op`."""
    do: Callable[..., Tensor] = _linear if direct(x, bias, weight[_LEVELS]) else linear_op
    return do(x, bias, *weight)


def linear_rounded(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    """:func:`linear_rounded_op`."""
    do: Callable[..., Tensor] = _linear_rounded if direct(x, bias, weight[_LEVELS]) else linear_rounded_op
    return do(x, bias, *weight)


def embedding(ids: Tensor, *weight: Any) -> Tensor:
    """:func:`embedding_op`."""
    do: Callable[..., Tensor] = _embedding if direct(ids, weight[_LEVELS]) else embedding_op
    return do(ids, *weight)


def direct(*inputs: Tensor | None) -> bool:
    """Whether nobody follows what is computed, as a gradient, a compiler, a tracer or a mode would."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    followed = torch.is_grad_enabled()
    for one in inputs:
        if one is not None and ((followed and one.requires_grad) or type(one) not in _PLAIN or one.is_neg()):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)


def members(*weight: Any) -> Tensor:
    """How many weights have each code, zeros of a mask left out: float64 ``[groups, 2**bits]``."""
    return reference.members(Stored(*weight))
