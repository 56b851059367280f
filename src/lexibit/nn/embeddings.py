"""What an encoder begins with, done in one go: embeddings of words, positions and kinds, and a LayerNorm."""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from lexibit import ops
from lexibit.nn.fused import Fused, Unchanged, as_norm, asked, inside, lie_still, put, ready
from lexibit.nn.layers import QuantizedEmbedding
from lexibit.ops import native
from lexibit.weight import CodebookWeight

_WORDS, _KINDS, _POSITIONS = "word_embeddings", "token_type_embeddings", "position_embeddings"
# arguments; the last two are buffers too, which stand for what is not given
_IDS, _KIND_IDS, _POSITION_IDS = "input_ids", "token_type_ids", "position_ids"
# By class: what is added up, in this order, and then normed.
_FAMILIES = {
    f"transformers.models.{model}.modeling_{model}.{name}": parts
    for parts, names in {
        (_WORDS, _KINDS, _POSITIONS): {
            "albert": "AlbertEmbeddings",
            "bert": "BertEmbeddings",
            "camembert": "CamembertEmbeddings",
            "electra": "ElectraEmbeddings",
            "roberta": "RobertaEmbeddings",
            "xlm_roberta": "XLMRobertaEmbeddings",
        },
        (_WORDS, _POSITIONS): {"distilbert": "Embeddings"},
    }.items()
    for model, name in names.items()
}


class FusedEmbeddings(Fused):
    """Looks up, adds and norms in one go."""

    def forward(self, *given: Any, **named: Any) -> Tensor:
        """``[texts, tokens, columns]``."""
        ids = given[0] if given else named.get(_IDS)
        # else a compiler sees no more of this
        if isinstance(ids, Tensor) and ops.direct(ids) and self._takes(given, named):
            output = self._in_one_go(ids, named.get(_KIND_IDS))
            if output is not None:
                return output
        slowly: Tensor = super().forward(*given, **named)
        return slowly

    def _takes(self, given: tuple[Any, ...], named: dict[str, Any]) -> bool:
        """Whether arguments are the class's own, and give no positions, nor vectors in the place of words."""
        others = (*given[1:], *(value for name, value in named.items() if name not in (_IDS, _KIND_IDS)))
        plain: Any = self._plain
        return named.keys() <= _arguments(plain) and not (given and _IDS in named) and not asked(others)

    def _in_one_go(self, ids: Tensor, kinds: Any) -> Tensor | None:
        prepared = self._current(_prepare)
        if prepared is None or not prepared.unfollowed(ids) or not _are_rows(ids):
            return None
        if kinds is not None and not (_are_rows(kinds) and kinds.shape == ids.shape):
            return None
        positions = self._positions(ids)
        if positions.shape[1] != ids.shape[1]:
            return None  # a longer text than there are positions
        rows = [ids.long(), positions.expand(ids.shape)]
        if len(prepared.parts) == 3:
            if kinds is None:
                own = cast(Tensor, self._buffers[_KIND_IDS]).expand(len(positions), -1)
                kinds = torch.gather(own, 1, positions).expand(ids.shape)
            rows.insert(1, kinds.long())
        return prepared.do([of.contiguous() for of in rows])

    def _positions(self, ids: Tensor) -> Tensor:
        own: Any = self
        if hasattr(own, "create_position_ids_from_input_ids"):  # padding has a position of its own
            return cast(Tensor, own.create_position_ids_from_input_ids(ids, own.padding_idx))
        return cast(Tensor, self._buffers[_POSITION_IDS])[:, : ids.shape[1]]


@cache
def _arguments(plain: Any) -> frozenset[str]:
    """What a class's forward may be given by name."""
    return frozenset(signature(plain.forward).parameters)


def _are_rows(ids: Any) -> bool:
    """Whether the kernels look up what is asked for so."""
    return (
        isinstance(ids, Tensor)
        and ops.direct(ids)
        and ids.is_cpu
        and ids.dim() == 2
        and ids.numel() > 0
        and ids.dtype in (torch.int64, torch.int32)
    )


class Prepared(Unchanged):
    """What embeddings come to for the kernels."""

    def __init__(self, module: nn.Module, parts: tuple[str, ...], do: native.Embeddings) -> None:
        super().__init__(module)
        self.parts, self.do = parts, do


def _prepare(module: FusedEmbeddings) -> Prepared | None:
    """What the kernels take embeddings as, if they can do them as they are now."""
    modules, parts = inside(module), _FAMILIES[_name(module._plain)]
    if module.training or not ready(modules) or not native.supports("encoder"):
        return None
    if module._modules.keys() != {*parts, "LayerNorm", "dropout"} or type(module.dropout) is not nn.Dropout:
        return None
    weights = []
    for part in parts:
        embedding = module._modules[part]
        if type(embedding) is not QuantizedEmbedding:
            return None
        stored = cast(CodebookWeight, embedding._modules["weight_codebook"]).stored()
        if not native.takes(stored) or stored.outliers is not None:
            return None
        weights.append(stored)
    columns = weights[0].shape[1]
    if any(weight.shape[1] != columns or not weight.shape[0] for weight in weights):
        return None
    norm = as_norm(module._modules["LayerNorm"], columns)
    if norm is None:
        return None
    ids = [module._buffers.get(name) for name in (_POSITION_IDS, _KIND_IDS)[: len(parts) - 1]]
    if any(one is None or one.dtype != torch.int64 or not one.is_cpu or one.dim() != 2 for one in ids):
        return None
    stored_parts = (part for weight in weights for part in weight.parts if part is not None)
    if not lie_still([*norm[:2], *stored_parts]):
        return None
    return Prepared(module, parts, native.Embeddings(weights, norm))


def fuse(module: nn.Module) -> None:
    """Let embeddings be done in one go, in place, if they are of a known family and in codes."""
    parts = _FAMILIES.get(_name(type(module)), ())
    if parts and all(isinstance(module._modules.get(part), QuantizedEmbedding) for part in parts):
        put(FusedEmbeddings, module)


def _name(cls: type[nn.Module]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
