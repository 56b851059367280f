"""One tensor into codes: what is refused and how, and what stays the same whatever the circumstances."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from lexibit import (
    CodebookWeight,
    LexibitConfig,
    LexibitError,
    Plan,
    Recipe,
    fitting,
    quantize,
    quantize_tensor,
)
from lexibit.fitting import installed
from lexibit.nn import codebooks

RECIPES = [
    Recipe("linear", 3, "row"),
    Recipe("lq", 3, "rows:2"),
    Recipe("kmeans", 3, "columns:5"),
    Recipe("aciq", 3, "row", {"bias_correction": True}),
    Recipe("mse", 3, "columns:5", {"affine": True}),
    Recipe("kl", 3, "rows:2"),
    Recipe("ocs", 3, "row", {"ratio": 0.2, "clip": "mse"}),
    Recipe("binary", 3, "columns:5"),
]
PLUSPLUS = Recipe("kmeans", 3, "matrix", {"init": "k-means++"})


def matrix(rows: int = 6, columns: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def same(a: CodebookWeight, b: CodebookWeight) -> None:
    assert a.spec == b.spec
    assert a.codes.numpy().tobytes() == b.codes.numpy().tobytes()
    assert a.levels.double().numpy().tobytes() == b.levels.double().numpy().tobytes()


# refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_weight_that_is_not_finite_is_named_with_its_place(bad: float, recipe: Recipe) -> None:
    w = matrix()
    w[2, 7] = w[4, 1] = bad
    with pytest.raises(LexibitError) as caught:
        quantize_tensor(w, recipe, name="encoder.key.weight")
    message = str(caught.value)
    assert message.startswith("encoder.key.weight: 2 of its 66 weights are NaN or infinite")
    assert "row 2, column 7" in message
    assert "exclude" in message


def test_a_place_in_a_weight_of_more_axes_is_one_of_its_matrix() -> None:
    w = matrix(6, 11).view(2, 3, 11)
    w[1, 2, 4] = float("nan")
    with pytest.raises(LexibitError, match="row 5, column 4"):
        quantize_tensor(w)


def test_a_weight_beyond_float32_is_said_to_be_so() -> None:
    w = matrix().double()
    w[1, 3] = 1e300
    with pytest.raises(
        LexibitError, match="1 of its 66 weights are beyond float32, the first in row 1, column 3"
    ):
        quantize_tensor(w)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_a_tensor_that_is_not_floating_point_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(LexibitError, match=f"ids is {dtype} .*only floating-point"):
        quantize_tensor(torch.ones(3, 4, dtype=dtype), name="ids")


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_tensor_of_fewer_than_two_axes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LexibitError, match=r"bias is torch\.float32 .*two axes or more"):
        quantize_tensor(torch.zeros(shape), name="bias")


def test_an_importance_of_another_shape_is_refused() -> None:
    with pytest.raises(LexibitError, match=r"w: its importance is \[11, 6\], must be \[6, 11\]"):
        quantize_tensor(matrix(), RECIPES[0], importance=torch.ones(11, 6), name="w")


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_an_importance_that_is_negative_or_not_finite_is_refused(bad: float) -> None:
    importance = torch.ones(6, 11)
    importance[3, 3] = bad
    with pytest.raises(LexibitError, match="w: its importance must be finite and not negative"):
        quantize_tensor(matrix(), RECIPES[0], importance=importance, name="w")


def test_an_importance_is_refused_by_a_scheme_that_does_not_weigh() -> None:
    with pytest.raises(LexibitError, match=r"w: scheme 'lq' does not use importances.*binary, kmeans"):
        quantize_tensor(matrix(), Recipe("lq"), importance=torch.ones(6, 11), name="w")


# importances -----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["matrix", "row", "rows:4", "columns:4"])
def test_an_importance_goes_with_its_weight_into_every_group(groups: str) -> None:
    w, importance = matrix(), matrix(seed=1).abs()
    weight = quantize_tensor(w, Recipe("linear", 1, groups), importance=importance)
    codes, decoded = weight.unpacked_codes(), weight.decode()
    height, width = weight.spec.block
    for r in range(0, 6, height):
        for c in range(0, 11, width):
            block = slice(r, r + height), slice(c, c + width)
            for code in (0, 1):
                inside = codes[block] == code
                if inside.any():
                    x, m = w[block][inside], importance[block][inside]
                    mean = (x * m).sum() / m.sum()
                    torch.testing.assert_close(decoded[block][inside], mean.expand(len(x)))


@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[2]], ids=str)
@pytest.mark.parametrize("value", [1e-30, 1.0, 7.0])
def test_equal_importances_change_nothing(recipe: Recipe, value: float) -> None:
    w = matrix()
    weighted = quantize_tensor(w, recipe, importance=torch.full_like(w, value))
    plain = quantize_tensor(w, recipe)
    assert torch.equal(weighted.codes, plain.codes)
    torch.testing.assert_close(weighted.levels, plain.levels)


# installed for a while -------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.out = nn.Linear(6, 9)
        self.out.weight = self.words.weight
        self.lstm = nn.LSTM(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(ids)) + self.lstm(self.words(ids))[0].sum()


def test_codes_are_installed_inside_and_the_float_weights_afterwards() -> None:
    torch.manual_seed(0)
    model = Shared()
    ids = torch.tensor([[1, 2, 3]])
    names, before = [name for name, _ in model.named_parameters()], dict(model.named_parameters())
    expected = model(ids)
    packed = [
        (planned, quantize_tensor(planned.uses[0].module.get_parameter(planned.uses[0].parameter)))
        for planned in Plan.of(model, LexibitConfig()).weights
    ]
    assert len(packed) == 3
    for fault in (False, True):
        with contextlib.suppress(ZeroDivisionError), installed(packed):
            assert len(codebooks(model)) == 3
            assert model.words.weight_codebook is model.out.weight_codebook
            assert not torch.equal(model(ids), expected)
            if fault:
                raise ZeroDivisionError
        assert not codebooks(model)
        assert [type(module) for module in model.children()] == [nn.Embedding, nn.Linear, nn.LSTM]
        assert [name for name, _ in model.named_parameters()] == names
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        assert model.out.weight is model.words.weight
        assert torch.equal(model(ids), expected)


# dtypes and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_weight_is_worked_on_in_float32_and_decoded_in_its_own_dtype(
    dtype: torch.dtype, recipe: Recipe
) -> None:
    w = matrix().to(dtype)
    weight, plain = quantize_tensor(w, recipe), quantize_tensor(w.float(), recipe)
    assert weight.spec.dtype == str(dtype).removeprefix("torch.")
    assert weight.dtype == weight.decode().dtype == dtype
    assert torch.equal(weight.codes, plain.codes)
    assert torch.equal(weight.levels, plain.levels.to(dtype))
    assert weight.nbytes == plain.nbytes


@pytest.mark.parametrize("levels_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_levels_stored_in_half_precision_are_those_that_are_computed_with(
    levels_dtype: str, recipe: Recipe
) -> None:
    w = matrix()
    half = replace(recipe, levels_dtype=levels_dtype)
    weight, full = quantize_tensor(w, half), quantize_tensor(w, recipe)
    stored = weight.tensors("w")["w_levels"]
    assert stored.dtype == getattr(torch, levels_dtype)
    assert torch.equal(stored, full.levels.to(stored.dtype))
    assert weight.dtype == torch.float32
    # what is read back from the stored tensors decodes to the same weight
    again = CodebookWeight(weight.spec, weight.codes, stored.float(), weight.origins)
    assert torch.equal(again.decode(), weight.decode())
    assert full.nbytes - weight.nbytes == 2 * full.levels.numel()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_levels_too_small_for_half_precision_are_refused_with_the_way_out(recipe: Recipe) -> None:
    w = matrix(20, 30) * 1e-8
    with pytest.raises(
        LexibitError, match=r"small: its levels, up to .* do not fit float16: use .*'float32'"
    ):
        quantize_tensor(w, replace(recipe, levels_dtype="float16"), name="small")
    full = quantize_tensor(w, recipe)
    assert ((full.decode() - w).square().sum() < 0.5 * w.square().sum()) or recipe.scheme in ("linear", "ocs")
    # one group of many that is next to nothing is no reason to refuse
    mixed = matrix(20, 30)
    mixed[7] *= 1e-8
    assert quantize_tensor(mixed, replace(recipe, levels_dtype="float16")).decode().isfinite().all()


def test_a_float16_weight_that_its_own_grid_would_lose_is_refused() -> None:
    with pytest.raises(
        LexibitError, match=r"tiny: its levels, up to .* do not fit float16: choose scheme .kmeans. for it"
    ):
        quantize_tensor((matrix(20, 30) * 1e-6).half(), Recipe("lq", 8), name="tiny")


@pytest.mark.parametrize("split", ["naive", "grid-aware"])
@pytest.mark.parametrize("clip", ["max", "mse", "kl", "aciq"])
def test_channels_split_often_near_the_end_of_float16_stay_finite_or_are_refused(
    split: str, clip: str
) -> None:
    finite = 0
    for columns, ratio, bits in [(4, 0.8, 2), (4, 1.0, 3), (8, 0.5, 4), (13, 1.0, 2), (16, 0.3, 8)]:
        w = matrix(4, columns) * 10
        w[:, 0] = torch.tensor([65504.0, -65504.0, 60000.0, 65000.0])
        recipe = Recipe("ocs", bits, "matrix", {"ratio": ratio, "split": split, "clip": clip})
        with contextlib.suppress(LexibitError):
            decoded = quantize_tensor(w.half(), recipe).decode()
            assert decoded.isfinite().all()
            finite += 1
    assert finite or clip != "max"


@pytest.mark.parametrize("recipe", [Recipe("binary", 2), Recipe("kmeans", 1), Recipe("kmeans", 3, "row")])
def test_weights_at_the_end_of_float32_are_taken(recipe: Recipe) -> None:
    largest = torch.finfo(torch.float32).max
    for w in (torch.full((4, 6), largest), torch.tensor([[-largest, largest] * 3] * 2)):
        decoded = quantize_tensor(w, recipe).decode()
        assert decoded.isfinite().all()
        assert torch.allclose(decoded, w, rtol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
def test_a_grid_near_the_end_of_float16_stays_finite_or_is_refused(affine: bool) -> None:
    w = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) * 5504 + 60000
    for bits in (2, 3, 8):
        with contextlib.suppress(LexibitError):
            weight = quantize_tensor(w.half(), Recipe("lq", bits, options={"affine": affine}))
            assert weight.decode().isfinite().all()


@pytest.mark.parametrize(("scheme", "bits"), [("linear", 2), ("lq", 2), ("kmeans", 2)])
def test_levels_beyond_half_precision_are_refused_with_the_way_out(scheme: str, bits: int) -> None:
    w = matrix() * 1e6
    assert quantize_tensor(w, Recipe(scheme, bits)).decode().isfinite().all()
    with pytest.raises(LexibitError, match=r"big: its levels, up to .* do not fit float16: use .*'float32'"):
        quantize_tensor(w, Recipe(scheme, bits, levels_dtype="float16"), name="big")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_levels_near_the_end_of_half_precision_are_stored_finite(dtype: torch.dtype) -> None:
    w = torch.full((2, 3), 65280.0, dtype=dtype)
    w[0, 0] = -65280.0
    weight = quantize_tensor(w, Recipe("linear", 1, levels_dtype="float16"))
    assert weight.tensors("w")["w_levels"].tolist() == [[-65280.0, 65280.0]]


@pytest.mark.parametrize("recipe", [*RECIPES, PLUSPLUS], ids=str)
def test_memory_that_is_not_contiguous_gives_the_same_codes(recipe: Recipe) -> None:
    w = matrix()
    for other in (w.t().contiguous().t(), torch.stack([w, w], dim=-1)[..., 0]):
        assert not other.is_contiguous()
        same(quantize_tensor(other, recipe), quantize_tensor(w, recipe))


@pytest.mark.parametrize("recipe", [*RECIPES, PLUSPLUS], ids=str)
def test_more_axes_give_the_codes_of_the_matrix(recipe: Recipe) -> None:
    w = matrix()
    weight, flat = quantize_tensor(w.view(2, 3, 11), recipe), quantize_tensor(w, recipe)
    assert weight.shape == (2, 3, 11)
    assert torch.equal(weight.codes, flat.codes)
    assert torch.equal(weight.decode(), flat.decode().view(2, 3, 11))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_weight_is_not_changed_and_not_kept(recipe: Recipe) -> None:
    w = torch.nn.Parameter(matrix())
    before = w.detach().clone()
    weight = quantize_tensor(w, recipe)
    assert torch.equal(w, before)
    assert not weight.levels.requires_grad
    decoded = weight.decode()
    with torch.no_grad():
        w.zero_()
    assert torch.equal(weight.decode(), decoded)


def test_the_default_is_kmeans_with_four_bits_for_the_whole_matrix() -> None:
    spec = quantize_tensor(matrix()).spec
    assert (spec.scheme, spec.bits, spec.block) == ("kmeans", 4, (6, 11))
    assert (spec.form.value, spec.levels_dtype, spec.dtype) == ("table", "float32", "float32")


# the same bytes --------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("recipe", [*RECIPES, PLUSPLUS], ids=str)
def test_the_number_of_threads_does_not_change_a_byte(recipe: Recipe) -> None:
    # large enough for PyTorch to share the work between threads
    w = matrix(300, 400)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count
        results.append(quantize_tensor(w, recipe))
    same(*results)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_change_a_model() -> None:
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(20 + i, 21 + i) for i in range(6)])
        config = LexibitConfig(bits=3, options={"init": "k-means++"}, seed=3)
        quantize(model, config, progress=False)
        results.append(codebooks(model))
    assert results[0].keys() == results[1].keys()
    assert len(results[0]) == 6
    for name, weight in results[0].items():
        same(weight, results[1][name])


@pytest.mark.parametrize("recipe", [*RECIPES, PLUSPLUS], ids=str)
def test_the_same_seed_gives_the_same_bytes(recipe: Recipe) -> None:
    torch.manual_seed(1)
    first = quantize_tensor(matrix(), recipe, seed=7)
    torch.manual_seed(2)
    torch.rand(5)
    same(first, quantize_tensor(matrix(), recipe, seed=7))


def test_the_seed_of_the_configuration_reaches_the_scheme() -> None:
    def levels(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(30, 20))
        config = LexibitConfig(bits=3, options={"init": "k-means++"}, seed=seed)
        quantize(model, config, progress=False)
        return model[0].weight_codebook.levels

    assert torch.equal(levels(1), levels(1))
    assert not torch.equal(levels(1), levels(2))


# large weights, some rows at a time ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_some_rows_at_a_time_give_what_all_at_once_give(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe, dtype: torch.dtype
) -> None:
    w = matrix(29, 16).to(dtype)
    whole = quantize_tensor(w, recipe)
    monkeypatch.setattr(fitting, "_BAND", 100)
    in_bands, calls = fitting._in_bands, []
    monkeypatch.setattr(fitting, "_in_bands", lambda *all: calls.append(all) or in_bands(*all))
    same(quantize_tensor(w, recipe), whole)
    assert len(calls) == (recipe.scheme != "ocs")


@pytest.mark.parametrize(
    "recipe",
    [PLUSPLUS, Recipe("linear", 3, "matrix"), Recipe("kmeans", 3, "row", outliers=0.01)],
    ids=["drawn", "one group", "outliers"],
)
def test_what_depends_on_all_rows_is_chosen_for_all(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    w = matrix(29, 16)
    whole = quantize_tensor(w, recipe)
    monkeypatch.setattr(fitting, "_BAND", 100)
    monkeypatch.setattr(fitting, "_in_bands", None)
    same(quantize_tensor(w, recipe), whole)


def test_a_row_that_is_not_finite_is_called_by_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_BAND", 100)
    w = matrix(29, 16)
    w[17, 3] = float("nan")
    with pytest.raises(LexibitError, match="row 17, column 3"):
        quantize_tensor(w, Recipe("linear", 3, "row"))
