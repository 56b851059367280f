"""The metrics: what many examples' outcomes come to. Each is a library's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

from lexibit.errors import needs_extra

Outcomes = NDArray[np.float64]
"""What a model made of examples: a row of numbers each."""


@dataclass(frozen=True)
class Metric:
    """A number over the outcomes of many examples.

    Attributes:
        name: what tables call it.
        of: the number, of outcomes ``[examples, numbers]``; NaN where there is none.
        higher: whether more is better.
    """

    name: str
    of: Callable[[Outcomes], float]
    higher: bool = True


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of libraries about data so much alike that a number over them says little, or is NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy and SciPy
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)  # scikit-learn
        yield


def _correlation(statistic: Callable[..., Any]) -> Callable[[Outcomes], float]:
    """A correlation of predictions and labels, times 100."""

    @wraps(statistic)
    def of(outcomes: Outcomes) -> float:
        predicted, label = outcomes.T
        # of a constant there is no correlation
        if len(outcomes) < 2 or not np.ptp(predicted) > 0 or not np.ptp(label) > 0:
            return float("nan")
        with quiet():
            return 100 * float(statistic(predicted, label).statistic)

    return of


def _classified(name: str, **options: Any) -> Callable[[Outcomes], float]:
    """A metric of scikit-learn on classes, times 100, by its name there."""

    def of(outcomes: Outcomes) -> float:
        with needs_extra("tasks"):
            from sklearn import metrics
        predicted, label = outcomes.T.astype(np.int64)
        with quiet():
            return 100 * float(getattr(metrics, name)(label, predicted, **options))

    return of


def _mean(column: int) -> Callable[[Outcomes], float]:
    """The mean of a column, times 100."""
    return lambda outcomes: 100 * float(outcomes[:, column].mean()) if len(outcomes) else float("nan")


def _bleu(outcomes: Outcomes) -> float:
    """Corpus BLEU, from 0 to 100."""
    with needs_extra("tasks"):
        import sacrebleu
    length, reference, *counts = outcomes.sum(0).astype(np.int64).tolist()
    half = len(counts) // 2
    return float(
        sacrebleu.BLEU.compute_bleu(
            counts[:half], counts[half:], length, reference, smooth_method="exp"
        ).score
    )


def _perplexity(outcomes: Outcomes) -> float:
    """exp of the negative log-likelihood of a unit; NaN without units."""
    nats, units = outcomes.sum(0)
    with np.errstate(over="ignore"):
        return float(np.exp(nats / units)) if units > 0 else float("nan")


# of outcomes (predicted, label)
ACCURACY = Metric("accuracy x 100", _classified("accuracy_score"))
# of class 1, the mean over this one class: a prediction that is no class has no place among two
F1 = Metric("F1 x 100", _classified("f1_score", labels=[1], average="macro", zero_division=0.0))
MACRO_F1 = Metric("macro F1 x 100", _classified("f1_score", average="macro", zero_division=0.0))
MATTHEWS = Metric("Matthews x 100", _classified("matthews_corrcoef"))
PEARSON = Metric("Pearson x 100", _correlation(pearsonr))
SPEARMAN = Metric("Spearman x 100", _correlation(spearmanr))

# of outcomes (exact match, F1) of an answer
EXACT_MATCH = Metric("exact match x 100", _mean(0))
ANSWER_F1 = Metric("F1 x 100", _mean(1))

# of outcomes (lengths of translation and reference, n-grams that agree, n-grams)
BLEU = Metric("sacreBLEU", _bleu)

# of outcomes (negative log-likelihood in nats, how many tokens or words)
PERPLEXITY = Metric("perplexity", _perplexity, higher=False)
