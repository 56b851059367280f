"""STS: does the cosine of two sentences' embeddings tell how alike people find them?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit.batches import batches
from lexibit.errors import LexibitError, unknown
from lexibit.nn.modes import evaluating
from lexibit.tasks import tables
from lexibit.tasks.base import Examples, Task
from lexibit.tasks.metrics import SPEARMAN, Outcomes

_COLUMNS = ("genre", "file", "year", "id", "score", "sentence1", "sentence2")


class STS(Task):
    """Semantic textual similarity (Cer et al. 2017), for sentence encoders without a head.

    Spearman's correlation, times 100, between the cosine of two sentences' embeddings (mean of the tokens'
    last hidden states) and the score that people gave them. The files are the benchmark's own: no header,
    tabs between genre, file, year, id, score and the two sentences, no quoting. On the hub they are those
    of GLUE.
    """

    name: ClassVar[str] = "sts"
    metrics = (SPEARMAN,)
    least: ClassVar[int] = 3

    def read(self, data: Path | None, split: str) -> Examples:
        """Triples of two sentences and their score; see :meth:`Task.read`."""
        if data is None:
            hub = {"train": "train", "dev": "validation"}
            if split not in hub:
                raise unknown("split of sts on the hub", split, hub)
            rows = tables.from_hub("nyu-mll/glue", "stsb", hub[split])
            return [(row["sentence1"], row["sentence2"], float(row["label"])) for row in rows]
        name = f"sts-{split}.csv"
        file = tables.find(data, [name], ["STS-B"])
        if file is None:
            raise LexibitError(f"{data}: no {name} or STS-B/{name} in it, which sts needs")
        examples = []
        for number, row in enumerate(tables.read(file, header=_COLUMNS, quoted=False), 1):
            try:
                score = float(row["score"])
            except ValueError:
                score = math.nan
            if not math.isfinite(score):
                raise LexibitError(
                    f"{file}: row {number} has the score {row['score']!r}, not a number: take the file of "
                    "the STS benchmark as it is published"
                )
            examples.append((row["sentence1"], row["sentence2"], score))
        return examples

    def outcomes(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Outcomes:
        """Cosine and score of every pair, each sentence embedded once; see :meth:`Task.outcomes`."""
        texts = list(dict.fromkeys(text for first, second, _ in examples for text in (first, second)))
        embedded = embed(model, tokenizer, texts, batch_size=batch_size, progress=progress)
        vectors = dict(zip(texts, embedded, strict=True))
        return np.array([[float(vectors[a] @ vectors[b]), score] for a, b, score in examples])


def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Sentence embeddings: the mean of the tokens' last hidden states, unit length: ``[texts, hidden]``.

    A model with a head, such as ``BertForMaskedLM``, embeds with the model below it, and one of encoder and
    decoder with its encoder.

    Raises:
        LexibitError: the model gives no hidden states.
    """
    encoder: Any = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    embeddings: Tensor | None = None
    with evaluating(model), torch.inference_mode():
        for chosen, inputs in batches(encoder, tokenizer, texts, size=batch_size, progress=progress):
            hidden = getattr(encoder(**inputs), "last_hidden_state", None)
            if not isinstance(hidden, Tensor):
                raise LexibitError(
                    f"{type(model).__name__} gives no hidden states to embed sentences with: give an encoder"
                )
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            if embeddings is None:
                embeddings = torch.empty(len(texts), hidden.shape[2])
            embeddings[torch.tensor(chosen)] = F.normalize(mean, dim=-1).float().cpu()
    return torch.empty(0, 0) if embeddings is None else embeddings
