"""Binary codes against closed forms, brute force over all codes, and plain least squares."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexibit import CodebookWeight, LexibitError, Recipe, quantize_tensor, schemes
from lexibit.packing import pack, unpack

Array = np.ndarray[Any, np.dtype[Any]]

METHODS = ("greedy", "refined", "alternating")
WIDTHS = range(1, 9)
ROWS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=32))


def fit(x: Array, bits: int, m: Array | None = None, **options: object) -> tuple[Array, Array]:
    """Scales [G, q] and planes [G, S, q] of groups x [G, S]."""
    importance = None if m is None else torch.from_numpy(m.astype(np.float32))
    scheme = schemes.scheme("binary", options)
    scales, codes = scheme.fit(torch.from_numpy(x.astype(np.float32)), bits, importance, 0)
    return scales.double().numpy(), planes_of(codes.numpy(), bits)


def planes_of(codes: Array, bits: int) -> Array:
    return np.where(codes[..., None] >> np.arange(bits) & 1, 1.0, -1.0)


def error(x: Array, scales: Array, planes: Array, m: Array | None = None) -> Array:
    """Weighted squared error of each group."""
    squares = (x - (planes * scales[:, None]).sum(-1)) ** 2
    return (squares if m is None else squares * m).sum(-1)


def normal(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


# plain versions: a residual a weight, least squares a row --------------------------------------------


def plain_least_squares(w: Array, planes: Array, m: Array) -> Array:
    root = np.sqrt(m)
    return np.linalg.lstsq(planes * root[:, None], w * root, rcond=None)[0]


def plain_greedy(w: Array, bits: int, m: Array, refit: bool) -> tuple[Array, Array]:
    planes, scales = np.empty((len(w), 0)), np.empty(0)
    for _ in range(bits):
        residual = w - planes @ scales
        planes = np.column_stack([planes, np.where(residual >= 0, 1.0, -1.0)])
        if refit:
            scales = plain_least_squares(w, planes, m)
        else:
            scales = np.append(scales, (m * np.abs(residual)).sum() / m.sum())
    return scales, planes


def plain_alternating(w: Array, bits: int, m: Array, rounds: int) -> tuple[Array, Array]:
    _, planes = plain_greedy(w, bits, m, refit=False)
    every = planes_of(np.arange(2**bits), bits)
    for _ in range(rounds):
        levels = every @ plain_least_squares(w, planes, m)
        # of equally near levels the higher
        order = np.argsort(-levels, kind="stable")
        near = np.abs(w[:, None] - levels[order]).argmin(1)
        planes = every[order[near]]
    return plain_least_squares(w, planes, m), planes


def plain(w: Array, bits: int, m: Array, method: str, rounds: int = 15) -> tuple[Array, Array]:
    if method == "alternating":
        return plain_alternating(w, bits, m, rounds)
    return plain_greedy(w, bits, m, method == "refined")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("method", METHODS)
def test_scales_and_planes_are_those_of_the_plain_algorithm(method: str, bits: int, weighted: bool) -> None:
    x = normal(20, 150).astype(np.float64)
    m = np.random.default_rng(1).exponential(size=x.shape).astype(np.float32) if weighted else None
    scales, planes = fit(x, bits, m, method=method)
    for row in range(len(x)):
        known, known_planes = plain(x[row], bits, np.ones(150) if m is None else m[row], method)
        np.testing.assert_allclose(scales[row], known, rtol=1e-5, atol=1e-6)
        assert (planes[row] == known_planes).all(1).mean() > 0.995  # a weight may lie on a border


@given(ROWS, st.booleans(), st.integers(0, 99))
def test_each_further_bit_lowers_the_error_of_any_row_and_alternating_lowers_it_more(
    w: Array, weighted: bool, seed: int
) -> None:
    w = np.where(np.abs(w) < 1e-20, 0, w).astype(np.float64)[None]
    m = np.random.default_rng(seed).integers(1, 5, w.shape) if weighted else None
    near = 1e-6 * np.square(w).sum() * 5
    for method in ("greedy", "refined"):
        errors = [error(w, *fit(w, bits, m, method=method), m)[0] for bits in range(1, 6)]
        assert all(after <= before + near for before, after in itertools.pairwise(errors)), method
    for bits in range(1, 6):
        greedy = error(w, *fit(w, bits, m, method="greedy"), m)[0]
        assert error(w, *fit(w, bits, m), m)[0] <= greedy + near


# closed forms ----------------------------------------------------------------------------------------


@given(ROWS, st.sampled_from(METHODS))
def test_one_bit_is_the_mean_magnitude_and_the_sign(w: Array, method: str) -> None:
    scales, planes = fit(w[None], 1, method=method)
    assert scales[0, 0] == pytest.approx(np.abs(w.astype(np.float64)).mean(), rel=1e-6)
    np.testing.assert_array_equal(planes[0, :, 0], np.where(w >= 0, 1, -1))


def test_one_weighted_bit_is_the_weighted_mean_magnitude() -> None:
    w, m = normal(1, 50), np.random.default_rng(3).random((1, 50))
    for method in METHODS:
        scales, _ = fit(w, 1, m, method=method)
        assert scales[0, 0] == pytest.approx((m * np.abs(w)).sum() / m.sum(), rel=1e-5)


def test_a_zero_weight_gets_the_upper_code() -> None:
    w = np.array([[0.0, -0.0, 1.0, -1.0]])
    for method in METHODS:
        _, planes = fit(w, 1, method=method)
        assert planes[0, :, 0].tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_sums_of_signed_scales_are_found_again(method: str, bits: int) -> None:
    # scales of which greedy codes recover the planes one by one
    scales = 4.0 ** -np.arange(bits)
    every = planes_of(np.arange(2**bits), bits)
    w = np.tile(every @ scales, 5)[None]
    found, planes = fit(w, bits, method=method)
    np.testing.assert_allclose(np.sort(found[0])[::-1], scales, rtol=1e-6)
    np.testing.assert_allclose((planes * found[:, None]).sum(-1), w, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_levels_are_a_special_case_that_alternating_keeps(bits: int) -> None:
    # all levels of a grid about zero: binary codes with scales step/2, step, 2 step, ... fit them exactly
    levels = 0.3 * (np.arange(2**bits) - (2**bits - 1) / 2)
    w = np.tile(levels, 4)[None]
    found, planes = fit(w, bits, method="alternating")
    np.testing.assert_allclose((planes * found[:, None]).sum(-1), w, atol=1e-6)
    np.testing.assert_allclose(np.sort(found[0]), 0.15 * 2.0 ** np.arange(bits), rtol=1e-5)


def test_the_error_on_normal_rows_is_the_known_one() -> None:
    x = normal(1000, 768)
    found = {method: error(x, *fit(x, 3, method=method)).sum() / np.square(x).sum() for method in METHODS}
    assert found["greedy"] == pytest.approx(0.059, abs=0.001)
    assert found["refined"] == pytest.approx(0.051, abs=0.001)
    assert found["alternating"] == pytest.approx(0.037, abs=0.001)
    # 8 levels between the smallest and the largest of each row
    codes = quantize_tensor(torch.from_numpy(x), Recipe("lq", 3, "row", {"affine": True}))
    uniform = np.square(codes.decode().numpy() - x).sum() / np.square(x).sum()
    assert uniform == pytest.approx(0.069, abs=0.001)


# brute force -----------------------------------------------------------------------------------------


def best_error(w: Array, bits: int, m: Array) -> float:
    """The least error over all 2^(bits n) codes, scales by least squares."""
    every = planes_of(np.arange(2**bits), bits)
    least = np.inf
    for codes in itertools.product(range(2**bits), repeat=len(w)):
        planes = every[list(codes)]
        scales = plain_least_squares(w, planes, m)
        least = min(least, float((m * (w - planes @ scales) ** 2).sum()))
    return least


@pytest.mark.parametrize(("bits", "size"), [(1, 8), (2, 5), (3, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_code_is_better_than_the_best_of_all_and_most_rows_reach_it(
    bits: int, size: int, weighted: bool
) -> None:
    x = normal(12, size, seed=bits).astype(np.float64)
    m = np.random.default_rng(2).integers(1, 6, x.shape).astype(np.float64) if weighted else np.ones(x.shape)
    best = np.array([best_error(row, bits, weights) for row, weights in zip(x, m, strict=True)])
    errors = {
        method: error(x, *fit(x, bits, m if weighted else None, method=method), m) for method in METHODS
    }
    for method in METHODS:
        assert (errors[method] >= best - 1e-6).all(), method
    assert (errors["alternating"] <= best + 1e-6).mean() >= (1 if bits == 1 else 0.25)
    assert errors["alternating"].sum() <= errors["greedy"].sum() + 1e-6


# alternating -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_round_raises_the_error_of_any_row(bits: int, weighted: bool) -> None:
    x = normal(30, 200, seed=bits)
    m = np.random.default_rng(5).exponential(size=x.shape) if weighted else None
    before = error(x, *fit(x, bits, m, method="greedy"), m)
    for rounds in range(0, 20):
        after = error(x, *fit(x, bits, m, method="alternating", rounds=rounds), m)
        assert (after <= before * (1 + 1e-6) + 1e-9).all(), rounds
        before = after


def test_fifteen_rounds_are_the_default() -> None:
    x = normal(5, 200)
    default, fifteen, one = (fit(x, 3, **rounds) for rounds in ({}, {"rounds": 15}, {"rounds": 1}))
    np.testing.assert_array_equal(default[0], fifteen[0])
    np.testing.assert_array_equal(default[1], fifteen[1])
    assert not np.array_equal(default[0], one[0])


@pytest.mark.parametrize("bits", [2, 4])
def test_in_the_end_scales_fit_the_codes_best(bits: int) -> None:
    x = normal(10, 100).astype(np.float64)
    scales, planes = fit(x, bits)
    for row in range(len(x)):
        known = plain_least_squares(x[row], planes[row], np.ones(100))
        np.testing.assert_allclose(scales[row], known, rtol=1e-5)


def test_the_codes_do_not_depend_on_importance_beyond_the_scales() -> None:
    # with the rounds at an end, every weight takes its nearest level, whatever it counts
    x = normal(10, 300)
    m = np.random.default_rng(7).exponential(size=x.shape)
    scales, planes = fit(x, 3, m, rounds=500)
    levels = scales @ planes_of(np.arange(8), 3).T
    near = np.abs(x[:, :, None] - levels[:, None]).min(-1)
    taken = np.abs(x - (planes * scales[:, None]).sum(-1))
    np.testing.assert_allclose(taken, near, atol=1e-5)


# importance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [1.0, 0.25, 3.0])
def test_constant_importance_is_none(method: str, value: float) -> None:
    x = normal(6, 90)
    weighted, unweighted = fit(x, 3, np.full(x.shape, value), method=method), fit(x, 3, method=method)
    np.testing.assert_allclose(weighted[0], unweighted[0], rtol=1e-6)
    np.testing.assert_array_equal(weighted[1], unweighted[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_whole_importances_are_repetitions(method: str, bits: int) -> None:
    x = normal(1, 60)
    m = np.random.default_rng(4).integers(1, 6, x.shape)
    weighted = fit(x, bits, m, method=method)
    repeated = fit(np.repeat(x[0], m[0])[None], bits, method=method)
    np.testing.assert_allclose(weighted[0], repeated[0], rtol=1e-5)
    np.testing.assert_array_equal(np.repeat(weighted[1][0], m[0], axis=0), repeated[1][0])


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_count_nothing_do_not_move_the_scales(method: str) -> None:
    x = normal(4, 80)
    m = np.ones(x.shape)
    m[:, 60:] = 0
    among, alone = fit(x, 2, m, method=method), fit(x[:, :60], 2, method=method)
    np.testing.assert_allclose(among[0], alone[0], rtol=1e-6)
    np.testing.assert_array_equal(among[1][:, :60], alone[1])


# what is stored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("groups", "count"), [("auto", 12), ("row", 12), ("columns:10", 36), ("columns:30", 12), ("matrix", 1)]
)
def test_scales_are_stored_and_not_expanded(bits: int, groups: str, count: int) -> None:
    weight = quantize_tensor(torch.from_numpy(normal(12, 30)), Recipe("binary", bits, groups))
    assert weight.spec.form.value == "binary"
    assert weight.levels.shape == (count, bits)
    assert weight.nbytes == -(-12 * 30 * bits // 8) + count * bits * 4
    assert weight.bits_per_weight == pytest.approx(bits + count * bits * 32 / 360, abs=0.1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_stored_code_and_its_stored_sign_planes_are_the_same_thing(bits: int) -> None:
    w = torch.from_numpy(normal(7, 33))
    weight = quantize_tensor(w, Recipe("binary", bits))
    # plane j as a stream of single bits, made of nothing but the packed codes ...
    stream = np.unpackbits(weight.codes.numpy(), bitorder="little")[: 7 * 33 * bits].reshape(-1, bits)
    packed = [pack(torch.from_numpy(np.ascontiguousarray(plane)), 1) for plane in stream.T]
    # ... is all that the weight is made of: sum_j alpha_j b_j
    signs = [2.0 * unpack(plane, 1, 7 * 33).view(7, 33) - 1 for plane in packed]
    total = sum(weight.levels[:, j, None] * sign for j, sign in enumerate(signs))
    torch.testing.assert_close(weight.decode(), total, rtol=1e-6, atol=1e-6)
    # and the planes give the packed codes back, bit for bit
    codes = sum((unpack(plane, 1, 7 * 33).int() << j) for j, plane in enumerate(packed))
    assert torch.equal(pack(codes.to(torch.uint8), bits), weight.codes)


@pytest.mark.parametrize("groups", ["row", "columns:7", "matrix"])
def test_smaller_groups_fit_better(groups: str) -> None:
    w = torch.from_numpy(normal(16, 70) * np.linspace(0.1, 3, 16)[:, None].astype(np.float32))

    def squared(groups: str) -> float:
        weight = quantize_tensor(w, Recipe("binary", 3, groups))
        return float((weight.decode() - w).square().sum())

    order = ["matrix", "row", "columns:7"]
    finer = order[order.index(groups) :]
    assert all(squared(other) <= squared(groups) * (1 + 1e-6) for other in finer)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_groups_of_few_distinct_weights_are_fitted(method: str, bits: int) -> None:
    for row in ([2.0], [2.0, 2.0], [-1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0]):
        w = np.array([row])
        scales, planes = fit(w, bits, method=method)
        assert np.isfinite(scales).all()
        decoded = (planes * scales[:, None]).sum(-1)
        if len(set(np.abs(row))) == 1:
            np.testing.assert_allclose(decoded, w, atol=1e-6)
        else:
            assert error(w, scales, planes)[0] <= np.square(w).sum()


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8))
def test_the_same_weight_gives_the_same_bytes_whatever_the_threads(
    rows: int, columns: int, bits: int
) -> None:
    w = torch.from_numpy(normal(rows, columns, seed=bits))

    def made() -> CodebookWeight:
        return quantize_tensor(w, Recipe("binary", bits))

    first = made()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            again = made()
            assert torch.equal(first.codes, again.codes)
            assert torch.equal(first.levels, again.levels)
    finally:
        torch.set_num_threads(before)


# options ---------------------------------------------------------------------------------------------


def test_wrong_options_are_refused() -> None:
    with pytest.raises(
        LexibitError, match="unknown method of scheme 'binary' 'greed': did you mean 'greedy'"
    ):
        schemes.scheme("binary", {"method": "greed"})
    with pytest.raises(LexibitError, match="rounds go with method=alternating, not with 'greedy'"):
        schemes.scheme("binary", {"method": "greedy", "rounds": 3})
    for rounds in (-1, 1.5, True, "3"):
        with pytest.raises(LexibitError, match="binary rounds must be a whole number, 0 or more"):
            schemes.scheme("binary", {"rounds": rounds})
