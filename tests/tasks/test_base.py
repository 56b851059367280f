"""Scores, intervals and differences, against closed forms and brute force."""

import itertools
import math
from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import norm

from lexibit import LexibitError
from lexibit.tasks import base
from lexibit.tasks.base import Task
from lexibit.tasks.metrics import (
    ACCURACY,
    BLEU,
    EXACT_MATCH,
    F1,
    MACRO_F1,
    MATTHEWS,
    PEARSON,
    SPEARMAN,
    Metric,
)

MEAN = Metric("mean", lambda outcomes: float(outcomes[:, 0].mean()))
LOSS = Metric("loss", lambda outcomes: float(outcomes[:, 0].sum()), higher=False)


class Numbers(Task):
    """Examples that are their own outcomes."""

    name = "numbers"
    metrics = (MEAN, LOSS)
    least = 2

    def __init__(self, *metrics):
        if metrics:
            self.metrics = metrics

    def read(self, data, split):
        return list(range(int(data.name)))

    def outcomes(self, model, tokenizer, examples, *, batch_size=64, progress=False):
        return np.array([[model * example] for example in examples], dtype=float)


def column(*values):
    return np.array(values, dtype=float)[:, None]


# data ------------------------------------------------------------------------------------------------


def test_a_limit_takes_that_many_by_seed_in_their_order(tmp_path):
    task = Numbers()
    chosen = task.load(tmp_path / "100", limit=10, seed=1)
    assert len(chosen) == 10
    assert chosen == sorted(set(chosen))
    assert chosen == task.load(tmp_path / "100", limit=10, seed=1) != task.load(tmp_path / "100", limit=10)
    assert task.load(tmp_path / "5", limit=10) == [0, 1, 2, 3, 4]
    # each is as likely as any other: 10 of 100, 400 times, is 40 each
    counts = np.bincount(
        [number for seed in range(400) for number in task.load(tmp_path / "100", limit=10, seed=seed)]
    )
    assert 15 < counts.min() <= counts.max() < 70


def test_too_few_examples_are_refused(tmp_path):
    with pytest.raises(LexibitError, match=r"1 train examples are too few for numbers: give 2 or more"):
        Numbers().load(tmp_path / "1", "train")
    with pytest.raises(LexibitError, match="1 dev examples are too few"):
        Numbers().load(tmp_path / "9", limit=1)


# scores ----------------------------------------------------------------------------------------------


def test_a_score_holds_every_metric_with_its_interval():
    values = np.random.default_rng(0).normal(5, 2, (400, 1))
    mean, loss = Numbers().scores(values, seconds=1.5, seed=3)
    half = norm.ppf(0.975) * values.std() / 20
    assert mean.value == pytest.approx(values.mean())
    assert mean.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert mean.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (mean.metric, mean.examples, mean.seed, mean.seconds, mean.higher) == ("mean", 400, 3, 1.5, True)
    assert (loss.metric, loss.value, loss.higher) == ("loss", pytest.approx(400 * mean.value), False)
    assert loss.low == pytest.approx(400 * mean.low)


def test_scores_depend_on_the_seed_alone():
    values = np.random.default_rng(0).normal(size=(50, 1))
    first, again, other = (Numbers().scores(values, seconds=0, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert (first[0].low, first[0].value) != (other[0].low, first[0].value)


def test_a_measure_is_the_first_score_of_a_model_with_its_time():
    task = Numbers()
    score = task.measure(None, [1, 2, 3, 6], seed=2)(2)
    assert score.value == 6
    assert score.seconds > 0
    assert [score] == task.scores(task.outcomes(2, None, [1, 2, 3, 6]), seconds=score.seconds, seed=2)[:1]


@pytest.mark.parametrize("outcomes", [column(3.0), np.full((5, 1), np.nan)])
def test_one_example_or_a_score_that_is_no_number_has_no_interval(outcomes):
    score = Numbers().scores(outcomes)[0]
    assert math.isnan(score.low)
    assert math.isnan(score.high)
    assert score.value == pytest.approx(outcomes[0, 0], nan_ok=True)


def test_samples_that_have_no_correlation_are_left_out_of_the_interval_without_a_warning():
    # 1 of 9 samples of three pairs is the same pair three times
    pairs = np.array([[0.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    for score in Numbers(PEARSON, SPEARMAN).scores(pairs):
        assert score.value == pytest.approx(50)
        assert (score.low, score.high) == (pytest.approx(-100), pytest.approx(100))


@pytest.mark.parametrize(
    "predicted", [[1.0, 1.0, 1.0], [math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [1.0, 1.0 + 1e-15, 1.0]]
)
def test_predictions_without_a_correlation_score_nan_without_a_warning(predicted):
    (score,) = Numbers(PEARSON).scores(np.array([predicted, [1.0, 2.0, 3.0]]).T)
    assert math.isnan(score.value) or abs(score.value) <= 100


def test_classes_that_are_all_the_same_make_no_warning(monkeypatch):
    monkeypatch.setattr(base, "RESAMPLES", 20)
    alike = np.ones((6, 2))
    for metric, value in ((ACCURACY, 100), (F1, 100), (MACRO_F1, 100), (MATTHEWS, 0)):
        (score,) = Numbers(metric).scores(alike)
        assert (score.value, score.low, score.high) == (value, value, value)
        (difference,) = Numbers(metric).differences(alike, alike)
        assert astuple(difference)[1:] == (0, 0, 0, 1)


def test_a_prediction_that_is_no_class_is_wrong_and_no_error():
    outcomes = np.array([[-1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [-1.0, 0.0]])
    assert ACCURACY.of(outcomes) == 50
    assert F1.of(outcomes) == pytest.approx(100 * 2 * 1 * 0.5 / 1.5)
    assert MACRO_F1.of(outcomes) == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)
    assert 0 < MATTHEWS.of(outcomes) < 100


def test_the_f1_of_class_one_is_precision_and_recall_counted_by_hand():
    rng = np.random.default_rng(0)
    predicted, label = rng.integers(0, 2, (2, 200))
    both = (predicted * label).sum()
    expected = 100 * 2 * both / (predicted.sum() + label.sum())
    assert F1.of(np.array([predicted, label], dtype=float).T) == pytest.approx(expected)
    assert F1.of(np.zeros((3, 2))) == 0


def test_metrics_of_nothing_that_counts_are_zero_or_nan():
    assert BLEU.of(np.zeros((2, 10))) == 0
    assert math.isnan(EXACT_MATCH.of(np.empty((0, 2))))


# differences -----------------------------------------------------------------------------------------


def test_the_p_value_is_that_of_all_swaps_of_sides():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.5, 1, (8, 1)), rng.normal(0, 1, (8, 1))
    difference = Numbers().differences(ours, theirs)[0]
    each = (ours - theirs)[:, 0]
    seen = each.mean()
    swapped = [np.mean(each * signs) for signs in itertools.product((1, -1), repeat=8)]
    assert difference.value == pytest.approx(seen)
    assert difference.p == pytest.approx(np.mean(np.abs(swapped) >= abs(seen) - 1e-12))


def test_an_interval_of_a_difference_is_of_the_pairs():
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 10, (300, 1))
    ours = theirs + rng.normal(0.3, 1, (300, 1))
    difference = Numbers().differences(ours, theirs)[0]
    half = norm.ppf(0.975) * (ours - theirs).std() / math.sqrt(300)
    assert difference.low == pytest.approx((ours - theirs).mean() - half, abs=0.1 * half)
    assert difference.high == pytest.approx((ours - theirs).mean() + half, abs=0.1 * half)
    assert difference.low > 0
    assert difference.p == pytest.approx(0.002)  # none of 999 permutations is as far, on either side


def test_a_difference_turns_its_sign_with_the_sides_and_keeps_its_p_value():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.2, 1, (2, 40, 1))
    forth, back = Numbers().differences(ours, theirs, seed=1), Numbers().differences(theirs, ours, seed=1)
    for one, other in zip(forth, back, strict=True):
        assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
        assert one.p == pytest.approx(other.p, abs=1e-9)
    assert forth == Numbers().differences(ours, theirs, seed=1)
    assert forth[0].low != Numbers().differences(ours, theirs, seed=2)[0].low


def test_models_that_are_alike_differ_by_chance_in_few_of_many_trials(monkeypatch):
    monkeypatch.setattr(base, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    found = [
        Numbers(MEAN).differences(*rng.normal(size=(2, 12, 1)), seed=seed)[0].p < 0.1 for seed in range(60)
    ]
    assert 1 <= sum(found) <= 13  # 6 expected; each more unlikely than 1 in 300


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (column(1.0), column(2.0)),
        (column(1.0, math.nan, 3.0), column(1.0, 2.0, 3.0)),
        (column(1.0, math.inf, 3.0), column(1.0, math.inf, 3.0)),
    ],
)
def test_where_there_is_no_difference_to_test_the_p_value_is_nan_without_a_warning(ours, theirs):
    difference = Numbers().differences(ours, theirs)[0]
    assert math.isnan(difference.low)
    assert math.isnan(difference.p)


def test_permutations_without_a_correlation_leave_no_p_value():
    # one swap of sides makes each constant
    ours, theirs = (
        np.array([[0.0, 1.0], [1.0, 2.0], [0.0, 3.0]]),
        np.array([[1.0, 1.0], [0.0, 2.0], [1.0, 3.0]]),
    )
    (difference,) = Numbers(PEARSON).differences(ours, theirs)
    assert math.isfinite(difference.value)
    assert math.isnan(difference.p)
