"""STS: does the cosine of two sentences' embeddings tell how alike people find them?"""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap, spearmanr
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit.batches import batches
from lexibit.errors import LexibitError
from lexibit.nn.modes import evaluating
from lexibit.tasks.base import Examples, Score, Task

_RESAMPLES = 1000


class STS(Task):
    """Semantic textual similarity (Cer et al. 2017), for sentence encoders without a head.

    Spearman's correlation, times 100, between the cosine of two sentences' embeddings (mean of the tokens'
    last hidden states) and the score that people gave them. The file is the benchmark's own ``sts-dev.csv``:
    no header, tabs between genre, file, year, id, score and the two sentences, no quoting.
    """

    name: ClassVar[str] = "sts"
    metric: ClassVar[str] = "Spearman x 100"
    files: ClassVar[str] = "sts-dev.csv"

    def load(self, data: Path, limit: int | None = None, seed: int = 0) -> Examples:
        """Triples of two sentences and their score; see :meth:`Task.load`."""
        found = [path for path in (data / self.files, data / "STS-B" / self.files) if path.is_file()]
        if not found:
            raise LexibitError(f"{data}: no {self.files} or STS-B/{self.files} in it, which sts needs")
        examples = []
        for number, row in enumerate(_rows(found[0]), 1):
            try:
                first, second, score = row[5], row[6], float(row[4])
            except (IndexError, ValueError):
                score = math.nan
            if not math.isfinite(score):
                raise LexibitError(
                    f"{found[0]}: line {number} is not genre, file, year, id, score and two sentences "
                    "between tabs: take the file of the STS benchmark as it is published"
                )
            examples.append((first, second, score))
        if limit is not None and limit < len(examples):
            chosen = np.random.default_rng(seed).choice(len(examples), limit, replace=False)
            examples = [examples[index] for index in sorted(chosen)]
        if len(examples) < 3:
            raise LexibitError(
                f"{found[0]}: {len(examples)} examples are too few for a correlation: give 3 or more"
            )
        return examples

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        *,
        batch_size: int = 64,
        seed: int = 0,
    ) -> Score:
        """Embed every sentence once, and correlate; see :meth:`Task.score`."""
        texts = list(dict.fromkeys(text for first, second, _ in examples for text in (first, second)))
        start = time.perf_counter()
        vectors = dict(zip(texts, embed(model, tokenizer, texts, batch_size=batch_size), strict=True))
        seconds = time.perf_counter() - start
        cosines = np.array([float(vectors[first] @ vectors[second]) for first, second, _ in examples])
        scores = np.array([score for *_, score in examples])
        value = _spearman(cosines, scores)
        interval = bootstrap(
            (cosines, scores),
            _spearman,
            paired=True,
            vectorized=False,
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
        return Score(self.metric, value, low, high, len(examples), seed, seconds)


def _rows(file: Path) -> list[list[str]]:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            return list(csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LexibitError(f"{file}: cannot be read as UTF-8 text between tabs: {error}") from error


def _spearman(cosines: np.ndarray, scores: np.ndarray) -> float:
    return 100 * float(spearmanr(cosines, scores).statistic)


def embed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, batch_size: int = 64
) -> Tensor:
    """Sentence embeddings: the mean of the tokens' last hidden states, unit length: ``[texts, hidden]``.

    Raises:
        LexibitError: the model gives no hidden states.
    """
    embeddings: Tensor | None = None
    with evaluating(model), torch.inference_mode():
        for chosen, inputs in batches(model, tokenizer, texts, size=batch_size):
            hidden = getattr(model(**inputs), "last_hidden_state", None)
            if not isinstance(hidden, Tensor):
                raise LexibitError(f"{type(model).__name__} gives no hidden states to embed sentences with")
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            if embeddings is None:
                embeddings = torch.empty(len(texts), hidden.shape[2])
            embeddings[torch.tensor(chosen)] = F.normalize(mean, dim=-1).float().cpu()
    return torch.empty(0, 0) if embeddings is None else embeddings
