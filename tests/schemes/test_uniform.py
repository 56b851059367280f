"""Uniform grids: symmetric and affine, and the bias correction, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lexibit import LexibitError, Recipe, quantize_tensor, schemes
from lexibit.levels import LevelForm
from lexibit.schemes.uniform import Grid, moments

UNIFORM = ("lq", "aciq", "mse", "kl")
GROUPS = ("matrix", "row", "rows:3", "columns:5")


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def both(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


# the grid --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_symmetric_grid_is_the_papers(bits: int) -> None:
    n = 2 ** (bits - 1) - 1
    grid = Grid.symmetric(both([3.0]), bits)
    levels = LevelForm.SYMMETRIC.expand(grid.levels(LevelForm.SYMMETRIC), bits)[0]
    torch.testing.assert_close(levels, torch.arange(-n - 1, n + 1) * 3.0 / n)
    w = normal(1, 500) * 2
    q = torch.clamp(torch.round(w.double() * n / 3.0), -n - 1, n)
    assert torch.equal(grid.codes(w).long() - n - 1, q.long())


@pytest.mark.parametrize("bits", range(1, 9))
def test_an_affine_grid_has_all_levels_from_low_to_high(bits: int) -> None:
    grid = Grid.affine(both([-1.0, 2.0]), both([3.0, 2.5]), bits)
    levels = LevelForm.AFFINE.expand(grid.levels(LevelForm.AFFINE), bits)
    expected = np.stack([np.linspace(-1, 3, 2**bits), np.linspace(2, 2.5, 2**bits)])
    np.testing.assert_allclose(levels, expected, rtol=1e-5, atol=1e-5)
    w = normal(2, 300) * 2 + 1
    nearest = np.abs(w.numpy()[:, :, None] - expected[:, None]).argmin(2)
    assert (grid.codes(w).numpy() == nearest).mean() > 0.999


@pytest.mark.parametrize("form", [LevelForm.SYMMETRIC, LevelForm.AFFINE])
def test_a_grid_comes_back_from_what_is_stored(form: LevelForm) -> None:
    low, high = both([-2.0, 0.5]), both([2.0, 4.0])
    grid = Grid.symmetric(high, 4) if form is LevelForm.SYMMETRIC else Grid.affine(low, high, 4)
    again = Grid.of(grid.levels(form), form, 4)
    torch.testing.assert_close(again.levels(form), grid.levels(form))
    w = normal(2, 100)
    assert torch.equal(again.codes(w), grid.codes(w))


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(1, 8))
def test_a_group_of_equal_weights_keeps_them(value: float, bits: int) -> None:
    w = torch.full((1, 4), value)
    grid = Grid.affine(w[:, :1].double(), w[:, :1].double(), bits)
    levels = LevelForm.AFFINE.expand(grid.levels(LevelForm.AFFINE), bits)
    assert torch.equal(levels.gather(1, grid.codes(w).long()), w)


def test_the_squared_error_of_a_grid_is_that_of_what_it_decodes_to() -> None:
    w = normal(3, 400)
    grid = Grid.affine(both([-1.0] * 3), both([1.0, 2.0, 3.0]), 3)
    decoded = LevelForm.AFFINE.expand(grid.levels(LevelForm.AFFINE), 3).gather(1, grid.codes(w).long())
    torch.testing.assert_close(grid.error(w)[:, 0], (decoded - w).double().square().sum(1), rtol=1e-5, atol=0)


def test_moments_are_numpys_and_do_not_depend_on_threads() -> None:
    w = normal(3, 200_000) + 5
    mean, deviation = moments(w)
    np.testing.assert_allclose(mean[:, 0], w.double().mean(1), rtol=1e-12)
    np.testing.assert_allclose(deviation[:, 0], w.double().std(1, correction=0), rtol=1e-10)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(moments(w)[1], deviation)
    finally:
        torch.set_num_threads(before)


# options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNIFORM)
def test_options_that_are_not_true_or_false_are_refused(name: str) -> None:
    for option in ("affine", "bias_correction"):
        with pytest.raises(LexibitError, match=f"{name} {option} must be true or false, not 'yes'"):
            schemes.scheme(name, {option: "yes"})


@pytest.mark.parametrize("name", UNIFORM)
def test_one_bit_needs_an_affine_grid(name: str) -> None:
    with pytest.raises(LexibitError, match=f"'{name}' works with 2 to 8 bits, not 1.*affine=true"):
        Recipe(name, 1)
    w = normal(6, 40)
    weight = quantize_tensor(w, Recipe(name, 1, "row", {"affine": True}))
    assert weight.spec.bits == 1
    assert all(len(row.unique()) <= 2 for row in weight.decode())


@pytest.mark.parametrize("name", UNIFORM)
def test_a_scale_is_stored_and_an_offset_where_it_is_needed(name: str) -> None:
    w = normal(6, 40)
    for options, form, width in (
        ({}, "symmetric", 1),
        ({"affine": True}, "affine", 2),
        ({"bias_correction": True}, "affine", 2),
        ({"affine": True, "bias_correction": True}, "affine", 2),
    ):
        weight = quantize_tensor(w, Recipe(name, 3, "row", options))
        assert (weight.spec.form.value, weight.levels.shape) == (form, (6, width))


@pytest.mark.parametrize("name", UNIFORM)
def test_affine_grids_follow_weights_that_are_not_about_zero(name: str) -> None:
    w = normal(8, 300) + 4
    affine = quantize_tensor(w, Recipe(name, 3, "row", {"affine": True})).decode()
    assert ((affine - w).square().mean(1) < 0.2).all()


# bias correction -------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", UNIFORM)
def test_bias_correction_restores_mean_and_deviation_of_every_group(
    name: str, groups: str, affine: bool
) -> None:
    w = normal(9, 60) * torch.linspace(0.2, 3, 9)[:, None] + 0.1
    options = {"affine": affine, "bias_correction": True}
    weight = quantize_tensor(w, Recipe(name, 3, groups, options))
    plain = quantize_tensor(w, Recipe(name, 3, groups, {"affine": affine}))
    assert torch.equal(weight.codes, plain.codes)
    assert not torch.equal(weight.decode(), plain.decode())
    for (_, original), (_, decoded) in zip(
        weight.spec.groups.split(w), weight.spec.groups.split(weight.decode()), strict=True
    ):
        torch.testing.assert_close(decoded.mean(1), original.mean(1), rtol=1e-4, atol=1e-5)
        # weights that all took one level can only be moved together
        vary = decoded.std(1) > 1e-6
        assert vary.float().mean() > 0.9
        torch.testing.assert_close(decoded.std(1)[vary], original.std(1)[vary], rtol=1e-4, atol=1e-5)


def test_bias_correction_is_the_papers_formula() -> None:
    # Banner et al.: xi (w^ + mu), with mu the lost mean and xi the lost norm about the mean; here about it
    w = normal(1, 200) + 0.3
    plain = quantize_tensor(w, Recipe("lq", 2)).decode()
    xi = (w - w.mean()).norm() / (plain - plain.mean()).norm()
    expected = xi * (plain - plain.mean()) + w.mean()
    found = quantize_tensor(w, Recipe("lq", 2, options={"bias_correction": True})).decode()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bias_correction_moves_a_group_that_has_one_level() -> None:
    w = torch.full((2, 5), 0.7)
    w[1] = torch.tensor([0.1, 0.11, 0.09, 0.1, 0.1])
    for name in UNIFORM:
        weight = quantize_tensor(w, Recipe(name, 2, "matrix", {"bias_correction": True}))
        assert weight.decode().isfinite().all()
        assert weight.decode().mean().item() == pytest.approx(w.mean().item(), rel=1e-4)
    alone = quantize_tensor(torch.full((1, 5), 0.7), Recipe("lq", 2, options={"bias_correction": True}))
    torch.testing.assert_close(alone.decode(), torch.full((1, 5), 0.7))
