"""Sorted groups and codes against numpy, one value at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexibit.schemes.line.codes import blocks, floor32, intervals, midpoints, nearest, under32
from lexibit.schemes.line.sorted import Sorted, by_chunks, search_rows

Array = np.ndarray[Any, np.dtype[Any]]

NUMBERS = st.floats(-(2.0**20), 2.0**20, width=32)


def groups(size: int = 40) -> st.SearchStrategy[Array]:
    shapes = st.tuples(st.integers(1, 12), st.integers(1, size))
    return hnp.arrays(np.float32, shapes, elements=NUMBERS)


@given(st.floats(-1e30, 1e30))
def test_a_limit_leaves_its_own_number_on_the_side_it_says(x: float) -> None:
    low, under = floor32(np.array([x])), under32(np.array([x]))
    above, over = (np.nextafter(limit, np.float32(np.inf)) for limit in (low, under))
    assert float(low[0]) <= x < float(above[0])
    assert float(under[0]) < x <= float(over[0])


def test_a_number_beyond_float32_is_a_limit_beyond_all_values() -> None:
    far = np.array([1e300, -1e300])
    largest = float(np.finfo(np.float32).max)
    assert floor32(far).tolist() == under32(far).tolist() == [largest, -float("inf")]


@given(groups(), st.integers(1, 40), st.integers(0, 99))
def test_intervals_count_the_limits_below_each_value(x: Array, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    limits = np.sort(rng.choice(x.ravel(), (len(x), count)), axis=1)
    codes = intervals(x, limits)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, (x[:, :, None] > limits[:, None]).sum(2))


def test_the_nearest_level_is_taken_and_of_two_the_lower() -> None:
    levels = np.array([[-1.0, 0.0, 4.0]])
    x = np.array([[-9, -0.5, -0.49, 1.9, 2, 2.1, 9]], np.float32)
    assert nearest(x, levels).tolist() == [[0, 0, 1, 1, 1, 2, 2]]
    assert midpoints(levels).tolist() == [[-0.5, 2.0]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 200_000), (70_000, 2), (5, 0), (0, 5)])
def test_blocks_make_up_the_array_once(shape: tuple[int, int]) -> None:
    seen = np.zeros(shape, int)
    for rows, columns in blocks(shape):
        assert seen[rows, columns].size <= 1 << 16
        seen[rows, columns] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("right", [True, False])
def test_rows_are_searched_like_numpy_does(rows: int, right: bool) -> None:
    rng = np.random.default_rng(rows)
    table = np.sort(rng.integers(0, 20, (rows, 30)), axis=1).astype(np.float32)
    limits = rng.integers(-1, 22, (rows, 7)).astype(np.float32)
    expected = [
        np.searchsorted(*row, "right" if right else "left") for row in zip(table, limits, strict=True)
    ]
    np.testing.assert_array_equal(search_rows(table, limits, right), expected)


@given(groups(), st.booleans(), st.integers(0, 99))
def test_the_sums_between_limits_are_those_of_the_values_there(x: Array, weighted: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(1, 9, x.shape).astype(np.float32) if weighted else None
    limits = np.sort(rng.choice(x.ravel(), (len(x), 3)), axis=1)
    data = Sorted.of(x, w)
    inside = (x[:, :, None] > limits[:, None]).sum(2)[:, :, None] == np.arange(4)
    about = x.astype(np.float64) - data.centre[:, None]
    heavy = np.ones(x.shape) if w is None else w
    expected = [(inside * (heavy * about**power)[:, :, None]).sum(1) for power in range(3)]
    # prefix sums of squares lose the last digits of the largest
    for sums, known in zip(data.parts(limits), expected, strict=True):
        np.testing.assert_allclose(sums, known, rtol=1e-9, atol=1e-9 * (1 + np.abs(known).max()))


def test_long_groups_sum_like_short_ones() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 50_000)).astype(np.float32)
    limits = np.array([[-1, 0, 0.5]], np.float32)
    weight, total, square = Sorted.of(x, None).parts(limits)
    inside = [x[(x > low) & (x <= high)] for low, high in ((-9, -1), (-1, 0), (0, 0.5), (0.5, 9))]
    centre = Sorted.of(x, None).centre[0]
    np.testing.assert_array_equal(weight[0], [len(part) for part in inside])
    np.testing.assert_allclose(total[0], [(part - centre).sum(dtype=float) for part in inside], rtol=1e-5)
    np.testing.assert_allclose(
        square[0], [((part - centre) ** 2).sum(dtype=float) for part in inside], rtol=1e-5
    )


def test_chunks_are_all_groups_in_order() -> None:
    x = np.arange(600_000, dtype=np.float32).reshape(300, 2000)
    found = [(part, data) for part, data in by_chunks(x, None)]
    assert len(found) > 1
    np.testing.assert_array_equal(np.concatenate([data.x for _, data in found]), x)
    assert [part.start for part, _ in found] == list(range(0, 300, found[0][0].stop))
