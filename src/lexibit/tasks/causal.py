"""Causal language modelling: how well does a model predict each next token of a text?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from lexibit import checkpoint
from lexibit.batches import give_padding, longest
from lexibit.errors import LexibitError
from lexibit.nn.modes import evaluating
from lexibit.progress import progress_bar
from lexibit.tasks.base import Examples, Features
from lexibit.tasks.chunks import Chunks
from lexibit.tasks.lm import (
    LOGITS,
    LanguageModelling,
    check_known,
    check_numbers,
    logits_of,
    surprise,
    vocabulary,
)
from lexibit.tasks.metrics import Outcomes

WINDOW = 1024  # tokens at most
PASSAGE = 512  # words, nearly
_PROBE = 8  # tokens that show whether a model looks ahead


class CausalLM(LanguageModelling):
    """Perplexity of a text under a causal language model; here, of a user's own.

    Files are ``train.txt``, ``dev.txt`` and ``test.txt``, running text in UTF-8, the end of a line included.

    **Examples** are passages: whole lines, up to the one that makes a passage 512 words or more. They are
    what intervals and paired tests draw, as neighbouring lines have too much in common, and they are the same
    for all models, whatever their tokenizers. Still, an interval tells of other passages from the same
    documents: other documents differ more. ``limit`` takes the first passages, not a sample: text is read in
    order.

    **What is counted.** The passages are encoded one by one, without special tokens, and put in a row behind
    one token that begins a text: the tokenizer's BOS, or its EOS if it has none. Every token of the text is
    predicted exactly once. The row is cut into windows of as many tokens as the model and its tokenizer take,
    1024 at most: at each token of a window the next one is predicted, from the window's tokens so far; the
    next window begins with the last token that was predicted. If the tokenizer has neither BOS nor EOS, the
    first token of the text is context only: it is not counted, nor is its word.

    A model that carries its state (:mod:`lexibit.models`) reads the row in chunks instead, in a few columns
    side by side that each begin from a zero state: ``evaluation_columns`` of its configuration, fewer in a
    text in which they would be shorter than ten chunks.

    **Units** are tokens: perplexities of models with different tokenizers do not compare. In data sets that
    are split into words (``words``) they are the words and the ends of lines, whatever the tokens.

    Attributes:
        words: whether the units are words.
    """

    name: ClassVar[str] = "causal-lm"
    from_nothing: ClassVar[tuple[str, ...]] = ("awd-lstm",)
    words: ClassVar[bool] = False

    def read(self, data: Path | None, split: str) -> Examples:
        """Passages; see :meth:`Task.read`."""
        return list(_passages(self.lines(data, split)))

    def load(
        self, data: Path | None, split: str = "dev", *, limit: int | None = None, seed: int = 0
    ) -> Examples:
        """The passages, the first ``limit`` of them; see :meth:`Task.load`."""
        return self.read(data, split)[:limit]

    def model(self, folder: Path, examples: Examples) -> PreTrainedModel:
        """The causal language model; see :meth:`Trainable.model`."""
        return checkpoint.load_with_head(folder, "AutoModelForCausalLM")

    def features(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
    ) -> Sequence[Features]:
        """Windows of tokens, or chunks for a model that carries its state; see :meth:`Trainable.features`."""
        tokens, _ = self._encoded(model, tokenizer, examples)
        _check_causal(model, tokens)
        if getattr(model, "carries_state", False):
            return Chunks(tokens, columns=model.config.batch_columns, bptt=model.config.bptt)
        windows = [part.tolist() for part in torch.split(tokens, _window(model, tokenizer)) if len(part) > 1]
        return [{"input_ids": window, "labels": window} for window in windows]

    def collate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[Features]], Mapping[str, Tensor]]:
        """Padding to the longest, which the loss leaves out; see :meth:`Trainable.collate`."""
        if getattr(model, "carries_state", False):
            return _only
        give_padding(tokenizer)
        return DataCollatorForTokenClassification(tokenizer)

    def outcomes(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Outcomes:
        """Negative log-likelihood and units of every passage; see :meth:`Task.outcomes`.

        A batch has so few windows that their logits take no more than 256 MB, but one.
        """
        tokens, passage = self._encoded(model, tokenizer, examples)
        with evaluating(model), torch.inference_mode():
            _check_causal(model, tokens)
            if getattr(model, "carries_state", False):
                nats = _carried(model, tokens, progress)
            else:
                nats = _windowed(model, tokens, _window(model, tokenizer), batch_size, progress)
        check_numbers(nats, model)
        count = len(examples)
        units = np.bincount(passage, minlength=count).astype(np.float64)
        if self.words:
            units[:] = [_words(text) for text in examples]
            units[0] -= _start(tokenizer) is None
        return np.stack([np.bincount(passage, weights=nats, minlength=count), units], axis=1)

    def _encoded(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """All tokens in a row, int64 ``[n + 1]``, and the passage of all but the first, ``[n]``."""
        encoded = tokenizer(list(examples), add_special_tokens=False, verbose=False)["input_ids"]
        start = _start(tokenizer)
        tokens = torch.tensor([*([] if start is None else [start]), *chain.from_iterable(encoded)])
        if len(tokens) < 2:
            raise LexibitError(
                f"{self.name}: the text has {len(tokens)} token for this tokenizer: nothing can be predicted "
                "of fewer than two; give more text"
            )
        check_known(int(tokens.max()), model)
        passage = np.repeat(np.arange(len(encoded)), [len(ids) for ids in encoded])
        return tokens, passage[start is None :]


def _words(text: str) -> int:
    """Words and ends of lines."""
    return len(text.split()) + text.count("\n")


def _passages(lines: Iterable[str]) -> Iterator[str]:
    passage, words = "", 0
    for line in lines:
        passage += f"{line}\n"
        words += _words(f"{line}\n")
        if words >= PASSAGE:
            yield passage
            passage, words = "", 0
    if passage:
        yield passage


def _start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that begins a text, if there is one."""
    start: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if start is None else start


def _window(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a model is given at a time."""
    return min(longest(model, tokenizer) or WINDOW, WINDOW)


def _only(features: list[Features]) -> Mapping[str, Tensor]:
    """The batch that a single feature is."""
    if len(features) != 1:
        raise LexibitError(
            f"{len(features)} chunks in a batch: a model that carries its state is trained on one at a time; "
            "batch_columns in its settings says how much text it reads side by side"
        )
    return features[0]


def _check_causal(model: PreTrainedModel, tokens: Tensor) -> None:
    """Refuse a model whose predictions of a token have seen it."""
    one = tokens[:_PROBE].to(model.device)
    other = one.clone()
    other[-1] = (one[-1] + 1) % vocabulary(model)
    with evaluating(model), torch.no_grad():
        logits = logits_of(model, {"input_ids": torch.stack([one, other])})
    first, second = logits[:, :-1].float()
    if (first - second).abs().max() > 1e-4 * first.abs().max():
        raise LexibitError(
            f"{type(model).__name__} looks ahead, so that it has seen each token that it should predict: "
            "measure it with the task masked-lm"
        )


def _windowed(
    model: PreTrainedModel, tokens: Tensor, length: int, batch_size: int, progress: bool
) -> NDArray[np.float64]:
    """The surprise of all tokens but the first, window by window."""
    whole = (len(tokens) - 1) // length * length
    inputs, targets = tokens[:whole].view(-1, length), tokens[1 : whole + 1].view(-1, length)
    size = max(min(batch_size, LOGITS // (length * vocabulary(model))), 1)
    batches = list(zip(torch.split(inputs, size), torch.split(targets, size), strict=True)) if whole else []
    if whole < len(tokens) - 1:
        batches.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    found = []
    with progress_bar(progress) as bar:
        for ids, following in bar.track(batches, description="windows"):
            logits = model(input_ids=ids.to(model.device)).logits
            found.append(surprise(logits.flatten(0, 1), following.to(model.device).flatten()))
    return torch.cat(found).numpy()


def _carried(model: PreTrainedModel, tokens: Tensor, progress: bool) -> NDArray[np.float64]:
    """The surprise of all tokens but the first, by a model that carries its state."""
    count, bptt = len(tokens) - 1, model.config.bptt
    columns = max(min(model.config.evaluation_columns, count // (10 * bptt)), 1)
    length = -(-count // columns)
    inputs, targets = (
        F.pad(part, (0, columns * length - count)).view(columns, length).to(model.device)
        for part in (tokens[:-1], tokens[1:])
    )
    state, found = None, []
    with progress_bar(progress) as bar:
        for start in bar.track(range(0, length, bptt), description="chunks"):
            part = slice(start, start + bptt)
            output = model(input_ids=inputs[:, part], state=state)
            state = output.state
            found.append(surprise(output.logits.flatten(0, 1), targets[:, part].flatten()).view(columns, -1))
    return torch.cat(found, 1).flatten()[:count].numpy()
