"""Masked language modelling: how well does a model guess tokens that it cannot see?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from lexibit import checkpoint
from lexibit.batches import longest
from lexibit.errors import LexibitError
from lexibit.nn.modes import evaluating
from lexibit.progress import progress_bar
from lexibit.tasks.base import Examples, Features
from lexibit.tasks.epochs import Epochs
from lexibit.tasks.lm import (
    LanguageModelling,
    batched,
    check_known,
    check_numbers,
    logits_of,
    surprise,
    vocabulary,
)
from lexibit.tasks.metrics import Outcomes

SHARE = 0.15  # of the tokens is to be guessed
_MASKED, _RANDOM = 0.8, 0.1  # of these, in training
_SEED = 0  # of what is masked in evaluation: models compare on the same masks


class Text(NamedTuple):
    """A text as a model takes it, and where its own tokens stand, not those that its tokenizer adds."""

    inputs: dict[str, list[int]]
    places: NDArray[np.int64]


class MaskedLM(LanguageModelling):
    """Perplexity of masked tokens, in lines of text, under a masked language model.

    Files are ``train.txt``, ``dev.txt`` and ``test.txt`` in UTF-8. An example is a line that is not blank,
    cut to as many tokens as the model takes.

    In evaluation 15 % of a line's tokens, one at least, are replaced by the mask token, all at once, and the
    units are these. Which ones depends on the line's place among the examples alone. This is not the
    pseudo-perplexity of Salazar et al. 2020, who mask one token at a time.

    In training, as Devlin et al. 2019 say, 15 % are to be guessed, of which 80 % are replaced by the mask
    token, 10 % by a random one, and 10 % are left; we draw them anew in every epoch. We chose: exactly the
    share of a line, rounded, one at least; whether a token is replaced, and by what, is drawn for each.
    """

    name: ClassVar[str] = "masked-lm"

    def read(self, data: Path | None, split: str) -> Examples:
        """Lines; see :meth:`Task.read`."""
        return [line for line in self.lines(data, split) if line.strip()]

    def model(self, folder: Path, examples: Examples) -> PreTrainedModel:
        """The masked language model; see :meth:`Trainable.model`."""
        return checkpoint.load_with_head(folder, "AutoModelForMaskedLM")

    def features(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
    ) -> Sequence[Features]:
        """Lines, masked anew in every epoch; see :meth:`Trainable.features`."""
        texts = [text for text in self._encoded(model, tokenizer, examples) if len(text.places)]
        if not texts:
            raise LexibitError(f"{self.name}: the training text has no tokens for this tokenizer")
        return Masked(texts, tokenizer, min(len(tokenizer), vocabulary(model)))

    def collate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[Features]], Mapping[str, Tensor]]:
        """Padding to the longest, which the loss leaves out; see :meth:`Trainable.collate`."""
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
        """Negative log-likelihood and number of every line's masked tokens; see :meth:`Task.outcomes`.

        A batch has so few lines that their logits take no more than 256 MB, but one.
        """
        texts = self._encoded(model, tokenizer, examples)
        chosen = [
            _choose(text.places, np.random.default_rng([_SEED, index])) for index, text in enumerate(texts)
        ]
        found = np.zeros((len(texts), 2))
        found[:, 1] = [len(places) for places in chosen]
        collate = self.collate(model, tokenizer)
        # of a text without tokens nothing is asked
        lengths = {
            index: len(text.inputs["input_ids"]) for index, text in enumerate(texts) if len(text.places)
        }
        batches = list(batched(lengths, vocabulary(model), batch_size))
        with evaluating(model), torch.inference_mode(), progress_bar(progress) as bar:
            for batch in bar.track(batches, description="batches"):
                features = [_hidden(texts[index], chosen[index], tokenizer.mask_token_id) for index in batch]
                inputs = dict(collate(features))
                labels = inputs.pop("labels").to(model.device)
                logits = logits_of(model, {name: part.to(model.device) for name, part in inputs.items()})
                where = labels != -100
                nats = surprise(logits[where], labels[where])
                owner = where.nonzero()[:, 0].cpu().numpy()
                found[batch, 0] = np.bincount(owner, weights=nats, minlength=len(batch))
        check_numbers(found[:, 0], model)
        return found

    def _encoded(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
    ) -> list[Text]:
        if tokenizer.mask_token_id is None:
            raise LexibitError(
                f"{self.name}: the tokenizer of {type(model).__name__} has no mask token: measure the model "
                "with the task causal-lm"
            )
        tokens = tokenizer(
            list(examples),
            truncation=True,
            max_length=longest(model, tokenizer),
            return_special_tokens_mask=True,
        )
        added = tokens.pop("special_tokens_mask")
        check_known(max(chain.from_iterable(tokens["input_ids"]), default=0), model)
        taken = inspect.signature(model.forward).parameters
        names = [name for name in tokens if name in taken]
        return [
            Text({name: tokens[name][index] for name in names}, np.flatnonzero(np.array(added[index]) == 0))
            for index in range(len(examples))
        ]


class Masked(Epochs):
    """Texts whose tokens are masked for training, anew in every epoch.

    Args:
        texts: with at least one token that may be masked, each.
        tokenizer: with a mask token.
        tokens: how many there are to draw from.
    """

    def __init__(self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        self.texts = texts
        self.mask_token_id = tokenizer.mask_token_id
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.texts)

    def feature(self, index: int) -> Features:
        """The text at a place, masked."""
        rng, text = self.generator(index), self.texts[index]
        chosen = _choose(text.places, rng)
        fate = rng.random(len(chosen))
        replaced = np.array(text.inputs["input_ids"])[chosen]
        random = rng.integers(self.tokens, size=len(chosen))
        replaced = np.where(fate < _MASKED + _RANDOM, random, replaced)
        replaced = np.where(fate < _MASKED, self.mask_token_id, replaced)
        return _hidden(text, chosen, replaced)


def _choose(places: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The places to be guessed."""
    count = max(round(SHARE * len(places)), 1) if len(places) else 0
    return rng.choice(places, count, replace=False) if count else places


def _hidden(text: Text, chosen: NDArray[np.int64], replaced: NDArray[np.int64] | int) -> Features:
    """A text with other tokens at some places, and as ``labels`` what stood there, -100 elsewhere."""
    ids = np.array(text.inputs["input_ids"])
    labels = np.full(len(ids), -100)
    labels[chosen], ids[chosen] = ids[chosen], replaced
    return text.inputs | {"input_ids": ids.tolist(), "labels": labels.tolist()}
