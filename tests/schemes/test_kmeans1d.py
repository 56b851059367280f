"""The k-means solver against independent dynamic programs, Lloyd's algorithm and scikit-learn."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexibit.schemes import kmeans1d
from lexibit.schemes.line.codes import nearest

Array = np.ndarray[Any, np.dtype[Any]]


def quadratic(x: Array, k: int, w: Array | None = None) -> float:
    """Lowest squared error of k clusters of x [S], by the textbook dynamic program."""
    w = np.ones(len(x)) if w is None or not w.any() else w
    order = np.argsort(x, kind="stable")
    x, w = x[order].astype(np.longdouble), w[order].astype(np.longdouble)
    x = x - x.mean()
    s0, s1, s2 = (np.concatenate([[0], np.cumsum(w * x**p)]) for p in range(3))
    i, j = np.triu_indices(len(x) + 1)
    weight = s0[j] - s0[i]
    square = np.where(weight > 0, (s1[j] - s1[i]) ** 2 / np.where(weight > 0, weight, 1), 0)
    cost = np.full((len(x) + 1, len(x) + 1), np.inf)
    cost[i, j] = np.maximum(s2[j] - s2[i] - square, 0)
    best = cost[0]
    for _ in range(k - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


def error(x: Array, levels: Array, w: Array | None = None) -> float:
    """Squared error of x [S] coded with the nearest of the levels [k]."""
    codes = nearest(x[None], levels[None])[0]
    squares = (x.astype(np.longdouble) - levels[codes]) ** 2
    return float((squares if w is None or not w.any() else squares * w).sum())


def check(x: Array, k: int, w: Array | None = None) -> None:
    x = x.astype(np.float32)
    w = None if w is None else w.astype(np.float32)
    levels = kmeans1d.optimal(x[None], k, None if w is None else w[None])
    assert levels.shape == (1, k)
    assert levels.dtype == np.float64
    assert (np.diff(levels) >= 0).all()
    scale = float(np.square(x.astype(np.float64) - x.mean(dtype=np.float64)).sum())
    best = quadratic(x, k, w)
    assert error(x, levels[0], w) <= best * (1 + 1e-7) + 1e-11 * scale


SHAPES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda r, n: r.standard_normal(n),
    "uniform": lambda r, n: r.random(n),
    "student": lambda r, n: r.standard_t(2, n),
    "exponential": lambda r, n: r.exponential(size=n),
    "modes": lambda r, n: r.integers(0, 5, n) * 10 + r.standard_normal(n) * 0.01,
    "equal modes": lambda r, n: r.integers(0, 9, n) + r.standard_normal(n) * 0.05,
    "outliers": lambda r, n: np.where(r.random(n) < 0.01, 1000, 1) * r.standard_normal(n),
    "one outlier": lambda r, n: np.append(r.standard_normal(n - 1), 1e5),
    "rounded": lambda r, n: np.round(r.standard_normal(n), 1),
    "mostly zero": lambda r, n: np.where(r.random(n) < 0.7, 0, r.standard_normal(n)),
}


@pytest.mark.parametrize("k", [2, 7, 16, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_optimal_like_quadratic(shape: str, k: int) -> None:
    rng = np.random.default_rng(k)
    size = {2: 900, 7: 500, 16: 400, 32: 300}[k]
    x = SHAPES[shape](rng, size)
    check(x, k)
    check(x, k, rng.exponential(size=size))


@pytest.mark.parametrize("shape", SHAPES)
def test_many_clusters(shape: str) -> None:
    x = SHAPES[shape](np.random.default_rng(3), 500)
    check(x, 40)


def test_many_clusters_of_long_group() -> None:
    check(np.random.default_rng(4).standard_normal(1500), 50)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.one_of(st.integers(-4, 4), st.floats(-9, 9, width=32)), st.integers(0, 3)),
        min_size=1,
        max_size=24,
    ),
    st.integers(1, 26),
    st.booleans(),
)
def test_small_groups(pairs: list[tuple[float, int]], k: int, weighted: bool) -> None:
    x, w = (np.array(column, dtype=np.float32) for column in zip(*pairs, strict=True))
    check(x, k, w if weighted else None)


@pytest.mark.parametrize("k", [3, 8])
def test_never_worse_than_scikit_learn(k: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = np.random.default_rng(0).standard_t(3, 3000).astype(np.float32)
    peer = cluster.KMeans(k, n_init=20, random_state=0).fit(x[:, None].astype(np.float64))
    assert error(x, kmeans1d.optimal(x[None], k)[0]) <= peer.inertia_ * (1 + 1e-9)


def test_long_group_never_worse_than_many_starts() -> None:
    rng = np.random.default_rng(1)
    x = np.sort(np.concatenate([rng.standard_normal(90_000), rng.normal(8, 0.3, 10_000)]))
    x = x.astype(np.float32)
    ours = error(x, kmeans1d.optimal(x[None], 6)[0])
    prefix = np.concatenate([[0], np.cumsum(x, dtype=np.float64)])
    for _ in range(30):
        levels = np.sort(rng.choice(x, 6, replace=False).astype(np.float64))
        for _ in range(60):
            ends = np.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
            ends = np.concatenate([[0], ends, [len(x)]])
            levels = np.diff(prefix[ends]) / np.maximum(np.diff(ends), 1)
        assert ours <= error(x, np.sort(levels)) * (1 + 1e-9)


def test_long_group_like_its_distinct_values() -> None:
    """100 000 repeated values are 400 weighted ones, which the quadratic program can solve."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal(400).astype(np.float32)
    counts = rng.multinomial(100_000, rng.dirichlet(np.ones(400)))
    x = rng.permutation(np.repeat(values, counts))
    levels = kmeans1d.optimal(x[None], 9)
    assert error(x, levels[0]) <= quadratic(values, 9, counts) * (1 + 1e-7)
    weighted = kmeans1d.optimal(values[None], 9, counts[None].astype(np.float32))
    np.testing.assert_allclose(weighted, levels, rtol=1e-9)


def test_constant_weights_change_nothing() -> None:
    x = np.random.default_rng(5).standard_normal((3, 20_000)).astype(np.float32)
    plain = kmeans1d.optimal(x, 8)
    for weight in (0.0, 0.25, 3.0):
        weights = np.full_like(x, weight)
        np.testing.assert_allclose(kmeans1d.optimal(x, 8, weights), plain, rtol=1e-12)


def test_values_without_weight_are_ignored() -> None:
    x = np.array([[0, 1, 2, 50, 99]], dtype=np.float32)
    w = np.array([[1, 1, 1, 0, 0]], dtype=np.float32)
    np.testing.assert_array_equal(kmeans1d.optimal(x, 4, w), [[0, 1, 2, 2]])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 4, 16, 40])
def test_groups_are_independent(k: int, weighted: bool) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_t(3, (7, 200)).astype(np.float32)
    x[2], x[4, :190] = 1, 0
    w = rng.exponential(size=x.shape).astype(np.float32) if weighted else None
    together = kmeans1d.optimal(x, k, w)
    for g in range(len(x)):
        alone = kmeans1d.optimal(x[g : g + 1], k, None if w is None else w[g : g + 1])
        np.testing.assert_allclose(together[g], alone[0], rtol=1e-12, atol=1e-12)


def test_order_of_values_and_threads_do_not_matter() -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((1, 50_000)).astype(np.float32)
    expected = kmeans1d.optimal(x, 16).tobytes()
    assert kmeans1d.optimal(rng.permutation(x, axis=1), 16).tobytes() == expected
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert kmeans1d.optimal(x, 16).tobytes() == expected
    finally:
        torch.set_num_threads(threads)


def spread(x: Array, k: int, w: Array | None = None) -> Array:
    return kmeans1d.plusplus(x, k, 3, np.random.default_rng(0), w)


def compand(x: Array, k: int, w: Array | None = None) -> Array:
    return kmeans1d.companding(x, k, 20, w)


@pytest.mark.parametrize("solve", [kmeans1d.optimal, compand, spread])
@pytest.mark.parametrize("k", [1, 3, 8, 256])
def test_edges(solve: Callable[..., Array], k: int) -> None:
    few = np.array([[5, -1, 5, -1, 2]], dtype=np.float32)
    padded = np.pad([-1.0, 2.0, 5.0], (0, max(0, k - 3)), mode="edge")
    if k >= 3:
        np.testing.assert_array_equal(solve(few, k), padded[None])
    assert not solve(np.zeros((2, 0), np.float32), k).any()
    assert solve(np.zeros((0, 5), np.float32), k).shape == (0, k)
    np.testing.assert_array_equal(solve(np.full((2, 9), 7, np.float32), k), np.full((2, k), 7.0))
    huge = np.array([[3e38, -3e38, 3e38, 1e38]], dtype=np.float32)
    levels = solve(huge, k)
    assert np.isfinite(levels).all()
    assert levels[0, -1] <= 3.4e38


def test_offset() -> None:
    x = np.random.default_rng(8).normal(1e3, 1e-3, 800).astype(np.float32)
    check(x, 8)
    check((x - 1e3) * 1e36, 8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [2, 4, 8, 16])
def test_companding_is_near_the_optimum(k: int, weighted: bool) -> None:
    rng = np.random.default_rng(k)
    x = rng.standard_normal((2, 60_000)).astype(np.float32)
    w = rng.exponential(size=x.shape).astype(np.float32) if weighted else None
    levels = kmeans1d.companding(x, k, 50, w)
    best = kmeans1d.optimal(x, k, w)
    for g in range(len(x)):
        ours = error(x[g], levels[g], None if w is None else w[g])
        least = error(x[g], best[g], None if w is None else w[g])
        assert least * (1 - 1e-9) <= ours <= 1.01 * least


def test_companding_with_many_levels() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5000)).astype(np.float32)
    before = np.inf
    for iterations in (0, 5, 50):
        levels = kmeans1d.companding(x, 256, iterations)
        assert levels.tobytes() == kmeans1d.companding(x, 256, iterations).tobytes()
        assert (np.diff(levels) >= 0).all()
        total = sum(error(row, level) for row, level in zip(x, levels, strict=True))
        assert total <= before
        before = total


@pytest.mark.parametrize("k", [4, 8, 16])
def test_many_short_groups(k: int) -> None:
    """Rows of mixed difficulty are solved in batches of like width; each must be its own optimum."""
    rng = np.random.default_rng(k)
    x = np.concatenate([SHAPES[shape](rng, 300)[None] for shape in SHAPES for _ in range(4)])
    x = x.astype(np.float32)
    levels = kmeans1d.optimal(x, k)
    for row, level in list(zip(x, levels, strict=True))[::3]:
        scale = float(np.square(row.astype(np.float64) - row.mean(dtype=np.float64)).sum())
        assert error(row, level) <= quadratic(row, k) * (1 + 1e-7) + 1e-11 * scale


def test_weighted_long_group_needs_little_memory() -> None:
    """Sorting pairs in place: 8 bytes per value, and small tables, beyond the inputs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4_000_000)).astype(np.float32)
    w = rng.exponential(size=x.shape).astype(np.float32) + np.float32(1e-3)
    tracemalloc.start()
    kmeans1d.optimal(x, 8, w)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * x.size


@pytest.mark.parametrize("iterations", [0, 3, 50])
def test_plusplus(iterations: int) -> None:
    rng = np.random.default_rng(9)
    x = rng.standard_normal((5, 20_000)).astype(np.float32)
    w = rng.exponential(size=x.shape).astype(np.float32)
    for weights in (None, w):
        levels = kmeans1d.plusplus(x, 8, iterations, np.random.default_rng(0), weights)
        again = kmeans1d.plusplus(x, 8, iterations, np.random.default_rng(0), weights)
        best = kmeans1d.optimal(x, 8, weights)
        assert levels.tobytes() == again.tobytes()
        for g in range(len(x)):
            ours = error(x[g], best[g], None if weights is None else w[g])
            theirs = error(x[g], levels[g], None if weights is None else w[g])
            assert ours <= theirs * (1 + 1e-9)
            assert theirs < 6 * ours


def test_plusplus_draws_by_squared_distance() -> None:
    """With values 0, 1 and 3, the pairs of start values have known probabilities."""
    x = np.tile(np.array([[0, 1, 3]], dtype=np.float32), (20_000, 1))
    levels = kmeans1d.plusplus(x, 2, 0, np.random.default_rng(1))
    odds = {(0, 1): 1 / 10 + 1 / 5, (0, 3): 9 / 10 + 9 / 13, (1, 3): 4 / 5 + 4 / 13}
    for pair, odd in odds.items():
        assert (levels == pair).all(axis=1).mean() == pytest.approx(odd / 3, abs=0.015)


@pytest.mark.parametrize("k", [1, 2, 16, 40, 256])
@pytest.mark.parametrize("shape", [(1, 5000), (4, 70_000), (300, 30), (2, 0)])
def test_nearest(shape: tuple[int, int], k: int) -> None:
    rng = np.random.default_rng(k)
    x = rng.standard_normal(shape).astype(np.float32)
    levels = np.sort(rng.standard_normal((shape[0], k)), axis=1)
    codes = nearest(x, levels)
    assert codes.dtype == np.uint8
    for g in range(shape[0]):
        limits = (levels[g, 1:] + levels[g, :-1]) / 2
        np.testing.assert_array_equal(codes[g], np.searchsorted(limits, x[g].astype(np.float64)))


@pytest.mark.parametrize("weighted", [False, True])
def test_long_groups_of_unlike_size_do_not_spoil_each_other(weighted: bool) -> None:
    """Groups beyond the length up to which every prefix sum is stored."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 9323)).astype(np.float32) * np.array([[1e11], [1], [1e-9]], np.float32)
    w = rng.random(x.shape).astype(np.float32) if weighted else None
    together = kmeans1d.optimal(x, 19, w)
    for g in range(3):
        alone = kmeans1d.optimal(x[g : g + 1], 19, None if w is None else w[g : g + 1])
        np.testing.assert_array_equal(together[g], alone[0])


def test_narrowing_in_many_passes_finds_the_same_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small groups would take one grid only: ask for windows of no width, from a coarse first grid."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.standard_normal((6, 300)), rng.standard_t(1.5, (6, 300))]).astype(np.float32)
    at_once = kmeans1d.optimal(x, 7)
    narrowing = sys.modules["lexibit.schemes.kmeans1d.windows"]
    monkeypatch.setattr(narrowing, "_NARROW", 0)
    monkeypatch.setattr(narrowing, "_CELLS", 2)
    np.testing.assert_array_equal(kmeans1d.optimal(x, 7), at_once)
