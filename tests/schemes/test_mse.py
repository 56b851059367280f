"""The clip of least squared error against trying thousands of grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lexibit import Recipe, quantize_tensor, schemes

SHAPES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "student": lambda rng, n: rng.standard_t(3, n),
    "uniform": lambda rng, n: rng.random(n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "outlier": lambda rng, n: np.append(rng.standard_normal(n - 1), 50.0),
}


def draw(kind: str, rows: int = 4, size: int = 400) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([SHAPES[kind](rng, size) for _ in range(rows)]).astype(np.float32))


def errors(w: torch.Tensor, bits: int, m: torch.Tensor | None = None, **options: object) -> torch.Tensor:
    weight = quantize_tensor(w, Recipe("mse", bits, "row", options), importance=m)
    squares = (weight.decode() - w).double().square()
    return (squares if m is None else squares * m).sum(1)


def tried(w: np.ndarray, bits: int, m: np.ndarray, affine: bool) -> float:
    """The least error of many grids, each by rounding every weight."""
    half = 2 ** (bits - 1)
    low_code, high_code = (0, 2 * half - 1) if affine else (-half, half - 1)
    widest = np.abs(w).max() * 2
    least = np.inf
    for step in np.linspace(widest / (2 * half) / 300, widest / max(half - 1, 1), 1500):
        offsets = np.linspace(w.min(), w.max() - step * high_code / 2, 30) if affine else [0.0]
        for offset in offsets:
            q = np.clip(np.round((w - offset) / step), low_code, high_code)
            least = min(least, float((m * (w - offset - step * q) ** 2).sum()))
    return least


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", SHAPES)
def test_no_symmetric_grid_that_was_tried_is_much_better(kind: str, bits: int, weighted: bool) -> None:
    w = draw(kind)
    m = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) if weighted else None
    found = errors(w, bits, m)
    for row in range(len(w)):
        weights = np.ones(w.shape[1]) if m is None else m[row].double().numpy()
        assert found[row] <= tried(w[row].double().numpy(), bits, weights, False) * 1.005


@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_no_affine_grid_that_was_tried_is_much_better(kind: str) -> None:
    w = draw(kind, rows=2, size=150)
    found = errors(w, 2, affine=True)
    for row in range(len(w)):
        assert found[row] <= tried(w[row].double().numpy(), 2, np.ones(150), True) * 1.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", SHAPES)
def test_it_is_better_than_every_other_clip(kind: str, bits: int) -> None:
    w = draw(kind)
    for affine in (False, True):
        best = errors(w, bits, affine=affine)
        for other in ("lq", "aciq", "kl"):
            decoded = quantize_tensor(w, Recipe(other, bits, "row", {"affine": affine})).decode()
            assert (best <= (decoded - w).double().square().sum(1) * 1.001).all(), other


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_grids_are_found_again(affine: bool, bits: int) -> None:
    codes = np.tile(np.arange(2**bits), 3)
    w = torch.from_numpy((0.37 * (codes - 2 ** (bits - 1)) + (1.1 if affine else 0)).astype(np.float32))[None]
    torch.testing.assert_close(
        quantize_tensor(w, Recipe("mse", bits, options={"affine": affine})).decode(), w, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("affine", [False, True])
def test_constant_importance_is_none_and_whole_ones_are_repetitions(affine: bool) -> None:
    w = draw("normal", rows=3)
    scheme = schemes.scheme("mse", {"affine": affine})
    plain, constant = scheme.fit(w, 3, None, 0), scheme.fit(w, 3, torch.full_like(w, 0.3), 0)
    torch.testing.assert_close(plain[0], constant[0], rtol=1e-5, atol=1e-6)
    m = torch.randint(1, 5, (1, 400), generator=torch.Generator().manual_seed(2))
    weighted = scheme.fit(w[:1], 3, m.float(), 0)
    repeated = scheme.fit(w[0].repeat_interleave(m[0])[None], 3, None, 0)
    torch.testing.assert_close(weighted[0], repeated[0], rtol=1e-4, atol=1e-6)


def test_what_counts_more_is_kept_better() -> None:
    w = draw("student", rows=1, size=4000)
    large = w.abs() > w.abs().quantile(0.99)
    m = torch.where(large, 1000.0, 1.0)
    plain, weighted = (
        quantize_tensor(w, Recipe("mse", 3), importance=importance).decode() for importance in (None, m)
    )
    assert ((weighted - w)[large] ** 2).sum() < 0.5 * ((plain - w)[large] ** 2).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_an_affine_grid_is_never_worse_than_a_symmetric_one(bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    peaked = torch.rand(60, 300, generator=generator) ** 4
    peaked *= torch.randn(60, 300, generator=generator).sign()
    sparse = torch.randn(60, 300, generator=generator) * (torch.rand(60, 300, generator=generator) < 0.1)
    for w in (peaked, sparse):
        symmetric, affine = errors(w, bits, affine=False), errors(w, bits, affine=True)
        assert (affine <= symmetric * (1 + 1e-5)).all()


@settings(max_examples=60)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.floats(-8, 8, width=16)
    ),
    st.integers(2, 6),
    st.booleans(),
)
def test_any_weights_are_taken_and_fitted_no_worse_than_by_the_widest_grid(
    x: np.ndarray, bits: int, affine: bool
) -> None:
    w = torch.from_numpy(x)
    found = errors(w, bits, affine=affine)
    widest = quantize_tensor(w, Recipe("lq", bits, "row", {"affine": affine})).decode()
    assert (found <= (widest - w).double().square().sum(1) + 1e-5 * w.double().square().sum(1)).all()
