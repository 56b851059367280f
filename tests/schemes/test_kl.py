"""The clip of least divergence against histograms that are built bin by bin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from lexibit import Recipe, quantize_tensor
from lexibit.schemes.kl import _BINS, _SHARES


def divergence(counts: np.ndarray, edges: np.ndarray) -> float:
    """KL(P || Q), from the description: outliers to the outermost bins of P, Q even over filled bins."""
    p = counts.copy()
    first, last = edges[0], edges[-1]
    inside = np.arange(len(p))[(np.arange(len(p)) >= first) & (np.arange(len(p)) < last) & (counts > 0)]
    if len(inside) == 0:
        return np.inf
    q = np.zeros(len(p))
    for start, stop in itertools.pairwise(edges):
        cell = counts[start:stop]
        if cell.sum():
            q[start:stop][cell > 0] = cell.sum() / (cell > 0).sum()
    p[inside[0]] += counts[:first].sum()
    p[inside[-1]] += counts[last:].sum()
    # a side of which the outermost level holds nothing cannot stand for what is beyond
    if counts[:first].sum() and not counts[edges[0] : edges[1]].sum():
        return np.inf
    if counts[last:].sum() and not counts[edges[-2] : edges[-1]].sum():
        return np.inf
    return float(entropy(p[inside], q[inside]))


def best_share(w: np.ndarray, bits: int, affine: bool) -> float:
    low, high = (w.min(), w.max()) if affine else (-np.abs(w).max(), np.abs(w).max())
    counts = np.bincount(
        np.clip(((w.astype(np.float64) - low) * (_BINS / (high - low))).astype(int), 0, _BINS - 1),
        minlength=_BINS,
    ).astype(float)
    found = []
    for share in _SHARES:
        levels = np.arange(2**bits)
        if affine:
            middles = np.linspace(-share, share, 2**bits)
        else:
            middles = (levels - 2 ** (bits - 1)) * share / (2 ** (bits - 1) - 1)
        step = middles[1] - middles[0]
        ends = np.append(middles - step / 2, middles[-1] + step / 2)
        edges = np.clip(np.rint((1 + ends) * _BINS / 2), 0, _BINS).astype(int)
        found.append(divergence(counts, edges))
    return float(_SHARES[np.flatnonzero(np.array(found) <= min(found) + 1e-9)[-1]])


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("draw", ["standard_normal", "laplace", "exponential", "random"])
def test_the_threshold_is_that_of_the_plain_algorithm(draw: str, bits: int, affine: bool) -> None:
    w = getattr(np.random.default_rng(bits), draw)(size=3000).astype(np.float32)
    weight = quantize_tensor(torch.from_numpy(w)[None], Recipe("kl", bits, options={"affine": affine}))
    share = best_share(w, bits, affine)
    table = weight.table()[0].double().numpy()
    reach = (table[-1] - table[0]) / (w.max() - w.min()) if affine else table[-1] / np.abs(w).max()
    assert reach == pytest.approx(share, rel=1e-4)


def test_every_group_has_its_own_threshold() -> None:
    w = (
        torch.randn(5, 2000, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 2, 3, 4, 5.0])[:, None]
    )
    together = quantize_tensor(w, Recipe("kl", 4, "row")).levels[:, 0]
    alone = torch.stack([quantize_tensor(row[None], Recipe("kl", 4)).levels[0, 0] for row in w])
    torch.testing.assert_close(together, alone)
    assert len((together / w.abs().amax(1)).unique()) > 1


def test_it_clips_a_far_outlier() -> None:
    w = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))
    w[0, 7] = 30.0
    assert quantize_tensor(w, Recipe("kl", 4)).decode().abs().max() < 15


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 0.4, -3.0])
def test_equal_weights_are_kept(value: float, bits: int) -> None:
    w = torch.full((2, 7), value)
    for affine in (False, True):
        torch.testing.assert_close(
            quantize_tensor(w, Recipe("kl", bits, options={"affine": affine})).decode(), w
        )
