"""Modules that do in one go, by the kernels, what their own class does module by module.

Such a module changes its class in place, to one that stands in front of its own: what the kernels do not
take is left to that.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from lexibit import ops
from lexibit.nn.layers import QuantizedLinear
from lexibit.ops import native
from lexibit.weight import CodebookWeight

Made = TypeVar("Made", bound="Unchanged")


class Fused(nn.Module):
    """In front of a module's own class.

    Attributes:
        _plain: its own class.
    """

    _plain: type[nn.Module]

    def _current(self, prepare: Callable[[Any], Made | None]) -> Made | None:
        """What it comes to for the kernels, made anew if it was changed; or None, if they do not take it."""
        made: Made | None = self.__dict__.get("_prepared")
        if made is None or not made.holds():
            made = self.__dict__["_prepared"] = prepare(self)
        return made


class Done(nn.Module):
    """In the place of an activation, which the product in front of it does."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


KNOWN = ("torch.nn.", "transformers.", "lexibit.")
"""Where classes come from that do what is known of them; somebody else's may do something else."""
GLOBAL_HOOKS = (_hooks._global_forward_hooks, _hooks._global_forward_pre_hooks)
_OF_TENSORS = (Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous, attrgetter("dtype"))
# what of a module counts beside its children and tensors
_ATTRIBUTES = {
    *("training", "compute", "_followed_by", "_layout"),
    *("config", "scaling", "num_attention_heads", "n_heads", "eps", "normalized_shape"),
}


class Unchanged:
    """Whether a module is what something was made from.

    Looking through a small layer takes longer than computing it: so that is done once, and before each use
    only whether all of it is still the same object in the same place.
    """

    def __init__(self, module: nn.Module) -> None:
        self._choice = native.chosen()
        self._modules = [module, *inside(module)]
        self._types = list(map(type, self._modules))
        self._hooks: list[Any] = list(GLOBAL_HOOKS)
        self._tensors: list[Tensor] = []
        places: list[tuple[dict[str, Any], str, Any]] = []
        for one in self._modules:
            kept: list[dict[str, Any]] = [one._modules, one._parameters, one._buffers]
            places += [(of, name, value) for of in kept for name, value in of.items()]
            attributes = _ATTRIBUTES & one.__dict__.keys()
            if one is not module:  # whose own hooks and forward whoever calls it has seen
                attributes |= {"_forward_hooks", "_forward_pre_hooks"}
                self._hooks += [one._forward_hooks, one._forward_pre_hooks]
                places.append((one.__dict__, "forward", None))
            places += [(one.__dict__, name, one.__dict__[name]) for name in attributes]
            self._tensors += [part for of in kept[1:] for part in of.values() if part is not None]
        self._dicts, self._names, self._values = zip(*places, strict=True)
        self._tensors_were = self._look()

    def _look(self) -> list[list[Any]]:
        """What of tensors may change while they stay the same objects."""
        return [list(map(at, self._tensors)) for at in _OF_TENSORS]

    def holds(self) -> bool:
        """Whether all is as it was."""
        # there are some hundred places to look at: no step of Python's own for each
        return (
            native.unchanged(self._dicts, self._names, self._values)
            and list(map(type, self._modules)) == self._types
            and self._look() == self._tensors_were
            and not any(self._hooks)
            and native.chosen() == self._choice
        )

    def unfollowed(self, *inputs: Tensor) -> bool:
        """Whether nobody follows what is computed with it, as for a gradient."""
        return ops.direct(*inputs, *(self._tensors if torch.is_grad_enabled() else ()))


def inside(module: nn.Module) -> list[nn.Module]:
    """All modules inside another, in their order."""
    found: list[nn.Module] = []
    for child in module._modules.values():
        if child is not None:
            found.append(child)
            found += inside(child)
    return found


def watched(module: nn.Module) -> bool:
    """Whether somebody looks at what a module is given or gives, or changed what it does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def ready(modules: Iterable[nn.Module]) -> bool:
    """Whether modules compute as their classes say, and as they do outside of training."""
    if any(GLOBAL_HOOKS):
        return False
    return not any(watched(one) or (one.training and type(one) not in _SAME_IN_TRAINING) for one in modules)


_SAME_IN_TRAINING = (CodebookWeight, Done)


def as_norm(module: nn.Module | None, columns: int) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and epsilon of a LayerNorm over so many columns, if it is one that the kernels take."""
    if type(module) is not nn.LayerNorm or module.normalized_shape != (columns,):
        return None
    for one in (module.weight, module.bias):
        if one is None or one.dtype != torch.float32 or not one.is_cpu:
            return None
    return module.weight, module.bias, module.eps


def lie_still(tensors: Iterable[Tensor]) -> bool:
    """Whether addresses of tensors may be kept: they are plain ones, and have no gaps."""
    # without grad nothing is said of who follows, here
    with torch.no_grad():
        return all(ops.direct(one) and one.is_contiguous() for one in tensors)


def asked(values: Iterable[Any]) -> bool:
    """Whether any of some arguments says something: is not None, False or 0."""
    return any(value is not None and (not isinstance(value, int) or value != 0) for value in values)


_classes: dict[tuple[type[Fused], type[nn.Module]], type[nn.Module]] = {}


def put(front: type[Fused], module: nn.Module) -> None:
    """Put a class in front of a module's own, in place."""
    module.__class__ = _class(front, type(module))


def is_fused(module: nn.Module | None, front: type[Fused]) -> bool:
    """Whether a class stands in front of a module's own, and none in front of that."""
    return type(module) in _made and isinstance(module, front)


_made: set[type[Any]] = set()


def _class(front: type[Fused], plain: type[nn.Module]) -> type[nn.Module]:
    if (front, plain) not in _classes:
        body = {"__module__": plain.__module__, "__reduce_ex__": _reduce, "_front": front, "_plain": plain}
        made: Any = type(f"Fused{plain.__name__}", (front, plain), body)
        _classes[front, plain] = made
        _made.add(made)
    return _classes[front, plain]


def _reduce(fused: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle and copy a module whose class was made here, and stands in no file, by its own class."""
    state = {name: value for name, value in fused.__dict__.items() if name != "_prepared"}
    if type(fused) not in _made:  # somebody's subclass of that
        return copyreg.__newobj__, (type(fused),), state  # type: ignore[attr-defined]
    return _blank, (fused._front, fused._plain), state


def _blank(front: type[Fused], plain: type[nn.Module]) -> nn.Module:
    made = _class(front, plain)
    return made.__new__(made)


def unfuse(module: nn.Module) -> None:
    """Undo :func:`put`."""
    if type(module) in _made:
        plain: Any = module._plain
        module.__class__ = plain
        for name in ("_inside", "_prepared"):
            module.__dict__.pop(name, None)


def undo(model: nn.Module) -> None:
    """Let a model's weights compute in float32, and each module do its own work."""
    for module in list(model.modules()):
        unfuse(module)
        if isinstance(module, CodebookWeight):
            module.__dict__.pop("compute", None)
        if isinstance(module, QuantizedLinear):
            module.__dict__.pop("_followed_by", None)
        for name, child in list(module._modules.items()):
            if isinstance(child, Done):
                setattr(module, name, child.activation)
