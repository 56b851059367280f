"""Texts as batches of tokens, for any model and tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    size: int,
    max_length: int | None = None,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Padded batches on the model's device, texts of like length together.

    Args:
        model: what the batches are for: tells how many tokens it takes.
        tokenizer: its own; gets a padding token if it has none.
        texts: any number.
        size: texts in a batch at most.
        max_length: tokens of a text at most; as many as the model takes if not given.

    Returns:
        Which texts, and their ``input_ids`` and ``attention_mask``.
    """
    limits = [tokenizer.model_max_length] if max_length is None else [max_length]
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None:
        # RoBERTa counts positions from behind the padding index
        offset = (model.config.pad_token_id or 0) + 1 if "roberta" in model.config.model_type else 0
        limits.append(most - offset)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = tokenizer(
            [texts[index] for index in chosen],
            padding=True,
            truncation=True,
            max_length=min(limits),
            return_tensors="pt",
        )
        yield chosen, {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
