"""ACIQ against its error model: minimised numerically, drawn from, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.special import erf
from scipy.stats import laplace, norm

from lexibit import LexibitError, Recipe, quantize_tensor, schemes
from lexibit.schemes.aciq import gauss_threshold, laplace_threshold

# alpha / b and alpha / sigma at 2 to 8 bits, from an independent solution
LAPLACE = [2.8307, 3.8972, 5.0286, 6.2048, 7.4131, 8.6456, 9.8968]
GAUSS = [1.7106, 2.1516, 2.5591, 2.9362, 3.2869, 3.6151, 3.9240]


def laplace_error(a: float, bits: int) -> float:
    return 2 * math.exp(-a) + a * a / (3 * 4**bits)


def gauss_error(a: float, bits: int) -> float:
    tails = (1 + a * a) * (1 - erf(a / math.sqrt(2))) - math.sqrt(2 / math.pi) * a * math.exp(-a * a / 2)
    return tails + a * a / (3 * 4**bits)


@pytest.mark.parametrize("bits", range(2, 9))
def test_thresholds_are_the_known_ones(bits: int) -> None:
    assert laplace_threshold(bits) == pytest.approx(LAPLACE[bits - 2], abs=5e-5)
    assert gauss_threshold(bits) == pytest.approx(GAUSS[bits - 2], abs=5e-5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("threshold", "error"), [(laplace_threshold, laplace_error), (gauss_threshold, gauss_error)]
)
def test_thresholds_minimise_the_papers_error(threshold, error, bits: int) -> None:
    found = minimize_scalar(
        lambda a: error(a, bits), bounds=(0, 30), method="bounded", options={"xatol": 1e-9}
    )
    assert threshold(bits) == pytest.approx(found.x, rel=1e-4)
    # Lambert's W: x exp(x) = 3 4^M at x = alpha / b
    if threshold is laplace_threshold:
        assert threshold(bits) * math.exp(threshold(bits)) == pytest.approx(3 * 4**bits)


@pytest.mark.parametrize(("error", "prior"), [(laplace_error, laplace), (gauss_error, norm)])
@pytest.mark.parametrize("a", [1.5, 3.0])
def test_the_papers_error_is_what_clipping_and_rounding_cost(error, prior, a: float) -> None:
    clipping = 2 * quad(lambda w: (w - a) ** 2 * prior.pdf(w), a, 60)[0]
    assert error(a, 4) == pytest.approx(clipping + (2 * a / 2**4) ** 2 / 12, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("prior", ["gauss", "laplace"])
def test_the_grid_ends_at_the_threshold(prior: str, bits: int) -> None:
    w = (
        torch.from_numpy(np.random.default_rng(0).standard_normal((1, 100_000)).astype(np.float32)) * 0.7
        + 0.02
    )
    weight = quantize_tensor(w, Recipe("aciq", bits, options={"prior": prior}))
    width = w.std(correction=0) * gauss_threshold(bits)
    if prior == "laplace":
        width = (w - w.mean()).abs().mean() * laplace_threshold(bits)
    n = 2 ** (bits - 1) - 1
    torch.testing.assert_close(weight.levels[0, 0], width.minimum(w.abs().max()) / n, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("draw", "better"), [("standard_normal", "gauss"), ("laplace", "laplace")])
def test_the_better_prior_is_kept_for_each_group(draw: str, better: str) -> None:
    rng = np.random.default_rng(1)
    w = torch.from_numpy(getattr(rng, draw)(size=(6, 20_000)).astype(np.float32))

    def error(prior: str) -> torch.Tensor:
        weight = quantize_tensor(w, Recipe("aciq", 4, "row", {"prior": prior}))
        return (weight.decode() - w).double().square().sum(1)

    best = error("best")
    torch.testing.assert_close(best, torch.minimum(error("gauss"), error("laplace")), rtol=1e-5, atol=0)
    torch.testing.assert_close(best, error(better), rtol=1e-5, atol=0)


def test_it_clips_and_so_beats_the_grid_that_does_not() -> None:
    w = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        aciq, lq = (quantize_tensor(w, Recipe(name, bits)).decode() for name in ("aciq", "lq"))
        assert aciq.abs().max() < w.abs().max()
        assert (aciq - w).square().sum() < 0.5 * (lq - w).square().sum()


def test_it_never_reaches_beyond_the_outermost_weights() -> None:
    w = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]])
    for bits in (4, 8):
        weight = quantize_tensor(w, Recipe("aciq", bits))
        assert weight.levels[0, 0] == pytest.approx(1 / (2 ** (bits - 1) - 1))
    affine = quantize_tensor(w + 7, Recipe("aciq", 8, options={"affine": True})).table()[0]
    assert (affine.min().item(), affine.max().item()) == pytest.approx((6, 8), rel=1e-5)


def test_an_affine_grid_is_clipped_about_the_mean() -> None:
    w = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0)) + 3
    table = quantize_tensor(w, Recipe("aciq", 3, options={"affine": True, "prior": "gauss"})).table()[0]
    reach = w.std(correction=0) * gauss_threshold(3)
    torch.testing.assert_close(
        table[[0, -1]], torch.stack([w.mean() - reach, w.mean() + reach]), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("value", [0.0, -0.3, 5.0])
def test_equal_weights_have_no_width_and_are_kept(value: float) -> None:
    w = torch.full((2, 6), value)
    for options in ({}, {"prior": "gauss"}, {"affine": True}):
        torch.testing.assert_close(quantize_tensor(w, Recipe("aciq", 3, options=options)).decode(), w)


def test_an_unknown_prior_is_refused() -> None:
    with pytest.raises(LexibitError, match="unknown prior of scheme 'aciq' 'gaus': did you mean 'gauss'"):
        schemes.scheme("aciq", {"prior": "gaus"})


def test_importances_are_refused() -> None:
    with pytest.raises(LexibitError, match="'aciq' does not use importances"):
        quantize_tensor(torch.randn(3, 4), Recipe("aciq"), importance=torch.ones(3, 4))
