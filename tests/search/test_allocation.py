"""Bits under a budget against all combinations there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexibit import LexibitError
from lexibit.search import allocation
from lexibit.search.allocation import Option, allocate

layer = st.lists(
    st.tuples(st.integers(1, 50), st.floats(-1, 10, allow_nan=False).map(lambda x: round(x, 3))),
    min_size=1,
    max_size=4,
)


def named(layers: list[list[tuple[int, float]]]) -> dict[str, list[Option]]:
    return {
        f"layer {number}": [Option(bits, *one) for bits, one in enumerate(some, 1)]
        for number, some in enumerate(layers)
    }


def worth(options: dict[str, list[Option]], bits: dict[str, int]) -> tuple[float, int]:
    chosen = [next(one for one in some if one.bits == bits[name]) for name, some in options.items()]
    return sum(one.damage for one in chosen), sum(one.nbytes for one in chosen)


def brute(options: dict[str, list[Option]], nbytes: int) -> float:
    found = [
        sum(one.damage for one in some)
        for some in itertools.product(*options.values())
        if sum(one.nbytes for one in some) <= nbytes
    ]
    return min(found)


@given(st.lists(layer, min_size=1, max_size=5), st.integers(0, 200))
def test_no_combination_is_better(layers: list[list[tuple[int, float]]], more: int) -> None:
    options = named(layers)
    least = sum(min(one.nbytes for one in some) for some in options.values())
    found, nbytes = worth(options, allocate(options, least + more))
    assert nbytes <= least + more
    assert found == pytest.approx(brute(options, least + more), abs=1e-9)


def test_of_too_many_sums_few_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    layers = [
        sorted(zip(rng.integers(1, 10**6, 6).tolist(), rng.random(6).tolist(), strict=True)) for _ in range(8)
    ]
    options = named(layers)
    budget = 3 * 10**6
    exact, _ = worth(options, allocate(options, budget))
    monkeypatch.setattr(allocation, "_STATES", 500)
    found, nbytes = worth(options, allocate(options, budget))
    assert nbytes <= budget
    assert exact <= found <= brute_bound(options, budget - 8 * (budget // 500 + 1))


def brute_bound(options: dict[str, list[Option]], budget: int) -> float:
    return worth(options, allocate_exactly(options, budget))[0]


def allocate_exactly(options: dict[str, list[Option]], budget: int) -> dict[str, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_STATES", 1 << 30)
        return allocate(options, budget)


def test_a_budget_that_nothing_keeps_and_a_damage_that_is_no_number_are_refused() -> None:
    options = {"a": [Option(1, 10, 0.5)], "b": [Option(1, 5, 0.5), Option(2, 7, 0.1)]}
    with pytest.raises(LexibitError, match="the budget is 14 bytes, and the fewest bits take 15: give more"):
        allocate(options, 14)
    assert allocate(options, 15) == {"a": 1, "b": 1}
    assert allocate(options, 17) == {"a": 1, "b": 2}
    with pytest.raises(LexibitError, match="b: a damage is NaN"):
        allocate(options | {"b": [Option(1, 5, float("nan"))]}, 99)
