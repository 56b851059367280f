"""Layers of an encoder done in one go: BERT's, RoBERTa's, DistilBERT's and ALBERT's."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _hooks
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from lexibit import ops
from lexibit.nn.layers import QuantizedLinear
from lexibit.ops import native
from lexibit.ops.reference import Stored
from lexibit.weight import CodebookWeight


class Parts(NamedTuple):
    """What a layer is made of that norms after it adds, by what each does.

    Attributes:
        query, key, value, output: the attention's linear layers.
        up, down: those of the feed-forward part; ``up`` does the activation too.
        attention_norm, norm: LayerNorms of the two parts.
        attention: the module that knows the number of heads and how scores are scaled.
        others: the modules between, of which nothing may be asked.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    up: nn.Module
    down: nn.Module
    attention_norm: nn.Module
    norm: nn.Module
    attention: nn.Module
    others: tuple[nn.Module, ...]

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """The linear layers, in the order in which they run."""
        return self[:6]


def _at(module: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        module = cast(nn.Module, module._modules[name])
    return module


def _family(paths: dict[str, str], others: str) -> Callable[[nn.Module], Parts]:
    def parts(layer: nn.Module) -> Parts:
        found = {part: _at(layer, path) for part, path in paths.items()}
        return Parts(**found, others=tuple(_at(layer, path) for path in others.split()))

    return parts


_BERT = _family(
    {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "norm": "output.LayerNorm",
        "attention": "attention.self",
    },
    "attention attention.output intermediate intermediate.intermediate_act_fn output",
)

_FAMILIES: dict[str, Callable[[nn.Module], Parts]] = {
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "CamembertLayer": _BERT,
    "ElectraLayer": _BERT,
    "TransformerBlock": _family(
        {
            "query": "attention.q_lin",
            "key": "attention.k_lin",
            "value": "attention.v_lin",
            "output": "attention.out_lin",
            "up": "ffn.lin1",
            "down": "ffn.lin2",
            "attention_norm": "sa_layer_norm",
            "norm": "output_layer_norm",
            "attention": "attention",
        },
        "ffn ffn.activation",
    ),
    "AlbertLayer": _family(
        {
            "query": "attention.query",
            "key": "attention.key",
            "value": "attention.value",
            "output": "attention.dense",
            "up": "ffn",
            "down": "ffn_output",
            "attention_norm": "attention.LayerNorm",
            "norm": "full_layer_layer_norm",
            "attention": "attention",
        },
        "activation",
    ),
}


# Encoders that do nothing but one layer after the other, which are their `layer`: what they return.
_ENCODERS: dict[str, Callable[..., Any]] = {
    "BertEncoder": BaseModelOutputWithPastAndCrossAttentions,
    "RobertaEncoder": BaseModelOutputWithPastAndCrossAttentions,
    "XLMRobertaEncoder": BaseModelOutputWithPastAndCrossAttentions,
    "CamembertEncoder": BaseModelOutputWithPastAndCrossAttentions,
    "ElectraEncoder": BaseModelOutputWithPastAndCrossAttentions,
    "Transformer": BaseModelOutput,
}


class Done(nn.Module):
    """In the place of an activation, which the product in front of it does."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x


class FusedLayer(nn.Module):
    """In front of a layer's own class: does in one go what the kernels can, and leaves the rest to it."""

    _plain: type[nn.Module]
    _inside: tuple[type[nn.Module], ...]  # the classes of all modules inside when it was fused
    _prepared: Prepared | None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **more: Any
    ) -> Tensor:
        """The layer's output: ``[texts, tokens, columns]``, like its input."""
        output = None if _asked(others, more) else _in_one_go([self], hidden_states, attention_mask)
        if output is not None:
            return output
        slowly: Tensor = super().forward(hidden_states, attention_mask, *others, **more)
        return slowly

    def _prepare(self) -> Prepared | None:
        """What it comes to for the kernels; or None, if it is not for them."""
        prepared = self._prepared
        if prepared is None or not prepared.holds():
            prepared = self.__dict__["_prepared"] = _prepare(self)
        return prepared


class FusedEncoder(nn.Module):
    """In front of an encoder's own class: does all its layers in one go, or leaves each to do what it can."""

    _plain: type[nn.Module]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **more: Any
    ) -> Any:
        """The last layer's output, as the encoder's own class returns it."""
        layers = [*cast(nn.Module, self._modules["layer"])._modules.values()]
        if layers and not _asked(others, more) and not any(map(_differs, layers)):
            output = _in_one_go(cast(list[FusedLayer], layers), hidden_states, attention_mask)
            if output is not None:
                return _ENCODERS[self._plain.__name__](last_hidden_state=output)
        return super().forward(hidden_states, attention_mask, *others, **more)


def _asked(others: tuple[Any, ...], more: dict[str, Any]) -> bool:
    """Whether anybody wants more of a layer than its output; attention does not ask for positions."""
    asked = (*others, *(value for name, value in more.items() if name != "position_ids"))
    return any(value is not None and value is not False for value in asked)


def _differs(layer: nn.Module | None) -> bool:
    """Whether a layer may not be left out, as it is not fused or somebody looks at it."""
    return type(layer) not in _classes.values() or watched(cast(nn.Module, layer))


def _in_one_go(layers: list[FusedLayer], x: Tensor, mask: Tensor | None) -> Tensor | None:
    """What layers give, one behind the other; or None, if that is not for the kernels."""
    if not ops.direct(x):
        return None  # a compiler sees no more of this
    do = []
    for layer in layers:
        prepared = layer._prepare()
        if prepared is None or not prepared.takes(x):
            return None
        do.append(prepared.do)
    mask = _additive(mask, x)
    return None if mask is _NOT_TAKEN else native.encode(do, x, mask)


_GLOBAL_HOOKS = (_hooks._global_forward_hooks, _hooks._global_forward_pre_hooks)
_ATTENTIONS = ("eager", "sdpa")  # others may look elsewhere
_WIDTHS = (16, 32, 48, 64)  # of a head
_DTYPE = attrgetter("dtype")
# what of a module counts beside its children and tensors
_ATTRIBUTES = {
    *("training", "compute", "_followed_by", "_layout"),
    *("config", "scaling", "num_attention_heads", "n_heads", "eps", "normalized_shape"),
}


class Prepared:
    """What a layer comes to for the kernels, and what that was made from.

    Looking through a small layer takes longer than computing it: so that is done once, and before each use
    only whether all of it is still the same object in the same place.
    """

    def __init__(self, layer: nn.Module, parts: Parts, do: native.EncoderLayer, hidden: int) -> None:
        modules = [layer, *_modules(layer)]
        self.do = do
        self._hidden = hidden
        self._config: Any = parts.attention.config
        self._choice = native.chosen()
        self._modules, self._types = modules, list(map(type, modules))
        self._hooks: list[Any] = list(_GLOBAL_HOOKS)
        places: list[tuple[dict[str, Any], str, Any]] = []
        self._tensors: list[Tensor] = []
        for one in modules:
            kept: list[dict[str, Any]] = [one._modules, one._parameters, one._buffers]
            places += [(of, name, value) for of in kept for name, value in of.items()]
            attributes = _ATTRIBUTES & one.__dict__.keys()
            if one is not layer:  # whose own hooks and forward whoever calls it has seen
                attributes |= {"_forward_hooks", "_forward_pre_hooks"}
                self._hooks += [one._forward_hooks, one._forward_pre_hooks]
                places.append((one.__dict__, "forward", None))
            places += [(one.__dict__, name, one.__dict__[name]) for name in attributes]
            self._tensors += [part for of in kept[1:] for part in of.values() if part is not None]
        self._namespaces, self._names, self._values = zip(*places, strict=True)
        self._tensors_were = self._look(Tensor.data_ptr), self._look(Tensor.numel), self._look(_DTYPE)

    def _look(self, at: Callable[[Tensor], Any]) -> list[Any]:
        return list(map(at, self._tensors))

    def holds(self) -> bool:
        """Whether all is as it was."""
        # there are some hundred places to look at: no step of Python's own for each
        addresses, counts, dtypes = self._tensors_were
        return (
            native.unchanged(self._namespaces, self._names, self._values)
            and list(map(type, self._modules)) == self._types
            and self._look(Tensor.data_ptr) == addresses
            and self._look(Tensor.numel) == counts
            and self._look(_DTYPE) == dtypes
            and not any(self._hooks)
            and native.chosen() == self._choice
            and self._config._attn_implementation in _ATTENTIONS
        )

    def takes(self, x: Tensor) -> bool:
        """Whether it can be done with this input, and nobody follows what is done."""
        followed = self._tensors if torch.is_grad_enabled() else ()
        return (
            x.dtype == torch.float32
            and x.is_cpu
            and x.dim() == 3
            and x.shape[-1] == self._hidden
            and x.numel() > 0
            and ops.direct(x, *followed)
        )


def _modules(layer: nn.Module) -> list[nn.Module]:
    """All modules inside a layer, in their order."""
    found: list[nn.Module] = []
    for child in layer._modules.values():
        if child is not None:
            found.append(child)
            found += _modules(child)
    return found


def watched(module: nn.Module) -> bool:
    """Whether somebody looks at what a module is given or gives, or changed what it does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


_NOT_TAKEN = object()


def _additive(mask: Tensor | None, x: Tensor) -> Any:
    """A mask as the kernel adds it to the scores, ``[texts, 1 or tokens, tokens]``, or that it is none."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or not ops.direct(mask):
        return _NOT_TAKEN
    texts, tokens = x.shape[:2]
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-1] != tokens or mask.shape[2] not in (1, tokens):
        return _NOT_TAKEN
    if mask.stride(2) == 0 or mask.shape[2] == 1:
        mask = mask[:, :, :1]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
    elif mask.dtype != x.dtype or not mask.is_cpu:
        return _NOT_TAKEN
    return mask[:, 0].expand(texts, -1, -1).contiguous()


def _prepare(layer: FusedLayer) -> Prepared | None:
    """What the kernels take a layer as, if they can do it as it is now."""
    inside = _modules(layer)
    if tuple(map(type, inside)) != layer._inside or layer.training or not native.supports("encoder"):
        return None
    if any(_GLOBAL_HOOKS) or any(watched(one) or (one.training and type(one) not in _OURS) for one in inside):
        return None
    parts = _FAMILIES[layer._plain.__name__](layer)
    config: Any = getattr(parts.attention, "config", None)
    if getattr(config, "_attn_implementation", None) not in _ATTENTIONS:
        return None
    linears: list[tuple[Stored, Tensor | None]] = []
    for linear in parts.linears:
        if type(linear) is not QuantizedLinear:
            return None
        weight = cast(CodebookWeight, linear._modules["weight_codebook"])
        stored, bias = weight.stored(), linear._parameters["bias"]
        if weight.compute != "int8" or not native.takes_rounded("int8", stored, bias):
            return None
        if bias is not None and bias.shape != (stored.shape[0],):
            return None
        linears.append((stored, bias))
    query, key, value, output, up, down = (stored for stored, _ in linears)
    if not query.block[1] == key.block[1] == value.block[1]:
        return None  # tokens are rounded once for the three, with sums over the same runs of columns
    rows, hidden = query.shape
    attention: Any = parts.attention
    heads: int = getattr(attention, "num_attention_heads", None) or attention.n_heads
    fits = (
        query.shape == key.shape == value.shape
        and output.shape == [hidden, rows]
        and up.shape == [down.shape[1], hidden]
        and down.shape[0] == hidden
        and rows % heads == 0
        and rows // heads in _WIDTHS
    )
    norms: list[tuple[Tensor, Tensor, float]] = []
    for norm in (parts.attention_norm, parts.norm):
        if type(norm) is not nn.LayerNorm or norm.normalized_shape != (hidden,):
            return None
        for one in (norm.weight, norm.bias):
            if one is None or one.dtype != torch.float32 or not one.is_cpu:
                return None
        norms.append((norm.weight, norm.bias, norm.eps))
    tensors = [*layer.parameters(), *layer.buffers()]
    # without grad nothing is said of who follows, here
    with torch.no_grad():
        if not fits or not ops.direct(*tensors) or not all(one.is_contiguous() for one in tensors):
            return None
    followed_by = cast(QuantizedLinear, parts.up)._followed_by
    do = native.EncoderLayer(linears, norms, heads, attention.scaling, followed_by)
    return Prepared(layer, parts, do, hidden)


_OURS = (CodebookWeight, Done)  # the same in training


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain in _classes:
        return _classes[plain]
    front = FusedEncoder if plain.__name__ in _ENCODERS else FusedLayer
    body = {"__module__": plain.__module__, "__reduce_ex__": _reduce, "_plain": plain}
    made: Any = type(f"Fused{plain.__name__}", (front, plain), body)
    _classes[plain] = made
    return cast(type[nn.Module], made)


def _reduce(fused: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle and copy a module whose class was made here, and stands in no file, by its own class."""
    state = fused.__dict__
    if isinstance(fused, FusedLayer):
        state = state | {"_prepared": None}  # what was made of this one's tensors
    return _blank, (type(fused)._plain,), state  # type: ignore[attr-defined]


def _blank(plain: type[nn.Module]) -> nn.Module:
    made = _fused_class(plain)
    return made.__new__(made)


def fuse(module: nn.Module) -> None:
    """Let a layer be done in one go, or an encoder whose layers are, in place, if it is of a known family."""
    name = type(module).__name__
    if not type(module).__module__.startswith(_KNOWN):
        return  # another class of that name
    layers = module._modules.get("layer")
    if name in _FAMILIES:
        _fuse_layer(module)
    elif (
        name in _ENCODERS
        and layers is not None
        and all(isinstance(one, FusedLayer) for one in layers.children())
    ):
        module.__class__ = _fused_class(type(module))


def _fuse_layer(layer: nn.Module) -> None:
    try:
        parts = _FAMILIES[type(layer).__name__](layer)
    except (KeyError, AttributeError):
        return  # another class of that name
    decoder = getattr(layer, "is_decoder", False) or getattr(parts.attention, "is_causal", False)
    done = isinstance(parts.up, QuantizedLinear) and parts.up._followed_by != "none"
    inside = _modules(layer)
    # a class of somebody else's may do something else
    known = all(type(one).__module__.startswith(_KNOWN) for one in inside)
    if done and known and not decoder and hasattr(parts.attention, "scaling"):
        layer.__class__ = _fused_class(type(layer))
        layer.__dict__["_inside"] = tuple(map(type, inside))
        layer.__dict__["_prepared"] = None


_KNOWN = ("torch.nn.", "transformers.", "lexibit.")


def unfuse(module: nn.Module) -> None:
    """Undo :func:`fuse`."""
    if isinstance(module, (FusedLayer, FusedEncoder)):
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
