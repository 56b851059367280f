"""How far a model's outputs are from a teacher's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexibit.errors import LexibitError


def distance(ours: Any, theirs: Any, inputs: dict[str, Any], temperature: float) -> Tensor:
    """How far outputs are from a teacher's: the divergence of classes, or the squared error of one number.

    Classes (Hinton et al. 2015): ``T^2 KL(softmax(theirs / T) || softmax(ours / T))``, the mean over what
    the model was asked.
    """
    total: list[Tensor] = []
    for kind in ("logits", "start_logits", "end_logits"):
        a, b = getattr(ours, kind, None), getattr(theirs, kind, None)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape:
            raise LexibitError(
                f"the teacher's {kind} are {list(b.shape)}, the model's {list(a.shape)}: give a teacher of "
                "the same task and vocabulary"
            )
        if a.dim() == 3:
            labels = inputs.get("labels")
            asked = labels != -100 if labels is not None and labels.shape == a.shape[:2] else None
            if asked is None and "attention_mask" in inputs:
                asked = inputs["attention_mask"].bool()
            a, b = (x.flatten(0, 1) if asked is None else x[asked] for x in (a, b))
        if a.shape[-1] == 1:
            total.append(F.mse_loss(a, b))
            continue
        a, b = (F.log_softmax(logits.float() / temperature, -1) for logits in (a, b))
        total.append(F.kl_div(a, b, reduction="batchmean", log_target=True) * temperature**2)
    if not total:
        raise LexibitError(
            f"the teacher gives a {type(theirs).__name__}, the model a {type(ours).__name__}, with no logits "
            "that could be matched: give a teacher with the task's head"
        )
    return torch.stack(total).mean()
