"""What a quantized model computes with: float32, or 8-bit whole numbers, which are faster."""

from __future__ import annotations

import logging
from typing import cast

from torch import Tensor, nn
from transformers import activations

from lexibit.errors import LexibitError, unknown
from lexibit.nn import QuantizedLinear, codebooks
from lexibit.nn.encoder import fuse, unfuse
from lexibit.ops import COMPUTE, native
from lexibit.plan import kind, why_float32
from lexibit.weight import CodebookWeight

_logger = logging.getLogger("lexibit")

# What may be done at once with a product, by the names of lexibit.ops.ACTIVATIONS.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
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


class _Done(nn.Module):
    """In the place of an activation, which the product in front of it does."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


def optimize(model: nn.Module, compute: str = "int8") -> dict[str, str]:
    """Choose what a quantized model's products are computed with, in place.

    ``int8`` rounds every token to 8 bits, and every group's levels to 256 steps, at each product, and adds up
    whole numbers; the activation of a feed-forward layer (GELU) is done with the product in front of it.
    Everything else stays in float32. ``float32`` undoes that. What is stored does not change, and the model
    saves as before.

    Products in int8 have no gradient.

    Args:
        model: with weights in codes.
        compute: ``int8`` or ``float32``.

    Returns:
        The weights whose products stay in float32 although int8 was asked for, by name, and why.

    Raises:
        LexibitError: another ``compute``, or a model without weights in codes.
    """
    if compute not in COMPUTE:
        raise unknown("compute", compute, COMPUTE)
    weights = codebooks(model)
    if not weights:
        raise LexibitError(f"{type(model).__name__} has no weights in codes: quantize it first")
    _undo(model, weights)
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
    for module in list(model.modules()):
        fuse(module)
    if not native.has_int8():
        _logger.warning(
            "no kernels compute in int8 here (%s): PyTorch does, which is slower than float32",
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
        name = _ACTIVATIONS.get(type(function)) if isinstance(function, nn.Module) else None
        # a subclass's own forward may do more than a product
        if name and type(layer) is QuantizedLinear and layer.weight_codebook.compute == "int8":
            layer.activation = name
            setattr(module, activation, _Done(cast(nn.Module, function)))


def _undo(model: nn.Module, weights: dict[str, CodebookWeight]) -> None:
    for weight in weights.values():
        weight.__dict__.pop("compute", None)
    for module in list(model.modules()):
        unfuse(module)
        if isinstance(module, QuantizedLinear):
            module.__dict__.pop("activation", None)
        for name, child in list(module._modules.items()):
            if isinstance(child, _Done):
                setattr(module, name, child.activation)
