"""Outlier channel splitting against a plain version, and against what the halves must add up to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from lexibit import (
    CodebookWeight,
    LexibitConfig,
    LexibitError,
    Plan,
    Recipe,
    quantize,
    quantize_tensor,
    schemes,
)
from lexibit.nn import Quantized, codebooks
from lexibit.schemes.ocs import split_channels

CLIPS = ("max", "aciq", "mse", "kl")


def outliers(rows: int = 24, columns: int = 40, seed: int = 0) -> torch.Tensor:
    """Normal weights, some columns of which are much larger."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w[:, ::9] *= 6
    return w


def stored(weight: CodebookWeight) -> torch.Tensor:
    """The stored matrix, its extra channels not yet added to their origins."""
    groups = weight.spec.groups
    rows = torch.arange(groups.rows)
    return groups.lookup(weight.unpacked_codes(), weight.table(), rows)


def plain_split(w: np.ndarray, count: int, step: float | None) -> tuple[np.ndarray, list[int]]:
    """Halve the column with the largest |w| again and again; grid-aware if there is a step."""
    w, origins, widest = w.astype(np.float64), list(range(w.shape[1])), np.abs(w).max(0)
    widest = list(widest)
    for _ in range(count):
        at = int(np.argmax(widest))
        widest[at] /= 2
        widest.append(widest[at])
        origins.append(origins[at])
        shift = 0 if step is None else step / 4
        w = np.column_stack([w, w[:, at] / 2 + shift])
        w[:, at] = w[:, at] / 2 - shift
    return w, origins[len(widest) - count :]


# splitting -------------------------------------------------------------------------------------------


def test_the_largest_channel_is_split_and_may_be_split_again() -> None:
    channels = split_channels(np.array([1, 16, 3, 2], np.float32), 4)
    # 16 -> 8 8, of the two the first -> 4 4, the other -> 4 4, and of the four 4s the first -> 2 2
    assert channels.origin.tolist() == [0, 1, 2, 3, 1, 1, 1, 1]
    assert channels.share.tolist() == [1, 1 / 8, 1, 1, 1 / 4, 1 / 4, 1 / 4, 1 / 8]


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20), st.integers(0, 40))
def test_the_parts_of_a_channel_add_up_to_it(largest: list[float], count: int) -> None:
    size = np.array(largest, np.float32)
    channels = split_channels(size, count)
    for channel in range(len(size)):
        mine = channels.origin == channel
        assert channels.share[mine].sum() == pytest.approx(1)
        assert channels.shift[mine].sum() == pytest.approx(0, abs=1e-6)
    assert (np.abs(channels.shift) <= 0.5).all()
    # no channel was split before all larger ones were
    sizes = size[channels.origin] * channels.share
    split = channels.share < 1
    if split.any():
        assert sizes.max() <= 2 * sizes[split].min() * (1 + 1e-6)


@pytest.mark.parametrize(
    ("ratio", "columns", "count"), [(0.05, 40, 2), (0.01, 768, 8), (0.02, 768, 16), (0.05, 768, 39)]
)
def test_the_ratio_is_of_the_channels_rounded_up(ratio: float, columns: int, count: int) -> None:
    assert math.ceil(ratio * columns) == count
    weight = quantize_tensor(outliers(4, columns), Recipe("ocs", 4, options={"ratio": ratio}))
    assert weight.spec.extra == (0, count)
    assert weight.origins.shape == (count,)


def test_a_ratio_that_is_a_whole_number_of_channels_is_that_number() -> None:
    for count in range(101):
        assert schemes.scheme("ocs", {"ratio": count / 100}).extra(100) == count


# what is stored and decoded --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("split", ["naive", "grid-aware"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 1.0])
def test_the_stored_matrix_is_that_of_the_plain_algorithm(split: str, ratio: float, bits: int) -> None:
    w = outliers()
    weight = quantize_tensor(w, Recipe("ocs", bits, options={"ratio": ratio, "split": split}))
    count = math.ceil(ratio * 40)
    n = 2 ** (bits - 1) - 1
    naive, origins = plain_split(w.numpy(), count, None)
    step = np.abs(naive).max() / n
    halves, _ = plain_split(w.numpy(), count, step if split == "grid-aware" else None)
    assert weight.origins.tolist() == origins
    assert weight.levels.item() == pytest.approx(step, rel=1e-6)
    rounded = np.clip(np.round(halves / step), -n - 1, n) * step
    same = np.isclose(stored(weight).numpy(), rounded, rtol=1e-5, atol=1e-6)
    assert same.mean() > 0.995  # halves in between may round either way
    folded = rounded[:, :40].copy()
    np.add.at(folded, (slice(None), origins), rounded[:, 40:])
    assert np.isclose(weight.decode().numpy(), folded, rtol=1e-5, atol=1e-5).mean() > 0.995


@pytest.mark.parametrize("groups", ["matrix", "row", "rows:5"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_grid_aware_halves_add_up_to_rounding_with_the_smaller_step_and_no_clamp(
    ratio: float, bits: int, groups: str
) -> None:
    w = outliers()
    weight = quantize_tensor(w, Recipe("ocs", bits, groups, {"ratio": ratio}))
    step = weight.levels[torch.arange(24) // weight.spec.block[0]]
    steps = (w.double() / step.double()).numpy()
    found = (weight.decode().double() / step.double()).numpy()
    np.testing.assert_allclose(found, np.round(found), atol=1e-3)
    apart = np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 1e-3
    np.testing.assert_array_equal(np.round(found)[apart], np.round(steps)[apart])
    # the smaller step: without splitting the grid must reach to the largest weight
    unsplit = quantize_tensor(w, Recipe("lq", bits, groups))
    assert (weight.levels <= unsplit.levels).all()
    assert weight.levels.max() < unsplit.levels.max()


def test_naive_halves_lose_what_grid_aware_ones_keep() -> None:
    w = outliers(200, 100)

    def squared(split: str) -> float:
        weight = quantize_tensor(w, Recipe("ocs", 3, options={"ratio": 0.2, "split": split}))
        return float((weight.decode() - w).square().sum())

    assert squared("grid-aware") < 0.9 * squared("naive")
    assert squared("grid-aware") < 0.5 * float(
        (quantize_tensor(w, Recipe("lq", 3)).decode() - w).square().sum()
    )


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("split", ["naive", "grid-aware"])
@pytest.mark.parametrize("clip", CLIPS)
def test_every_clip_sets_the_reach_of_the_split_weights(clip: str, split: str, affine: bool) -> None:
    w = outliers()
    options = {"ratio": 0.2, "clip": clip, "split": split, "affine": affine}
    weight = quantize_tensor(w, Recipe("ocs", 3, options=options))
    halves, _ = plain_split(w.numpy(), 8, None)
    alone = quantize_tensor(
        torch.from_numpy(halves.astype(np.float32)),
        Recipe({"max": "lq"}.get(clip, clip), 3, options={"affine": affine}),
    )
    torch.testing.assert_close(weight.levels, alone.levels, rtol=1e-5, atol=1e-6)
    if split == "naive":
        assert torch.equal(weight.unpacked_codes(), alone.unpacked_codes())
    assert (weight.decode() - w).abs().max() < w.abs().max()


def test_extra_channels_and_their_origins_are_counted() -> None:
    w = outliers(24, 40)
    for bits, ratio in ((3, 0.05), (4, 0.2)):
        weight = quantize_tensor(w, Recipe("ocs", bits, options={"ratio": ratio}))
        extra = math.ceil(ratio * 40)
        size = math.ceil(24 * (40 + extra) * bits / 8) + 4 * extra + 4
        assert weight.nbytes == size
        assert weight.bits_per_weight == pytest.approx(8 * size / (24 * 40))
        assert weight.bits_per_weight > bits * (1 + extra / 40)


def test_no_ratio_and_an_empty_weight_have_no_extra_channels() -> None:
    w = outliers()
    none = quantize_tensor(w, Recipe("ocs", 4, options={"ratio": 0}))
    assert none.spec.extra == (0, 0)
    assert torch.equal(none.decode(), quantize_tensor(w, Recipe("lq", 4)).decode())
    for shape in ((0, 5), (5, 0)):
        assert quantize_tensor(torch.empty(shape), Recipe("ocs", 4)).decode().shape == shape


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 4, 5)])
def test_odd_shapes_are_split(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = quantize_tensor(w, Recipe("ocs", 6, options={"ratio": 0.3}))
    assert sum(weight.spec.extra) == math.ceil(0.3 * shape[-1])
    assert weight.decode().shape == shape
    assert (weight.decode() - w).abs().max() <= w.abs().max() / 31


# modules ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact")
def test_linear_and_embedding_run_with_their_split_columns() -> None:
    linear, words = torch.nn.Linear(40, 24), torch.nn.Embedding(24, 40)
    with torch.no_grad():
        linear.weight.copy_(outliers())
        words.weight.copy_(outliers(seed=1))
    model = torch.nn.Sequential(words, linear)
    quantize(model, LexibitConfig("ocs", 4), progress=False)
    assert [weight.spec.extra for weight in codebooks(model).values()] == [(0, 2), (0, 2)]
    ids = torch.tensor([[3, 7], [23, 0]])
    assert torch.equal(words(ids), words.weight[ids])
    x = torch.randn(5, 40)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    torch.testing.assert_close(
        linear.weight, outliers(), rtol=0, atol=float(linear.weight_codebook.levels) / 2 + 1e-5
    )


@pytest.mark.usefixtures("exact")
def test_the_input_channels_of_conv1d_are_its_rows() -> None:
    module = Conv1D(24, 40)  # weight [40, 24]
    w = outliers().t().contiguous()
    with torch.no_grad():
        module.weight.copy_(w)
    model = torch.nn.Sequential(module)
    quantize(model, LexibitConfig("ocs", 4), progress=False)
    assert isinstance(module, Quantized)
    weight = module.weight_codebook
    assert weight.spec.extra == (2, 0)
    # the transposed weight of a linear layer, split the same way
    linear = quantize_tensor(outliers(), Recipe("ocs", 4))
    assert weight.origins.tolist() == linear.origins.tolist()
    torch.testing.assert_close(weight.decode().t(), linear.decode())
    x = torch.randn(3, 40)
    assert torch.equal(module(x), torch.addmm(module.bias, x, module.weight))
    alone = quantize_tensor(w, Recipe("ocs", 4), kind="conv1d")
    assert torch.equal(alone.decode(), weight.decode())


# importance ------------------------------------------------------------------------------------------


def test_importances_go_with_the_halves_if_the_clip_weighs() -> None:
    w = outliers()
    m = torch.ones_like(w)
    m[:, 0] = 500.0  # an outlier column
    options = {"clip": "mse", "ratio": 0.1}
    plain, weighted = (
        quantize_tensor(w, Recipe("ocs", 3, options=options), importance=importance).decode()
        for importance in (None, m)
    )
    assert (weighted - w)[:, 0].square().sum() < (plain - w)[:, 0].square().sum()
    constant = quantize_tensor(
        w, Recipe("ocs", 3, options=options), importance=torch.full_like(w, 3.0)
    ).decode()
    torch.testing.assert_close(constant, plain)
    with pytest.raises(LexibitError, match="'ocs' does not use importances"):
        quantize_tensor(w, Recipe("ocs", 3), importance=m)


# options ---------------------------------------------------------------------------------------------


def test_wrong_options_are_refused() -> None:
    for ratio in (-0.1, 1.5, float("nan")):
        with pytest.raises(LexibitError, match="ocs ratio must be from 0 to 1"):
            schemes.scheme("ocs", {"ratio": ratio})
    for ratio in ("0.05", True, None):
        with pytest.raises(LexibitError, match="ocs ratio must be a number"):
            schemes.scheme("ocs", {"ratio": ratio})
    with pytest.raises(LexibitError, match="unknown split of scheme 'ocs' 'grid'"):
        schemes.scheme("ocs", {"split": "grid"})
    with pytest.raises(LexibitError, match="unknown clip of scheme 'ocs' 'aciqq': did you mean 'aciq'"):
        schemes.scheme("ocs", {"clip": "aciqq"})
    with pytest.raises(LexibitError, match="affine must be true or false"):
        schemes.scheme("ocs", {"affine": 1})
    with pytest.raises(LexibitError, match="2 to 8 bits, not 1"):
        Recipe("ocs", 1)


def test_groups_that_part_the_halves_are_refused_in_the_plan_by_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 24))
    with pytest.raises(
        LexibitError, match=r"0\.weight: 'ocs' with split=grid-aware .*whole rows or split=naive"
    ):
        Plan.of(model, LexibitConfig("ocs", 4, "columns:8"))
    assert Plan.of(model, LexibitConfig("ocs", 4, "columns:8", {"split": "naive"})).weights
    assert Plan.of(model, LexibitConfig("ocs", 4, "row")).weights
    conv = torch.nn.Sequential(Conv1D(24, 40))
    with pytest.raises(LexibitError, match=r"0\.weight: .*groups=matrix"):
        Plan.of(conv, LexibitConfig("ocs", 4, "row"))
    assert Plan.of(conv, LexibitConfig("ocs", 4, "row", {"split": "naive"})).weights
