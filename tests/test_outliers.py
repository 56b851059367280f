"""Outliers: that they are the weights whose errors count most, and that they are as good as they can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lexibit import LexibitConfig, LexibitError, Plan, Recipe, quantize, quantize_tensor
from lexibit.nn import codebooks
from lexibit.outliers import as_stored, largest
from lexibit.packing import MAX_GAP, pack_places, unpack_places

RECIPES: list[dict[str, Any]] = [
    {"scheme": "kmeans"},
    {"scheme": "linear"},
    {"scheme": "lq", "groups": "row"},
    {"scheme": "aciq", "groups": "row"},
    {"scheme": "mse", "groups": "columns:10"},
    {"scheme": "kl", "groups": "rows:4"},
    {"scheme": "ocs", "options": {"ratio": 0.1}},
    {"scheme": "binary"},
]


def spiky(rows: int = 20, columns: int = 50, seed: int = 0) -> torch.Tensor:
    """A matrix with ten weights that are far larger than the others."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=draw)
    places = torch.randperm(rows * columns, generator=draw)[:10]
    w.view(-1)[places] *= 30
    return w


def squares(error: torch.Tensor) -> float:
    return float(error.double().square().sum())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["scheme"])
def test_a_few_outliers_take_most_of_the_error(recipe: dict[str, Any], kind: str) -> None:
    w = spiky()
    without = quantize_tensor(w, Recipe(bits=3, **recipe), kind=kind)
    found = quantize_tensor(w, Recipe(bits=3, outliers=0.02, **recipe), kind=kind)
    assert found.outliers is not None
    assert found.spec.outliers == len(found.outliers) == 20
    assert found.nbytes == without.nbytes + 20 * 4
    assert squares(w - found.decode()) < 0.5 * squares(w - without.decode())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["scheme"])
def test_an_outlier_is_right_but_for_float16(recipe: dict[str, Any]) -> None:
    w = spiky()
    found = quantize_tensor(w, Recipe(bits=2, outliers=0.02, **recipe))
    assert found.gaps is not None
    places = unpack_places(found.gaps)
    off = (w - found.decode()).view(-1)
    assert (off[places].abs() <= 2**-10 * w.abs().max()).all()
    others = torch.ones(w.numel(), dtype=torch.bool)
    others[places] = False
    assert off[others].abs().max() > 0.1


def test_without_outliers_nothing_is_stored_for_them() -> None:
    assert quantize_tensor(spiky(), Recipe(bits=2)).outliers is None
    # of a small weight a per mille is none
    small = quantize_tensor(spiky(4, 5), Recipe(bits=2, outliers=0.001))
    assert small.spec.outliers == 0


def test_importance_chooses() -> None:
    w, importance = spiky(), torch.ones(20, 50)
    importance[:10] = 0
    found = quantize_tensor(w, Recipe(bits=2, outliers=0.01), importance=importance)
    assert found.gaps is not None
    assert (unpack_places(found.gaps) >= 500).all()


def test_a_weight_that_a_mask_makes_zero_is_none() -> None:
    w = spiky()
    found = quantize_tensor(w, Recipe(bits=2, outliers=0.02, importance="E=1,P=0.2,mask"))
    assert found.gaps is not None
    assert found.mask is not None
    zero = torch.zeros(w.numel(), dtype=torch.bool)
    zero[w.abs().flatten().argsort()[:200]] = True
    assert not zero[unpack_places(found.gaps)].any()
    assert (found.decode().view(-1)[zero] == 0).all()


def test_masks_hold_where_there_are_more_outliers_than_weights_that_count() -> None:
    w = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    importance = "E=1,P=0.95,mask"
    without = quantize_tensor(w, Recipe(importance=importance))
    found = quantize_tensor(w, Recipe(importance=importance, outliers=0.1))
    assert found.spec.outliers == 200
    zero = without.decode() == 0
    assert zero.sum() >= 1900
    assert (found.decode()[zero] == 0).all()
    assert squares(w - found.decode()) < squares(w - without.decode())


def test_a_sum_beyond_its_dtype_is_told() -> None:
    told = 0
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        w = (torch.rand(20, 25, generator=draw) - 0.5) * 120_000
        w[0, :3] = 65504
        try:
            found = quantize_tensor(w.half(), Recipe(bits=2, outliers=0.05), name="h")
        except LexibitError as error:
            told += "do not fit" in str(error)
            continue
        assert found.decode().isfinite().all()
    assert told


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["int8", "bfloat16"])
def test_rounded_products_in_half_precision(dtype: torch.dtype, compute: str) -> None:
    w, x = spiky(), torch.randn(3, 50)
    found = quantize_tensor(w.to(dtype), Recipe(bits=3, outliers=0.02))
    found.compute = compute
    given = found.linear(x.to(dtype))
    assert given.dtype == dtype
    expected = x @ found.decode().float().T
    assert (given.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    "w", [torch.zeros(40, 50), torch.full((40, 50), 3.0), torch.randn(1, 2000), torch.zeros(0, 7)]
)
def test_constant_empty_and_one_row(w: torch.Tensor) -> None:
    found = quantize_tensor(w, Recipe(bits=2, outliers=0.001))
    assert found.spec.outliers == round(0.001 * w.numel())
    assert squares(w - found.decode()) <= squares(w - quantize_tensor(w, Recipe(bits=2)).decode())


def test_numbers_beyond_float16_are_cut_and_finite() -> None:
    w = spiky()
    w[3, 4] = 3e6
    found = quantize_tensor(w, Recipe(bits=1, scheme="binary", outliers=0.001))
    assert found.decode().isfinite().all()
    assert as_stored(torch.tensor([1e9, -1e9, 0.5])).tolist() == [65280.0, -65280.0, 0.5]


@pytest.mark.parametrize("bad", [-0.1, 0.00001, 0.2, 1, True, "many", None])
def test_a_share_that_is_none_is_told(bad: Any) -> None:
    with pytest.raises(LexibitError, match="outliers must be"):
        Recipe(outliers=bad)


def test_rules_and_the_plan_know_outliers(tiny_model: Any) -> None:
    model = tiny_model("bert-classifier")
    config = LexibitConfig(bits=2, rules={"*.query": {"outliers": 0.01}})
    plan = Plan.of(model, config)
    assert {weight.spec.outliers for weight in plan.weights if "query" in weight.name} == {
        round(0.01 * 24 * 24)
    }
    assert {weight.spec.outliers for weight in plan.weights if "query" not in weight.name} == {0}
    quantize(model, config)
    found = {name: weight.spec for name, weight in codebooks(model).items()}
    assert found == {weight.name: weight.spec for weight in plan.weights}


# places ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, MAX_GAP), min_size=1, max_size=30))
def test_places_come_back(gaps: list[int]) -> None:
    place, places = -1, []
    for gap in gaps:
        place += gap + 1
        places.append(place)
    packed = pack_places(torch.tensor(places))
    assert packed.dtype == torch.uint16
    assert packed.tolist() == gaps
    assert unpack_places(packed).tolist() == places


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_the_largest_are_found(count: int, seed: int) -> None:
    effect = torch.rand(20, 30, generator=torch.Generator().manual_seed(seed))
    found = largest(effect, count)
    assert found.tolist() == sorted(effect.view(-1).topk(count).indices.tolist())


@pytest.mark.parametrize("place", [[0], [199_999], [150_000, 150_001], [70_000, 199_998, 3]])
def test_far_ones_have_others_between_them(place: list[int]) -> None:
    effect = torch.zeros(200, 1000)
    effect.view(-1)[torch.tensor(place)] = torch.arange(1.0, len(place) + 1)
    found = largest(effect, 20)
    assert len(found) == 20
    assert found.diff().min() > 0
    assert unpack_places(pack_places(found)).equal(found)
    assert set(place) <= set(found.tolist())


def test_where_there_are_too_few_for_that_the_least_give_way() -> None:
    effect = torch.zeros(1, 400_000)
    effect[0, 399_999], effect[0, 5] = 1.0, 2.0
    found = largest(effect, 4)  # the way to the last takes six
    assert found.tolist() == [0, 1, 2, 5]
    alone = torch.zeros(1, 400_000)
    alone[0, 399_999] = 1.0
    assert largest(alone, 4).tolist() == [0, 1, 2, 3]
