"""Scores of lexibit evaluate, read again."""

import math

import pytest

from lexibit import LexibitError
from lexibit.files import write_json
from lexibit.scores import read_scores

SCORE = {"metric": "f1", "value": 88.125, "low": 86.0, "high": 90.5, "examples": 408, "higher": True}


@pytest.fixture
def scores(tmp_path):
    """A function that writes a file of scores."""

    def make(**changes):
        document = {"task": "mrpc", "split": "dev", "scores": {"out/my-bert-3bit": [SCORE | changes]}}
        write_json(tmp_path / "scores.json", document)
        return tmp_path / "scores.json"

    return make


def test_scores_are_read(scores):
    (one,) = read_scores(scores())
    assert (one.model, one.task, one.split, one.metric) == ("my-bert-3bit", "mrpc", "dev", "f1")
    assert one.text == "88.12 (86.00 to 90.50)"


def test_what_is_no_number_is_read_as_such(scores):
    (one,) = read_scores(scores(low=math.nan, high=math.nan))
    assert one.text == "88.12"
    (one,) = read_scores(scores(value=math.nan))
    assert (one.text, math.isnan(one.value)) == ("none", True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"task": "a", "split": "b", "scores": {"m": [{}]}}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(LexibitError, match=r"holds no scores .* lexibit evaluate --out"):
        read_scores(tmp_path / "other.json")
    with pytest.raises(LexibitError, match="cannot be read"):
        read_scores(tmp_path / "none.json")
