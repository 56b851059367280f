"""Layers of an encoder done in one go: BERT's, RoBERTa's, DistilBERT's and ALBERT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from lexibit import ops
from lexibit.nn.fused import (
    KNOWN,
    Fused,
    Unchanged,
    as_norm,
    asked,
    inside,
    is_fused,
    lie_still,
    put,
    ready,
    watched,
)
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


class FusedLayer(Fused):
    """Does a layer in one go."""

    _inside: tuple[type[nn.Module], ...]  # the classes of all modules inside when it was fused

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **more: Any
    ) -> Tensor:
        """The layer's output: ``[texts, tokens, columns]``, like its input."""
        output = None if _asked(others, more) else _in_one_go([self], hidden_states, attention_mask)
        if output is not None:
            return output
        slowly: Tensor = super().forward(hidden_states, attention_mask, *others, **more)
        return slowly


class FusedEncoder(Fused):
    """Does all layers of an encoder in one go, or leaves each to do what it can."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **more: Any
    ) -> Any:
        """The last layer's output, as the encoder's own class returns it."""
        layers = [*cast(nn.Module, self._modules["layer"])._modules.values()]
        if layers and not _asked(others, more) and all(map(_may_be_left_out, layers)):
            output = _in_one_go(cast(list[FusedLayer], layers), hidden_states, attention_mask)
            if output is not None:
                return _ENCODERS[self._plain.__name__](last_hidden_state=output)
        return super().forward(hidden_states, attention_mask, *others, **more)


def _asked(others: tuple[Any, ...], more: dict[str, Any]) -> bool:
    """Whether anybody wants more of layers than an output; their attention does not ask for positions."""
    return asked(others) or asked(value for name, value in more.items() if name != "position_ids")


def _may_be_left_out(layer: nn.Module | None) -> bool:
    """Whether nobody sees it if a layer is not called."""
    return is_fused(layer, FusedLayer) and not watched(cast(nn.Module, layer))


def _in_one_go(layers: list[FusedLayer], x: Tensor, mask: Tensor | None) -> Tensor | None:
    """What layers give, one behind the other; or None, if that is not for the kernels."""
    if not ops.direct(x):
        return None  # a compiler sees no more of this
    do = []
    for layer in layers:
        prepared = layer._current(_prepare)
        if prepared is None or not prepared.takes(x):
            return None
        do.append(prepared.do)
    mask = _additive(mask, x)
    return None if mask is _NOT_TAKEN else native.encode(do, x, mask)


_ATTENTIONS = ("eager", "sdpa")  # others may look elsewhere
_WIDTHS = (16, 32, 48, 64)  # of a head


class Prepared(Unchanged):
    """What a layer comes to for the kernels."""

    def __init__(self, layer: nn.Module, parts: Parts, do: native.EncoderLayer, hidden: int) -> None:
        super().__init__(layer)
        self.do = do
        self._hidden = hidden
        self._config: Any = parts.attention.config

    def holds(self) -> bool:
        """Whether all is as it was."""
        return super().holds() and self._config._attn_implementation in _ATTENTIONS

    def takes(self, x: Tensor) -> bool:
        """Whether it can be done with this input, and nobody follows what is done."""
        return (
            x.dtype == torch.float32
            and x.is_cpu
            and x.dim() == 3
            and x.shape[-1] == self._hidden
            and x.numel() > 0
            and self.unfollowed(x)
        )


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
    modules = inside(layer)
    if tuple(map(type, modules)) != layer._inside or layer.training or not native.supports("encoder"):
        return None
    if not ready(modules):
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
    for module in (parts.attention_norm, parts.norm):
        norm = as_norm(module, hidden)
        if norm is None:
            return None
        norms.append(norm)
    if not fits or not lie_still([*layer.parameters(), *layer.buffers()]):
        return None
    followed_by = cast(QuantizedLinear, parts.up)._followed_by
    do = native.EncoderLayer(linears, norms, heads, attention.scaling, followed_by)
    return Prepared(layer, parts, do, hidden)


def fuse(module: nn.Module) -> None:
    """Let a layer be done in one go, or an encoder whose layers are, in place, if it is of a known family."""
    name = type(module).__name__
    if not type(module).__module__.startswith(KNOWN):
        return  # another class of that name
    layers = module._modules.get("layer")
    if name in _FAMILIES:
        _fuse_layer(module)
    elif (
        name in _ENCODERS
        and layers is not None
        and all(isinstance(one, FusedLayer) for one in layers.children())
    ):
        put(FusedEncoder, module)


def _fuse_layer(layer: nn.Module) -> None:
    try:
        parts = _FAMILIES[type(layer).__name__](layer)
    except (KeyError, AttributeError):
        return  # another class of that name
    decoder = getattr(layer, "is_decoder", False) or getattr(parts.attention, "is_causal", False)
    done = isinstance(parts.up, QuantizedLinear) and parts.up._followed_by != "none"
    modules = inside(layer)
    known = all(type(one).__module__.startswith(KNOWN) for one in modules)
    if done and known and not decoder and hasattr(parts.attention, "scaling"):
        put(FusedLayer, layer)
        layer.__dict__["_inside"] = tuple(map(type, modules))
