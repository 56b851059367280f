"""The sixteen sets, and importances as parameters and back."""

import pytest

from lexibit.importance import Magnitude, parse
from lexibit.search.space import NONE, RANGES, SETS, STARTS, importance, parameters, spelling


def test_the_sixteen_sets_are_those_of_the_paper() -> None:
    assert len(set(SETS)) == 16
    assert list(STARTS) == [NONE, *SETS]
    assert all(one.P == 0 for one in SETS[:8])
    assert {one.P for one in SETS[8:]} == {0.02, 0.05, 0.1, 0.2}
    assert {one.C for one in SETS} == {1.0, 0.99, 0.999, 0.9999}


@pytest.mark.parametrize("one", STARTS)
def test_parameters_give_the_importance_back_and_lie_in_their_ranges(one: Magnitude) -> None:
    found = parameters(one)
    assert importance(found) == one
    for name, value in found.items():
        low, high, _ = RANGES[name]
        assert low <= value <= high


def test_what_is_written_means_what_was_tried() -> None:
    one = importance({"E": 0.123456, "1-C": 0.00123456, "P": 0.0333333})
    assert one == Magnitude(0.1235, 0.99877, 0.0333)
    assert parse(str(spelling(one))) == one
    assert spelling(NONE) is None
    assert spelling(Magnitude(0.0, 0.99, 0.1)) == "E=0,C=0.99,P=0.1"
