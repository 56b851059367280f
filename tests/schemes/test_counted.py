"""Values that came from 16 bits, counted instead of sorted."""

import numpy as np
import pytest
import torch

from lexibit.schemes import kmeans1d
from lexibit.schemes.line import counted as module
from lexibit.schemes.line.counted import counted


def values(dtype, count=300_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * 0.05).to(dtype).float().numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_distinct_values_and_their_counts(dtype):
    x = values(dtype)
    found, counts = counted(x)
    expected, times = np.unique(x, return_counts=True)
    # zero has two signs
    assert np.array_equal(np.unique(found), expected)
    assert (np.diff(found) >= 0).all()
    assert counts.sum() == len(x)
    assert np.array_equal([counts[found == value].sum() for value in expected[:50]], times[:50])


def test_other_values_are_not_counted():
    assert counted(values(torch.float32)) is None
    one = values(torch.bfloat16)
    one[-1] = 0.1
    assert counted(one) is None


def test_values_beyond_float16_are_counted_as_bfloat16():
    found, counts = counted(np.float32([2.0**100, -(2.0**100), 2.0**100]))
    assert np.array_equal(counts, [1, 2])
    assert found[0] == -found[1] == np.float32(-(2.0**100))


def test_more_of_a_value_than_float32_counts(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 10)
    found, counts = counted(np.float32([2.0] * 25 + [1.0] * 3))
    assert np.array_equal(found, [1, 2, 2, 2])
    assert counts.sum() == pytest.approx(28)
    assert counts.max() <= 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, 16, 256])
def test_k_means_of_counts_is_that_of_the_values(monkeypatch, dtype, k):
    x = values(dtype)[None]
    by_counts = kmeans1d.optimal(x, k) if k < 100 else kmeans1d.companding(x, k, 50)
    monkeypatch.setattr(kmeans1d, "_MANY", 1 << 60)
    by_values = kmeans1d.optimal(x, k) if k < 100 else kmeans1d.companding(x, k, 50)

    def error(levels):
        nearest = np.abs(x[0][:, None].astype(np.float64) - levels[0][None, :]).min(axis=1)
        return (nearest**2).sum()

    if k < 100:
        np.testing.assert_allclose(by_counts, by_values, rtol=1e-6, atol=1e-9)
    assert error(by_counts) <= error(by_values) * 1.01
