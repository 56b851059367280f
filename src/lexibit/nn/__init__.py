"""What replaces a module: the same module, with its weight in codes.

A module changes its class in place. It keeps its identity, so that modules used in several places stay
shared; its hooks, its bias and its other attributes; and its ancestry, so that ``isinstance`` still says
``nn.Linear``. A subclass with a forward pass of its own (BART's scaled embedding, say) keeps that, and
finds ours where it calls ``super().forward``, or a decoded ``.weight`` where it reads that.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lexibit.nn.base import Quantized
from lexibit.nn.fused import undo
from lexibit.nn.layers import (
    QuantizedConv1D,
    QuantizedEmbedding,
    QuantizedGRU,
    QuantizedLinear,
    QuantizedLSTM,
)
from lexibit.weight import CodebookWeight

__all__ = [
    "Quantized",
    "QuantizedConv1D",
    "QuantizedEmbedding",
    "QuantizedGRU",
    "QuantizedLSTM",
    "QuantizedLinear",
    "codebooks",
    "install",
    "restore_all",
]

_LAYERS: dict[type[nn.Module], type[Quantized]] = {
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    Conv1D: QuantizedConv1D,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
}


@cache
def _quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    if issubclass(cls, Quantized):
        return cls
    if cls in _LAYERS:
        return _LAYERS[cls]
    layers = (ours for theirs, ours in _LAYERS.items() if issubclass(cls, theirs))
    base: type[Quantized] = next(layers, Quantized)
    # behind the subclass, so that its forward comes first and its super() is ours
    body = {"__module__": cls.__module__, "__reduce_ex__": _reduce}
    made: Any = type(f"Quantized{cls.__name__}", (cls, base), body)
    return cast(type[nn.Module], made)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle and copy a module whose class was made here, and stands in no file, by its float class."""
    return _blank, (_float_class(type(module)),), module.__dict__


def _blank(cls: type[nn.Module]) -> nn.Module:
    made = _quantized_class(cls)  # type: ignore[arg-type]
    return made.__new__(made)


def _float_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that :func:`install` found, for a class that it made."""
    for theirs, ours in _LAYERS.items():
        if cls is ours:
            return theirs
    made_from = next(base for base in cls.__bases__ if not issubclass(base, Quantized))
    return cast(type[nn.Module], made_from)


def install(module: nn.Module, parameter: str, weight: CodebookWeight) -> None:
    """Replace a parameter of a module by a weight in codes, in place; twice is once."""
    if module._modules.get(parameter + CodebookWeight.SUFFIX) is weight:
        return  # a module used under two names
    old = module._parameters.pop(parameter)
    weight.requires_grad = old is not None and old.requires_grad
    module.__class__ = _quantized_class(type(module))  # type: ignore[arg-type]
    module.add_module(parameter + CodebookWeight.SUFFIX, weight)
    # the list of float weights that nn.RNNBase keeps would keep them alive
    module.__dict__.pop("_flat_weights", None)


def codebooks(model: nn.Module) -> dict[str, CodebookWeight]:
    """Every weight in codes once, by the first of its names."""
    return {
        path.removesuffix(CodebookWeight.SUFFIX): module
        for path, module in model.named_modules()
        if isinstance(module, CodebookWeight)
    }


def restore_all(model: nn.Module) -> None:
    """Undo :func:`install` everywhere: float parameters, decoded once each, where the codes were."""
    undo(model)  # what a product does beside would be lost with it
    decoded: dict[CodebookWeight, nn.Parameter] = {}
    quantized: list[nn.Module] = [module for module in model.modules() if isinstance(module, Quantized)]
    for module in quantized:
        for child_name, child in list(module._modules.items()):
            if isinstance(child, CodebookWeight):
                if child not in decoded:
                    # parameters that can be trained, even if this runs in inference mode
                    with torch.inference_mode(False), torch.no_grad():
                        decoded[child] = nn.Parameter(child.decode(), requires_grad=child.requires_grad)
                del module._modules[child_name]
                module._parameters[child_name.removesuffix(CodebookWeight.SUFFIX)] = decoded[child]
        module.__class__ = _float_class(type(module))
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
