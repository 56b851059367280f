"""Linear clusters against equations 2 to 4, written anew in NumPy for one group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexibit import Recipe, quantize_tensor, schemes

LINEAR = schemes.scheme("linear")


def paper(w: np.ndarray, bits: int, m: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Bins of one group, and each weight's new value: the (weighted) mean of its bin's members."""
    w = w.astype(np.float64)
    m = np.ones_like(w) if m is None else m.astype(np.float64)
    width = (w.max() - w.min()) / 2**bits
    bins = np.zeros(len(w), dtype=int)
    if width > 0:
        bins = np.minimum(np.floor((w - w.min()) / width).astype(int), 2**bits - 1)
    new = np.empty_like(w)
    for b in set(bins.tolist()):
        inside = bins == b
        new[inside] = np.average(w[inside], weights=m[inside])
    return bins, new


def fit(w: np.ndarray, bits: int, m: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, new values and levels of one group."""
    importance = None if m is None else torch.from_numpy(m)[None]
    levels, codes = LINEAR.fit(torch.from_numpy(w)[None], bits, importance, 0)
    assert levels.shape == (1, 2**bits)
    assert (levels.dtype, codes.dtype) == (torch.float32, torch.uint8)
    codes, levels = codes[0].numpy(), levels[0].numpy()
    return codes, levels[codes], levels


@given(
    hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2**20), 2**20, width=32)),
    st.integers(1, 8),
)
def test_every_weight_becomes_the_mean_of_its_bin(w: np.ndarray, bits: int) -> None:
    bins, expected = paper(w, bits)
    codes, new, _ = fit(w, bits)
    np.testing.assert_array_equal(codes, bins)
    scale = np.abs(w).max()
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-12 * scale)


@pytest.mark.parametrize("groups", ["matrix", "row", "rows:3", "blocks:4", "columns:5"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_group_has_its_own_bins(groups: str, bits: int) -> None:
    w = torch.randn(10, 13, generator=torch.Generator().manual_seed(bits))
    weight = quantize_tensor(w, Recipe(scheme="linear", bits=bits, groups=groups))
    decoded, codes = weight.decode(), weight.unpacked_codes()
    height, width = weight.spec.block
    for r in range(0, 10, height):
        for c in range(0, 13, width):
            block = slice(r, r + height), slice(c, c + width)
            bins, expected = paper(w[block].flatten().numpy(), bits)
            np.testing.assert_array_equal(codes[block].flatten().numpy(), bins)
            np.testing.assert_allclose(decoded[block].flatten().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_the_worked_example() -> None:
    # width 2: bins [0, 2), [2, 4), [4, 6), [6, 8], of which the third is empty
    w = np.array([0, 1, 2, 3.5, 6, 8], dtype=np.float32)
    codes, new, levels = fit(w, 2)
    assert codes.tolist() == [0, 0, 1, 1, 3, 3]
    assert new.tolist() == [0.5, 0.5, 2.75, 2.75, 7, 7]
    assert levels[2] == 5  # the middle of the empty bin


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_maximum_belongs_to_the_last_bin_and_a_border_to_the_upper(bits: int) -> None:
    w = np.arange(2**bits + 1, dtype=np.float32)
    codes, _, _ = fit(w, bits)
    assert codes.tolist() == [*range(2**bits), 2**bits - 1]


@pytest.mark.parametrize("value", [0.0, -3.25, 3e38, -3e38, 1e-45, 0.1])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_equal_weights_are_kept_exactly(value: float, bits: int) -> None:
    w = np.full(7, value, dtype=np.float32)
    codes, new, levels = fit(w, bits)
    assert codes.tolist() == [0] * 7
    np.testing.assert_array_equal(new, w)
    assert np.isfinite(levels).all()


@pytest.mark.parametrize("pair", [(-1.0, 1.0), (-3.4e38, 3.4e38), (1e-45, 3e-45), (-0.1, -0.3)])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_two_values_are_kept_exactly(pair: tuple[float, float], bits: int) -> None:
    w = np.array([pair[0], pair[1], pair[0], pair[1]], dtype=np.float32)
    codes, new, levels = fit(w, bits)
    assert set(codes.tolist()) == {0, 2**bits - 1}
    np.testing.assert_array_equal(new, w)
    assert np.isfinite(levels).all()


@pytest.mark.parametrize("scale", [1e38, 1e-38, 1e-44])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_huge_and_tiny_weights_follow_the_same_equations(scale: float, bits: int) -> None:
    w = (np.random.default_rng(bits).uniform(-3, 3, 200) * scale).astype(np.float32)
    bins, expected = paper(w, bits)
    codes, new, levels = fit(w, bits)
    np.testing.assert_array_equal(codes, bins)
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1.5e-45)
    assert np.isfinite(levels).all()


def test_negative_weights_alone_have_bins_from_their_own_minimum() -> None:
    w = np.array([-8, -7, -6, -4.5, -2, 0], dtype=np.float32) - 1
    codes, new, _ = fit(w, 2)
    assert codes.tolist() == [0, 0, 1, 1, 3, 3]
    assert new.tolist() == [-8.5, -8.5, -6.25, -6.25, -2, -2]


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 99))
def test_importances_weigh_the_means_and_leave_the_bins(size: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, m = rng.standard_normal(size).astype(np.float32), rng.exponential(size=size).astype(np.float32)
    bins, expected = paper(w, bits, m)
    codes, new, _ = fit(w, bits, m)
    np.testing.assert_array_equal(codes, bins)
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-7)


def test_weights_without_importance_do_not_move_the_mean() -> None:
    w = np.array([0, 1, 9, 10], dtype=np.float32)
    _, new, _ = fit(w, 1, np.array([1, 0, 1, 3], dtype=np.float32))
    assert new.tolist() == [0, 0, 9.75, 9.75]


def test_a_bin_without_importance_has_a_finite_level_inside_it() -> None:
    w = np.array([0, 1, 9, 10], dtype=np.float32)
    _, new, _ = fit(w, 1, np.zeros(4, dtype=np.float32))
    assert 0 <= new[0] <= 5 <= new[3] <= 10


def test_large_groups_are_binned_piece_by_piece_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(3, 1000, generator=torch.Generator().manual_seed(1))
    whole = LINEAR.fit(values, 4, weights, 0)
    monkeypatch.setattr("lexibit.schemes.linear._CHUNK", 64)
    pieces = LINEAR.fit(values, 4, weights, 0)
    assert torch.equal(whole[1], pieces[1])
    torch.testing.assert_close(whole[0], pieces[0], rtol=1e-6, atol=0)
