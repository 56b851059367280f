"""What all tasks on running text share: its files, and the perplexity of what a model makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lexibit.errors import LexibitError, unknown
from lexibit.tasks import tables
from lexibit.tasks.base import Examples, Trainable
from lexibit.tasks.metrics import PERPLEXITY

# numbers that the logits of a batch, and the copy that their loss takes, may have: 256 and 16 MB in float32
LOGITS = 1 << 26
_COPIED = 1 << 22


class LanguageModelling(Trainable):
    """Predicting the words of running text; the measure is perplexity.

    An outcome is the negative log-likelihood of an example in nats, and how many units (tokens or words) it
    has; perplexity is exp(sum of the first / sum of the second).

    Attributes:
        folders: the sub-folders that the official data may have.
        files: by split, the file's possible names (shell patterns); each may also be there as ``.gz``.
        hub: data set and subset on the hub, if it is there.
        hub_splits: by split, what it is called on the hub.
    """

    metrics = (PERPLEXITY,)
    folders: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train.txt",),
        "dev": ("dev.txt", "valid.txt", "val.txt"),
        "test": ("test.txt",),
    }
    hub: ClassVar[tuple[str, str] | None] = None
    hub_splits: ClassVar[Mapping[str, str]] = {"train": "train", "dev": "validation", "test": "test"}

    def lines(self, data: Path | None, split: str) -> list[str]:
        """The lines of a split, without their ends.

        Args:
            data: a local folder; the hub if not given.
            split: ``train``, ``dev`` or ``test``.

        Raises:
            LexibitError: there is no such split, or no text in it.
        """
        if split not in self.files:
            raise unknown(f"split of {self.name}", split, self.files)
        if data is None:
            if self.hub is None:
                raise LexibitError(
                    f"{self.name}: no data set on the hub: name with --data a local folder that has "
                    f"{self.files[split][0]}"
                )
            where = self.hub[0]
            rows = tables.from_hub(*self.hub, self.hub_splits[split])
            found = [str(text).removesuffix("\n") for text in tables.column(where, rows, "text")]
        else:
            names = [name + ending for name in self.files[split] for ending in ("", ".gz")]
            file = tables.find(data, names, self.folders)
            if file is None:
                raise LexibitError(
                    f"{data}: no {' or '.join(self.files[split])} (or .gz) in it, which {self.name} needs as "
                    f"its {split} split"
                )
            where, found = str(file), tables.lines(file)
        if not any(line.strip() for line in found):
            raise LexibitError(f"{where}: holds no text, which {self.name} needs in its {split} split")
        return found

    def texts(self, examples: Examples) -> list[str]:
        """All the text: what a tokenizer for it is made of."""
        return list(examples)


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a model knows."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)


def check_known(largest: int, model: PreTrainedModel) -> None:
    """Refuse tokens that a model does not know.

    Raises:
        LexibitError: the largest is none of its own.
    """
    if largest >= vocabulary(model):
        raise LexibitError(
            f"the tokenizer gives the token {largest}, and {type(model).__name__} knows "
            f"{vocabulary(model)}: use the model's own tokenizer"
        )


def logits_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """A model's logits of all tokens it knows, at every place: ``[batch, tokens, vocabulary]``.

    Raises:
        LexibitError: it gives none.
    """
    logits = None if model.config.is_encoder_decoder else getattr(model(**inputs), "logits", None)
    known = vocabulary(model)
    if (
        not isinstance(logits, Tensor)
        or logits.shape[:-1] != inputs["input_ids"].shape
        or logits.shape[-1] < known
    ):
        raise LexibitError(
            f"{type(model).__name__} gives no logits of {known} tokens at every place, as language modelling "
            "needs: give a model that its config.json calls a language model in 'architectures'"
        )
    return logits


def check_numbers(nats: NDArray[np.float64], model: PreTrainedModel) -> None:
    """Refuse a model whose likelihoods are no numbers.

    Raises:
        LexibitError: some are NaN.
    """
    if np.isnan(nats).any():
        raise LexibitError(
            f"{type(model).__name__} gives NaN instead of likelihoods: its training has diverged (lower the "
            "learning rate), or its weights are damaged"
        )


def surprise(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood in nats of each target, float64 ``[n]`` on the CPU, some rows at a time.

    Args:
        logits: ``[n, vocabulary]``.
        targets: ``[n]``.
    """
    rows = max(_COPIED // logits.shape[1], 1)
    parts = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    nats = [F.cross_entropy(some.float(), of, reduction="none") for some, of in parts]
    return torch.cat(nats).double().cpu()


def batched(lengths: Mapping[int, int], vocabulary: int, size: int) -> Iterator[list[int]]:
    """Texts of like length together, few enough that their padded logits stay bounded.

    Args:
        lengths: of each text, by its number, in tokens.
        vocabulary: logits of a token.
        size: texts in a batch at most.
    """
    batch: list[int] = []
    for index in sorted(lengths, key=lengths.__getitem__):
        if batch and (len(batch) >= size or (len(batch) + 1) * lengths[index] * vocabulary > LOGITS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
