"""A layer of an encoder done in one go: BERT's, RoBERTa's, DistilBERT's and ALBERT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

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


class FusedLayer(nn.Module):
    """In front of a layer's own class: does in one go what the kernels can, and leaves the rest to it."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **more: Any
    ) -> Tensor:
        """The layer's output: ``[texts, tokens, columns]``, like its input."""
        if _asks_for_nothing_else(others) and _asks_for_nothing_else(more.values()) and not self.training:
            parts = _FAMILIES[type(self)._plain.__name__](self)  # type: ignore[attr-defined]
            mask = _additive(attention_mask, hidden_states)
            if mask is not _NOT_TAKEN and (linears := _taken(parts, hidden_states)):
                attention = parts.attention
                return native.encoder_layer(
                    hidden_states,
                    cast(Tensor | None, mask),
                    linears,
                    [_norm(parts.attention_norm), _norm(parts.norm)],
                    _heads(attention),
                    cast(float, attention.scaling),
                    cast(QuantizedLinear, parts.up).activation,
                )
        output: Tensor = super().forward(hidden_states, attention_mask, *others, **more)
        return output


_NOT_TAKEN = object()


def _asks_for_nothing_else(values: Any) -> bool:
    return all(value is None or value is False for value in values)


def _norm(norm: nn.Module) -> tuple[Tensor, Tensor, float]:
    layer = cast(nn.LayerNorm, norm)
    return layer.weight, layer.bias, layer.eps


def _heads(attention: nn.Module) -> int:
    heads = getattr(attention, "num_attention_heads", None) or attention.n_heads
    return cast(int, heads)


def _additive(mask: Tensor | None, x: Tensor) -> Any:
    """A mask as the kernel adds it to the scores, ``[texts, 1 or tokens, tokens]``, or that it is none."""
    if mask is None:
        return None
    texts, tokens = x.shape[:2]
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-1] != tokens or mask.shape[2] not in (1, tokens):
        return _NOT_TAKEN
    if mask.stride(2) == 0 or mask.shape[2] == 1:
        mask = mask[:, :, :1]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
    elif mask.dtype != x.dtype:
        return _NOT_TAKEN
    return mask[:, 0].expand(texts, -1, -1).contiguous()


def _taken(parts: Parts, x: Tensor) -> list[tuple[Stored, Tensor]] | None:
    """The linear layers' weights and biases, if the kernels do it and nobody looks at what is inside."""
    if x.dim() != 3 or not x.numel() or not native.has_int8() or not ops.direct(x):
        return None
    inside = (*parts.linears, parts.attention_norm, parts.norm, parts.attention, *parts.others)
    for one in inside:
        if one._forward_hooks or one._forward_pre_hooks or "forward" in one.__dict__:
            return None
    taken: list[tuple[Stored, Tensor]] = []
    for linear in parts.linears:
        if type(linear) is not QuantizedLinear:
            return None
        weight = cast(CodebookWeight, linear._modules["weight_codebook"])
        stored, bias = weight.stored(), cast(Tensor, linear._parameters["bias"])
        if weight.compute != "int8" or not native.takes_int8(stored, x, bias):
            return None
        taken.append((stored, bias))
    query, key, value = (stored for stored, _ in taken[:3])
    if not query.block[1] == key.block[1] == value.block[1]:
        return None  # tokens are rounded once for the three, with sums over the same runs of columns
    trained = [taken[0][0].levels]
    for norm in (parts.attention_norm, parts.norm):
        if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
            return None
        if norm.weight.dtype != x.dtype:
            return None
        trained.append(norm.weight)
    if torch.is_grad_enabled() and any(one.requires_grad for one in trained):
        return None
    width = taken[0][0].shape[0] // _heads(parts.attention)
    return None if width % 16 or width > 64 else taken


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(plain: type[nn.Module]) -> type[nn.Module]:
    if plain in _classes:
        return _classes[plain]
    body = {"__module__": plain.__module__, "__reduce_ex__": _reduce, "_plain": plain}
    made: Any = type(f"Fused{plain.__name__}", (FusedLayer, plain), body)
    _classes[plain] = made
    return cast(type[nn.Module], made)


def _reduce(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle and copy a layer whose class was made here, and stands in no file, by its own class."""
    return _blank, (type(layer)._plain,), layer.__dict__  # type: ignore[attr-defined]


def _blank(plain: type[nn.Module]) -> nn.Module:
    made = _fused_class(plain)
    return made.__new__(made)


def fuse(layer: nn.Module) -> None:
    """Let a layer be done in one go, in place, if it is of a family that is known."""
    if type(layer).__name__ not in _FAMILIES or not hasattr(type(layer), "forward"):
        return
    try:
        parts = _FAMILIES[type(layer).__name__](layer)
    except (KeyError, AttributeError):
        return  # another class of that name
    decoder = getattr(layer, "is_decoder", False) or getattr(parts.attention, "is_causal", False)
    done = isinstance(parts.up, QuantizedLinear) and parts.up.activation != "none"
    if done and not decoder and hasattr(parts.attention, "scaling"):
        layer.__class__ = _fused_class(type(layer))


def unfuse(layer: nn.Module) -> None:
    """Undo :func:`fuse`."""
    if isinstance(layer, FusedLayer):
        layer.__class__ = type(layer)._plain  # type: ignore[attr-defined]
