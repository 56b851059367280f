"""LQ against its formula: n = 2^(k-1) - 1, s = n / max|w|, q = clamp(round(s w), -2^(k-1), n), q / s."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexibit import LexibitError, Recipe, quantize_tensor, schemes

LQ = schemes.scheme("lq")
WIDTHS = range(2, 9)


def paper(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers s w before rounding, and the step, in float64."""
    n = 2 ** (bits - 1) - 1
    step = np.abs(w.astype(np.float64)).max() / n
    return (w.astype(np.float64) / step if step else 0.0 * w.astype(np.float64)), step


def decoded(w: np.ndarray, bits: int) -> np.ndarray:
    weight = quantize_tensor(torch.from_numpy(w)[None], Recipe(scheme="lq", bits=bits))
    assert weight.spec.form.value == "symmetric"
    return weight.decode()[0].numpy()


@given(
    hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**20), 2.0**20, width=32)),
    st.integers(2, 8),
)
def test_every_weight_becomes_the_nearest_multiple_of_the_step(w: np.ndarray, bits: int) -> None:
    w = np.where(np.abs(w) < 1e-30, 0, w).astype(np.float32)
    steps, step = paper(w, bits)
    new = decoded(w, bits)
    ours = new.astype(np.float64) / step if step else new
    np.testing.assert_allclose(ours, np.round(ours), atol=1e-4)
    n = 2 ** (bits - 1) - 1
    assert np.abs(ours).max() <= n * (1 + 1e-6)
    # away from halves there is one nearest multiple; at a half both are
    apart = np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 1e-4
    np.testing.assert_array_equal(
        np.round(ours)[apart], np.clip(np.round(steps), -(2 ** (bits - 1)), n)[apart]
    )
    assert (np.abs(ours - steps) <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_whole_numbers_up_to_the_largest_are_kept_exactly(bits: int) -> None:
    n = 2 ** (bits - 1) - 1
    w = np.arange(-n, n + 1, dtype=np.float32)
    np.testing.assert_array_equal(decoded(w, bits), w)


def test_halves_round_to_even() -> None:
    w = np.array([7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], dtype=np.float32)
    assert decoded(w, 4).tolist() == [7, 0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("bits", WIDTHS)
def test_all_levels_but_the_lowest_are_used(bits: int) -> None:
    w = torch.linspace(-1, 1, 4001)[None]
    weight = quantize_tensor(w, Recipe(scheme="lq", bits=bits))
    assert weight.unpacked_codes().unique().tolist() == list(range(1, 2**bits))
    levels = weight.decode().unique()
    assert len(levels) == 2**bits - 1
    torch.testing.assert_close(levels, -levels.flip(0))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_largest_weight_is_kept(sign: int, bits: int) -> None:
    w = np.array([0.1, -0.2, sign * 0.7], dtype=np.float32)
    assert decoded(w, bits)[2] == pytest.approx(sign * 0.7, rel=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_zeros_stay_zeros_beside_groups_that_are_not(bits: int) -> None:
    w = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
    new = quantize_tensor(w, Recipe(scheme="lq", bits=bits, groups="row")).decode()
    assert torch.equal(new, w)


def test_every_group_has_its_own_step() -> None:
    w = torch.tensor([[1.0, -1.0, 0.0], [1000.0, -1000.0, 0.0], [1e-6, -1e-6, 0.0]])
    weight = quantize_tensor(w, Recipe(scheme="lq", bits=3, groups="row"))
    torch.testing.assert_close(weight.levels[:, 0], w[:, 0] / 3)
    torch.testing.assert_close(weight.decode(), w)


def test_it_stores_a_scale_a_group_and_an_offset_if_it_is_affine() -> None:
    w = torch.randn(6, 16)
    weight = quantize_tensor(w, Recipe(scheme="lq", bits=4, groups="row"))
    assert weight.levels.shape == (6, 1)
    assert weight.nbytes == 6 * 8 + 6 * 4
    affine = quantize_tensor(w, Recipe("lq", 4, "row", {"affine": True}))
    assert affine.levels.shape == (6, 2)
    assert affine.nbytes == 6 * 8 + 6 * 2 * 4


def test_one_bit_is_refused() -> None:
    with pytest.raises(LexibitError, match="'lq' works with 2 to 8 bits, not 1"):
        Recipe(scheme="lq", bits=1)
    with pytest.raises(LexibitError, match="2 to 8 bits"):
        LQ.check_bits(1)


def test_importances_are_refused() -> None:
    with pytest.raises(LexibitError, match="'lq' does not use importances"):
        quantize_tensor(torch.randn(3, 4), Recipe(scheme="lq"), importance=torch.ones(3, 4))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_number_of_a_dtype_does_not_become_infinite(bits: int, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    w = torch.tensor([[largest, -largest, 0.0, largest / 2]], dtype=dtype)
    new = quantize_tensor(w, Recipe(scheme="lq", bits=bits)).decode()
    assert new.isfinite().all()
    assert new[0, 0].item() == pytest.approx(largest, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_smallest_numbers_stay_finite_and_near(bits: int) -> None:
    w = np.array([1e-45, -1e-45, 0, 2e-45], dtype=np.float32)
    new = decoded(w, bits)
    assert np.isfinite(new).all()
    assert np.abs(new - w).max() <= np.float32(2e-45)
