"""The k-means scheme against every partition there is, scikit-learn, and itself."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as Sklearn

from lexibit import CodebookWeight, LexibitError, Recipe, quantize_tensor
from lexibit.schemes.kmeans import KMeans

INITS = ["auto", "optimal", "companding", "k-means++"]


def quantized(
    w: torch.Tensor, bits: int, seed: int = 0, groups: str = "matrix", **options: object
) -> CodebookWeight:
    return quantize_tensor(w, Recipe(bits=bits, groups=groups, options=options), seed=seed)


def error(w: torch.Tensor, weight: CodebookWeight, importance: torch.Tensor | None = None) -> float:
    squares = (w.double() - weight.decode().double()).square()
    return float((squares if importance is None else squares * importance.double()).sum())


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [1, 2])
def test_optimal_is_the_best_of_all_partitions(bits: int, seed: int) -> None:
    w = matrix(3, 3, seed)
    x = np.sort(w.flatten().double().numpy())
    best = min(
        sum(((part - part.mean()) ** 2).sum() for part in np.split(x, cuts))
        for cuts in combinations(range(1, 9), 2**bits - 1)
    )
    assert error(w, quantized(w, bits, init="optimal")) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_optimal_is_never_worse_than_scikit_learn_with_many_starts(bits: int) -> None:
    w = matrix(12, 20, bits)
    theirs = Sklearn(2**bits, n_init=12, random_state=0).fit(w.reshape(-1, 1).double().numpy()).inertia_
    ours = error(w, quantized(w, bits, init="optimal"))
    assert ours <= theirs * (1 + 1e-6)
    assert ours >= 0.9 * theirs


@pytest.mark.parametrize("init", ["companding", "k-means++"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_optimal_is_never_worse_than_another_start(bits: int, init: str) -> None:
    for seed in range(3):
        w = matrix(15, 40, seed)
        assert error(w, quantized(w, bits, init="optimal")) <= (
            error(w, quantized(w, bits, seed, init=init)) * (1 + 1e-6)
        )


def test_more_bits_never_raise_the_optimal_error() -> None:
    w = matrix(15, 40)
    errors = [error(w, quantized(w, bits, init="optimal")) for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1] > 0


def test_finer_groups_never_raise_the_optimal_error() -> None:
    w = matrix(16, 40)
    spellings = ["matrix", "rows:4", "rows:2", "row", "columns:20", "columns:10"]
    errors = [error(w, quantized(w, 3, groups=groups, init="optimal")) for groups in spellings]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("bits", [1, 3, 6])
def test_every_weight_takes_its_nearest_level(init: str, bits: int) -> None:
    w = matrix(15, 40)
    weight = quantized(w, bits, init=init)
    distances = (w.double()[..., None] - weight.levels[0].double()).abs()
    chosen = (w.double() - weight.decode().double()).abs()
    assert (chosen <= distances.amin(-1) + 1e-6).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_optimal_levels_are_the_means_of_their_members(bits: int) -> None:
    w = matrix(15, 40)
    weight = quantized(w, bits, init="optimal")
    codes = weight.unpacked_codes()
    for code, level in enumerate(weight.levels[0]):
        assert level.item() == pytest.approx(w[codes == code].double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_fewer_distinct_values_than_levels_are_kept_exactly(init: str, bits: int) -> None:
    for distinct in {1, 2, 2**bits - 1, 2**bits}:
        values = torch.randn(distinct, generator=torch.Generator().manual_seed(distinct))
        # each value at least once, in no order
        picked = torch.cat([torch.arange(distinct), torch.arange(300 - distinct) % distinct])
        w = values[picked[torch.randperm(300, generator=torch.Generator().manual_seed(1))]].view(15, 20)
        assert len(w.unique()) == distinct
        assert torch.equal(quantized(w, bits, init=init).decode(), w)


def test_the_same_seed_gives_the_same_levels_and_another_seed_others() -> None:
    w = matrix(15, 40)
    first, again, other = (quantized(w, 4, seed, init="k-means++") for seed in (5, 5, 6))
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.levels, again.levels)
    assert not torch.equal(first.levels, other.levels)


@pytest.mark.parametrize("init", ["auto", "optimal", "companding"])
@pytest.mark.parametrize("bits", [3, 6])
def test_the_other_starts_need_no_seed(init: str, bits: int) -> None:
    w = matrix(15, 40)
    assert torch.equal(quantized(w, bits, 1, init=init).levels, quantized(w, bits, 2, init=init).levels)


def test_iterations_lower_the_error_until_nothing_moves() -> None:
    w = matrix(25, 40)
    errors = [error(w, quantized(w, 3, init="k-means++", iterations=n)) for n in (0, 1, 2, 3, 10, 1000)]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[0] > errors[3] > errors[5]
    assert error(w, quantized(w, 3, init="k-means++")) == errors[3]  # the paper's default


def test_auto_is_optimal_for_few_bits() -> None:
    w = matrix(15, 40)
    for bits in (1, 2, 3, 4):
        auto, optimal = quantized(w, bits), quantized(w, bits, init="optimal")
        assert torch.equal(auto.levels, optimal.levels)
        assert torch.equal(auto.codes, optimal.codes)


def test_auto_comes_near_the_optimum_for_many_bits() -> None:
    w = matrix(40, 100)
    for bits in (5, 6):
        assert error(w, quantized(w, bits)) <= 1.15 * error(w, quantized(w, bits, init="optimal"))


@pytest.mark.parametrize("init", ["optimal", "k-means++", "companding"])
def test_importances_lower_the_weighted_error(init: str) -> None:
    recipe = Recipe(bits=2, options={"init": init})
    weighted = plain = 0.0
    for seed in range(8):
        w = matrix(15, 40, seed)
        importance = matrix(15, 40, seed + 100).abs() ** 3 + 1e-3
        with_importance = error(w, quantize_tensor(w, recipe, importance=importance), importance)
        without = error(w, quantize_tensor(w, recipe), importance)
        if init == "optimal":  # only the optimum promises it for each
            assert with_importance < without
        weighted, plain = weighted + with_importance, plain + without
    assert weighted < plain


def test_optimal_with_importances_equals_repeating_the_weights() -> None:
    w = matrix(6, 10)
    counts = torch.randint(1, 5, (6, 10), generator=torch.Generator().manual_seed(0))
    repeated = w.flatten().repeat_interleave(counts.flatten())[None]
    recipe = Recipe(bits=3, options={"init": "optimal"})
    weighted = quantize_tensor(w, recipe, importance=counts.float())
    torch.testing.assert_close(weighted.levels, quantize_tensor(repeated, recipe).levels)


@pytest.mark.parametrize("bad", [-1, 2.5, True, "3"])
def test_iterations_must_be_a_whole_number_not_below_zero(bad: object) -> None:
    with pytest.raises(LexibitError, match="iterations must"):
        KMeans(init="k-means++", iterations=bad)


@pytest.mark.parametrize("init", ["auto", "optimal"])
def test_iterations_are_refused_where_nothing_iterates(init: str) -> None:
    with pytest.raises(LexibitError, match="iterations do not apply"):
        KMeans(init=init, iterations=3)


def test_an_unknown_start_is_refused_with_the_right_one() -> None:
    with pytest.raises(LexibitError, match=r"did you mean 'k-means\+\+'"):
        KMeans(init="kmeans++")
