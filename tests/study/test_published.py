"""Published numbers: all of the tables, and found by what a study calls the same experiment."""

from __future__ import annotations

from collections import Counter

import pytest

from lexibit import LexibitError, schemes, tasks
from lexibit.study.published import beside, models, published


def test_every_cell_has_a_source_a_scheme_and_a_task_of_ours():
    assert len(published()) == 281
    known = {*schemes.names(), "float"}
    for cell in published():
        assert cell.source
        assert cell.scheme in known
        assert 1 <= cell.bits <= 8 or (cell.bits, cell.scheme) == (32, "float")
        assert cell.task in {*tasks.names(), "average", "glue"}


def test_tables_are_whole():
    count = Counter(cell.source for cell in published())
    # eleven columns and the average, of full precision (in the tables of linear bins) and five widths
    assert [count[f"Zhao et al. 2020, Table {number}"] for number in range(1, 7)] == [72, 60, 72, 60, 3, 12]


def value(found, task, metric="accuracy x 100"):
    (one,) = [cell.value for cell in found if cell.task == task and cell.metric == metric]
    return one


def test_the_same_experiment_is_found():
    kmeans = {"scheme": "kmeans", "option": {"init": "k-means++"}}
    assert value(beside("bert-base-uncased", "x", kmeans, None, 2, True), "rte") == 66.1
    assert value(beside("albert-base-v2", "float", {}, None, 32, False), "mnli") == 84.9
    assert value(beside("bert-base-uncased", "x", {"scheme": "linear"}, "blocks:128", 1, True), "rte") == 53.1
    more = {"scheme": "kmeans", "option": ["init=k-means++", "iterations=10"]}
    assert value(beside("albert-base-v2", "x", more, None, 1, True), "qnli") == 60.63
    assert value(beside("albert-base-v2", "x", kmeans, None, 1, True), "qnli") == 50.6


@pytest.mark.parametrize(
    ("settings", "groups", "bits", "tuned"),
    [
        ({"scheme": "kmeans"}, None, 2, False),
        ({"scheme": "kmeans"}, "row", 2, True),
        ({"scheme": "kmeans"}, None, 6, True),
        ({"scheme": "lq"}, None, 2, True),
        ({"scheme": "kmeans"}, None, 2, True),
        ({"scheme": "kmeans", "option": ["init=k-means++", "iterations=7"]}, None, 2, True),
        ({"scheme": "kmeans", "option": {"init": "k-means++"}, "calibrate": "texts.txt"}, None, 2, True),
        ({"scheme": "kmeans", "option": {"init": "k-means++"}, "outliers": 0.01}, None, 2, True),
        ({"scheme": "kmeans", "option": {"init": "k-means++", "iterations": 7}}, None, 2, True),
    ],
)
def test_another_experiment_is_not(settings, groups, bits, tuned):
    assert beside("bert-base-uncased", "x", settings, groups, bits, tuned) == []


def test_an_unknown_model_is_an_error_with_a_suggestion():
    with pytest.raises(LexibitError, match=r"unknown model of published numbers 'bert-bas'.*'bert-base'"):
        beside("bert-bas", "float", {}, None, 32, False)
    assert models() == ["bert-base-uncased", "albert-base-v2", "bert-base", "bert-large"]
