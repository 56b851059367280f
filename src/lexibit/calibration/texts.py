"""Batches to calibrate on, from texts or from a task's own examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit import tasks
from lexibit.batches import batches
from lexibit.errors import LexibitError
from lexibit.tasks.causal import CausalLM

SIZE = 16  # texts in a batch
LIMIT = 1024  # texts, if nothing else is said
LENGTH = 256  # tokens of a text


def of_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    limit: int = LIMIT,
    max_length: int = LENGTH,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Texts as inputs of a model, longer ones cut off.

    Args:
        model: what they are for.
        tokenizer: its own.
        texts: any number; blank ones are left out.
        limit: texts at most, drawn with the seed.
        max_length: tokens of a text at most.
        seed: of the draw.

    Raises:
        LexibitError: there is no text.
    """
    texts = _drawn([text for text in texts if text.strip()], limit, seed)
    if not texts:
        raise LexibitError("nothing to calibrate on: there is no text")
    found = [inputs for _, inputs in batches(model, tokenizer, texts, size=SIZE, max_length=max_length)]
    if model.config.is_encoder_decoder:
        for inputs in found:
            inputs["decoder_input_ids"] = inputs["input_ids"]
            inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return found


def of_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: Path | None,
    *,
    limit: int = LIMIT,
    max_length: int = LENGTH,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """What a task gives a model to train on, as inputs alone: no label is looked at.

    Args:
        model: with the task's head, if it has one.
        tokenizer: its own.
        name: of the task.
        data: its folder; the hub if not given.
        limit: examples of the ``train`` split at most, drawn with the seed.
        max_length: tokens of a sentence at most, for ``sts``.
        seed: of the draw.

    Raises:
        LexibitError: there is no such task, or no such data.
    """
    task = tasks.task(name)
    if name == "sts":
        pairs = task.read(data, "train")
        texts = list(dict.fromkeys(text for first, second, _ in pairs for text in (first, second)))
        return of_texts(model, tokenizer, texts, limit=limit, max_length=max_length, seed=seed)
    trained = tasks.trainable(name)
    # no more examples than can be needed are made into features
    examples = trained.load(data, "train", limit=limit, seed=seed)
    features = trained.features(model, tokenizer, examples)
    chosen = _drawn(range(len(features)), limit, seed)
    collate = trained.collate(model, tokenizer)
    size = 1 if isinstance(task, CausalLM) else SIZE
    found = []
    for start in range(0, len(chosen), size):
        batch = collate([features[index] for index in chosen[start : start + size]])
        found.append(_inputs(model, batch))
    return found


def _inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch without its labels; a decoder is given those in front of the ones it should say."""
    found = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
    if model.config.is_encoder_decoder and "decoder_input_ids" not in found:
        labels = batch["labels"]
        shifted: Any = model.prepare_decoder_input_ids_from_labels
        found["decoder_input_ids"] = shifted(labels=labels)
        found["decoder_attention_mask"] = (labels != -100).to(torch.int64)
    return found


def _drawn(items: Sequence[Any], limit: int, seed: int) -> list[Any]:
    """Some of them, in their order."""
    if limit < 1:
        raise LexibitError(f"texts to calibrate on: 1 or more, not {limit}")
    if len(items) <= limit:
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), limit, replace=False)
    return [items[index] for index in sorted(chosen)]
