"""What a quantized model computes with: float32, or bfloat16 or 8-bit whole numbers, which are faster."""

from __future__ import annotations

import logging
from typing import cast

from torch import nn
from transformers import activations

from lexibit.errors import LexibitError, unknown
from lexibit.nn import QuantizedLinear, codebooks, embeddings, encoder
from lexibit.nn.fused import Done, undo, watched
from lexibit.ops import COMPUTE, native
from lexibit.plan import kind, why_float32
from lexibit.weight import CodebookWeight

_logger = logging.getLogger("lexibit")

# What may be done at once with a product, by the names of lexibit.ops.ACTIVATIONS.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
}

# Where an activation follows a linear layer and nothing else stands between: in BERT and all that are made
# like it, in DistilBERT, and in ALBERT. By the end of the class's name: the names of the two.
_FEED_FORWARD = {
    "Intermediate": ("dense", "intermediate_act_fn"),
    "FFN": ("lin1", "activation"),
    "AlbertLayer": ("ffn", "activation"),
}


def optimize(model: nn.Module, compute: str = "int8") -> dict[str, str]:
    """Choose what a quantized model's products are computed with, in place.

    ``int8`` rounds every token to 8 bits, and every group's levels to 256 steps at most, at each product, and
    adds up whole numbers. ``bfloat16`` rounds both to bfloat16, and adds up in float32: nearer, and slower.
    The activation of a feed-forward layer (GELU) is done with the product in front of it: that linear layer
    alone gives what follows it. Everything else stays in float32. ``float32`` undoes that. What is stored
    does not change, and the model saves as before.

    Products in int8 and bfloat16 have no gradient.

    Args:
        model: with weights in codes.
        compute: ``int8``, ``bfloat16`` or ``float32``.

    Returns:
        The weights whose products stay in float32 although less was asked for, by name, and why.

    Raises:
        LexibitError: another ``compute``, or a model without weights in codes.
    """
    if compute not in COMPUTE:
        raise unknown("compute", compute, COMPUTE)
    weights = codebooks(model)
    if not weights:
        raise LexibitError(f"{type(model).__name__} has no weights in codes: quantize it first")
    undo(model)
    if compute == "float32":
        return {}
    left = {}
    kinds = _kinds(model)
    for name, weight in weights.items():
        if why := why_float32(kinds[weight], weight.spec):
            left[name] = why
        elif kinds[weight] != {"embedding"}:
            weight.compute = compute
    for module in list(model.modules()):
        _fuse(module)
    # what is inside first: an encoder is done in one go if its layers are
    for module in reversed(list(model.modules())) if compute == "int8" else []:
        encoder.fuse(module)
        embeddings.fuse(module)
    if not native.supports(compute):
        _logger.warning(
            "no kernels compute in %s here (%s): PyTorch does, which is slower than float32",
            compute,
            native.chosen().name,
        )
    if left:
        name, why = next(iter(left.items()))
        _logger.warning("%d weights compute in float32: %s, as %s", len(left), name, why)
    return left


def _kinds(model: nn.Module) -> dict[CodebookWeight, set[str]]:
    """What modules do with each weight."""
    found: dict[CodebookWeight, set[str]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if isinstance(child, CodebookWeight):
                found.setdefault(child, set()).add(kind(module, name.removesuffix(CodebookWeight.SUFFIX)))
    return found


def _fuse(module: nn.Module) -> None:
    """Let a linear layer do what follows it, if it is followed by what a kernel can do."""
    for end, (linear, activation) in _FEED_FORWARD.items():
        if not type(module).__name__.endswith(end):
            continue
        layer, function = getattr(module, linear, None), getattr(module, activation, None)
        # a subclass's own forward may do more than a product
        if type(layer) is not QuantizedLinear or layer.weight_codebook.compute == "float32":
            continue
        name = _activation(function)
        if name and not watched(layer) and not watched(cast(nn.Module, function)):
            layer._followed_by = name
            setattr(module, activation, Done(cast(nn.Module, function)))


def _activation(function: object) -> str | None:
    if type(function) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(function.approximate)
    return _ACTIVATIONS.get(type(function)) if isinstance(function, nn.Module) else None
