"""Texts as batches of tokens, for any model and tokenizer of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit.errors import LexibitError
from lexibit.progress import progress_bar

# encoders whose positions are counted from behind the padding index
_FROM_PADDING = ("roberta", "longformer", "camembert", "mpnet")
_NO_LIMIT = 1 << 20  # what a tokenizer says if it knows no limit is far above


def batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | tuple[str, ...]],
    *,
    size: int,
    max_length: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Padded batches on the model's device, texts of like length together.

    Args:
        model: what the batches are for: tells how many tokens it takes, and which inputs.
        tokenizer: its own; gets a padding token if it has none.
        texts: any number, each a text or a pair.
        size: texts in a batch at most.
        max_length: tokens of a text at most; as many as the model takes if not given.
        progress: whether to draw a progress bar on the terminal.

    Returns:
        Which texts, and their inputs: ``input_ids``, ``attention_mask`` and what else the model takes.
    """
    give_padding(tokenizer)
    taken = {"input_ids", "attention_mask", *inspect.signature(model.forward).parameters}
    limit = longest(model, tokenizer)
    if max_length is not None:
        limit = min(max_length, limit or max_length)
    pairs = [(text,) if isinstance(text, str) else text for text in texts]
    order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))
    with progress_bar(progress) as bar:
        for start in bar.track(range(0, len(order), size), description="batches"):
            chosen = order[start : start + size]
            batch = tokenizer(
                *(list(column) for column in zip(*(pairs[index] for index in chosen), strict=True)),
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            )
            yield chosen, {name: batch[name].to(model.device) for name in batch if name in taken}


def give_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a padding token one of its own: any will do, as masks and labels leave it out.

    Raises:
        LexibitError: it has none that could serve.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise LexibitError(
            f"{type(tokenizer).__name__} has no token to pad texts with, nor one that ends a text or stands "
            "for unknown words: set pad_token in its tokenizer_config.json"
        )


def longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens of a text a model and its tokenizer take; None if any number."""
    limits = [tokenizer.model_max_length]
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None:
        kind = model.config.model_type
        counts_from_padding = any(name in kind for name in _FROM_PADDING)
        limits.append(most - ((model.config.pad_token_id or 0) + 1 if counts_from_padding else 0))
    least = min(limits)
    return least if least < _NO_LIMIT else None
