"""Something that is timed: a model in some form, by a function from token ids to its first output."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Contestant:
    """What is timed.

    Attributes:
        name: in tables.
        nbytes: of its weights: in memory, or in the file that it was loaded from.
        run: the first output for token ids ``[texts, tokens]``, none of which is padding.
    """

    name: str
    nbytes: int
    run: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, name: str, model: PreTrainedModel) -> Contestant:
        """A model that PyTorch runs."""
        return cls(name, nbytes(model), lambda ids: forward(model, ids))


def forward(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The first output of a model that is evaluated."""
    with torch.inference_mode():
        output: Tensor = model(**inputs(model, ids))[0]
    return output


def inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """What a model takes by name, for token ids none of which is padding."""
    named = {"input_ids": ids}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        named["attention_mask"] = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        named["decoder_input_ids"] = ids
    return named


def nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, those that are shared once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
