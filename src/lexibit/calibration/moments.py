"""What a layer's inputs are like: their second moments, and how often rows are looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lexibit.plan import Use


def inputs_of(use: Use, args: Any, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """What a weight is multiplied with in a call, padding left out: ``[n, channels]``; or the rows looked up."""
    masks = [batch[name].bool() for name in ("attention_mask", "decoder_attention_mask") if name in batch]
    if use.kind == "embedding":
        return _kept(args, masks, 0)
    if use.kind == "recurrent":
        return _recurrent(use, args, output)
    return _kept(args, masks, 1).float()


def _kept(x: Tensor, masks: list[Tensor], axes: int) -> Tensor:
    """The places that no mask leaves out; the last axes of x are what stands in a place."""
    places = x.shape[: x.dim() - axes]
    for mask in masks:
        if places == mask.shape:
            return x[mask]
        if places == (mask.numel(),):
            return x[mask.reshape(-1)]
    return x.reshape(-1, *x.shape[x.dim() - axes :])


def _recurrent(use: Use, args: Any, output: Any) -> Tensor:
    x, out = args, output[0]
    if isinstance(x, PackedSequence):
        raise NotImplementedError
    if "_ih_" in use.parameter:
        return x.reshape(-1, x.shape[-1]).float()
    time = 1 if use.module.batch_first and x.dim() == 3 else 0
    before = torch.cat([torch.zeros_like(out.narrow(time, 0, 1)), out.narrow(time, 0, out.shape[time] - 1)], time)
    return before.reshape(-1, before.shape[-1]).float()
