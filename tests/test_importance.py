"""Importances: by magnitude as the paper's code has it, by file, by tensor, and squared gradients."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lexibit import (
    CodebookWeight,
    LexibitConfig,
    LexibitError,
    Plan,
    Recipe,
    importance,
    quantize,
    quantize_tensor,
)
from lexibit.importance import Magnitude, parse
from lexibit.nn import codebooks


def matrix(rows: int = 12, columns: int = 30, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


WEIGHING = [
    Recipe("kmeans", 3, "row", {"init": "optimal"}),
    Recipe("kmeans", 3, "matrix", {"init": "k-means++"}),
    Recipe("kmeans", 6),
    Recipe("linear", 3, "row"),
    Recipe("mse", 3, "row"),
    Recipe("mse", 3, "matrix", {"affine": True}),
    Recipe("ocs", 3, "matrix", {"clip": "mse", "ratio": 0.1}),
    Recipe("binary", 3, "row", {"method": "greedy"}),
    Recipe("binary", 3, "columns:10", {"method": "refined"}),
    Recipe("binary", 3, "row"),
]


def recipe_of(recipe: Recipe, importance: str) -> Recipe:
    return Recipe(recipe.scheme, recipe.bits, recipe.groups, recipe.options, importance=importance)


def same(a: CodebookWeight, b: CodebookWeight) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.levels, b.levels)


# by magnitude ----------------------------------------------------------------------------------------


def papers(w: np.ndarray, E: float, C: float, P: float) -> np.ndarray:
    """The formula, with s = sort(a), Q_C = s[int(n C)] (the largest if C = 1) and Q_P = s[int(n P)]."""
    a = np.abs(w)
    s = np.sort(a.ravel())
    q_c = s[-1] if C == 1 else s[int(s.size * C)]
    m = np.minimum(1, a / q_c) ** E
    return m if P == 0 else m * (a > s[int(s.size * P)])


@pytest.mark.parametrize("E", [0.0, 0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("C", [1.0, 0.9999, 0.99, 0.5])
@pytest.mark.parametrize("P", [0.0, 0.02, 0.2])
def test_magnitude_is_the_papers_formula_over_the_whole_matrix(E: float, C: float, P: float) -> None:
    w = matrix(40, 50)
    found, pruned = Magnitude(E, C, P).of(w)
    np.testing.assert_allclose(found, papers(w.numpy(), E, C, P), rtol=1e-5)
    assert pruned is None
    assert (found == 0).sum() == (int(2000 * P) + 1 if P else 0)
    if E == 0 and P == 0:
        assert (found == 1).all()


@given(st.integers(1, 30), st.integers(0, 5), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.3, 0.99]))
def test_any_matrix_has_importances_from_0_to_1(size: int, kinds: int, E: float, P: float) -> None:
    w = torch.from_numpy(np.random.default_rng(size).integers(0, kinds + 1, (1, size)).astype(np.float32))
    found, pruned = Magnitude(E, 0.9, P, mask=bool(P)).of(w)
    assert ((found >= 0) & (found <= 1)).all()
    assert (pruned is None) == (not P)


def test_zeros_count_if_all_is_zero_or_the_exponent_is() -> None:
    zeros = torch.zeros(2, 3)
    assert (Magnitude(1.0).of(zeros)[0] == 1).all()
    half = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    assert Magnitude(0.0).of(half)[0].tolist() == [[1, 1, 1, 1]]
    assert Magnitude(1.0).of(half)[0].tolist() == [[0, 0, 0, 1]]
    assert Magnitude(1.0, C=0.5).of(half)[0].tolist() == [[1, 1, 1, 1]]  # Q_C = 0
    assert Magnitude().of(torch.empty(0, 4))[0].shape == (0, 4)


@pytest.mark.parametrize("recipe", WEIGHING, ids=str)
def test_every_scheme_that_minimises_an_error_takes_magnitudes(recipe: Recipe) -> None:
    w = matrix()
    by_text = quantize_tensor(w, recipe_of(recipe, "E=1,C=0.9"))
    by_tensor = quantize_tensor(w, recipe, importance=Magnitude(1.0, 0.9).of(w)[0])
    assert same(by_text, by_tensor)
    assert not torch.equal(by_text.levels, quantize_tensor(w, recipe).levels)


@pytest.mark.parametrize("recipe", WEIGHING, ids=str)
def test_weighting_lowers_the_weighted_error(recipe: Recipe) -> None:
    w, m = matrix(60, 80), matrix(60, 80, seed=1).exp()

    def weighted_error(found: CodebookWeight) -> float:
        return float((m * (found.decode() - w).square()).sum())

    with_it, without = quantize_tensor(w, recipe, importance=m), quantize_tensor(w, recipe)
    # k-means++ draws its start by importance, too, and OCS rounds its halves after the clip was chosen:
    # neither has the least error
    slack = 1.1 if recipe.scheme == "ocs" or (recipe.options or {}).get("init") == "k-means++" else 1.0
    assert weighted_error(with_it) < weighted_error(without) * slack


@pytest.mark.parametrize("recipe", WEIGHING, ids=str)
def test_no_exponent_and_no_pruning_is_no_weighting(recipe: Recipe) -> None:
    w = matrix()
    weighted, plain = quantize_tensor(w, recipe_of(recipe, "E=0,C=0.99")), quantize_tensor(w, recipe)
    torch.testing.assert_close(weighted.levels, plain.levels, rtol=1e-5, atol=1e-6)


def test_pruned_weights_take_a_level_unless_there_is_a_mask() -> None:
    w = matrix()
    pruned = w.abs() <= w.abs().flatten().sort().values[int(360 * 0.1)]
    for scheme in ("kmeans", "binary", "mse"):
        plain = quantize_tensor(w, Recipe(scheme, 3, importance="P=0.1"))
        assert plain.spec.mask is False
        levels = {level for row in plain.table().tolist() for level in row}
        assert set(plain.decode().flatten().tolist()) <= {float(np.float32(level)) for level in levels}
        masked = quantize_tensor(w, Recipe(scheme, 3, importance="P=0.1,mask"))
        assert masked.spec.mask is True
        assert (masked.decode()[pruned] == 0).all()
        if scheme != "mse":  # which has a level zero
            assert torch.equal(masked.decode() == 0, pruned)
            assert (plain.decode() != 0).all()
        assert torch.equal(masked.levels, plain.levels)
        assert torch.equal(masked.decode()[~pruned], plain.decode()[~pruned])
        # a bit a weight, and it is counted
        assert masked.nbytes - plain.nbytes == 360 // 8
        assert masked.bits_per_weight == pytest.approx(plain.bits_per_weight + 1)


def test_a_mask_never_takes_more_than_its_share() -> None:
    # more than P lie on the border: by the formula they count nothing, and the mask leaves them
    equal = torch.full((4, 4), 0.5)
    importance, zero = Magnitude(P=0.1, mask=True).of(equal)
    assert not importance.any()
    assert not zero.any()
    torch.testing.assert_close(quantize_tensor(equal, Recipe(importance="P=0.1,mask")).decode(), equal)
    some = torch.tensor([[0.1, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9]])
    assert Magnitude(P=0.3, mask=True).of(some)[1].tolist() == [[True] * 2 + [False] * 8]
    assert Magnitude(P=0.1, mask=True).of(some)[1].tolist() == [[True] * 2 + [False] * 8]


@pytest.mark.parametrize("value", ["1", None, True, 1j])
def test_a_magnitude_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(LexibitError, match="importance: E must be a number"):
        Magnitude(E=value)


@pytest.mark.parametrize("importance", ["E=1,P=0.05", "P=0.5,mask"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 4, 5), (0, 4), (4, 0)])
def test_odd_shapes_are_weighted(shape: tuple[int, ...], importance: str) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for scheme in ("kmeans", "linear", "mse", "binary"):
        weight = quantize_tensor(w, Recipe(scheme, 2, "row", importance=importance))
        assert weight.decode().shape == shape
        assert weight.decode().isfinite().all()


def test_a_constant_weight_of_which_all_is_pruned_counts_alike() -> None:
    w = torch.full((3, 5), 0.7)
    for scheme in ("kmeans", "linear", "mse", "binary"):
        torch.testing.assert_close(quantize_tensor(w, Recipe(scheme, 2, importance="E=1,P=0.2")).decode(), w)


# spelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("E=0.5", Magnitude(0.5)),
        ("E=0,C=0.999,P=0.05", Magnitude(0.0, 0.999, 0.05)),
        ("P=0.1, mask", Magnitude(1.0, 1.0, 0.1, True)),
        ("C=.9", Magnitude(1.0, 0.9)),
        ("some/where.safetensors", Path("some/where.safetensors")),
    ],
)
def test_a_spelling_has_a_meaning(text: str, meaning: object) -> None:
    assert parse(text) == meaning


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("e=1", "unknown importance setting 'e'.*known: C, E, FILE.safetensors, P, mask"),
        ("", "unknown importance setting"),
        ("E", "write E=NUMBER"),
        ("E=x", "write E=NUMBER"),
        ("E=-1", "E must be 0 or more, not -1"),
        ("E=inf", "E must be 0 or more"),
        ("E=nan", "E must be 0 or more"),
        ("C=1.1", "C must be 0 to 1, not 1.1"),
        ("P=1", "P must be 0 to less than 1, not 1"),
        ("mask", "mask stores what P prunes, and P is 0"),
        ("fisher.pt", "unknown importance setting"),
        ("E=1,E=2", "E is given twice"),
        ("P=0.1,mask=1", "write mask alone, without '='"),
    ],
)
def test_a_spelling_without_a_meaning_is_refused(text: str, said: str) -> None:
    for make in (parse, lambda text: Recipe(importance=text), lambda text: LexibitConfig(importance=text)):
        with pytest.raises(LexibitError, match=said):
            make(text)


@pytest.mark.parametrize("scheme", ["lq", "aciq", "kl", "ocs"])
def test_a_recipe_whose_scheme_does_not_weigh_refuses_an_importance(scheme: str) -> None:
    with pytest.raises(
        LexibitError, match=f"'{scheme}' does not use importances.*binary, kmeans, linear, mse"
    ):
        Recipe(scheme, importance="E=1")
    with pytest.raises(LexibitError, match="importance must be text"):
        Recipe("kmeans", importance=1.0)


def test_rules_give_every_layer_its_own_importance() -> None:
    config = LexibitConfig(
        "binary",
        3,
        importance="E=1",
        rules={
            "a": {"importance": "E=0.5,P=0.02"},
            "b": {"scheme": "lq"},
            "c": {"importance": None},
            "d": {"scheme": "kmeans"},
        },
    )
    assert config.recipe().importance == "E=1"
    assert config.recipe("a").importance == "E=0.5,P=0.02"
    assert config.recipe("b").importance is None  # LQ does not weigh
    assert config.recipe("c").importance is None
    assert config.recipe("d").importance == "E=1"
    # there and back
    assert config.recipe("b", "d").importance == "E=1"
    assert config.recipe("a", "d").importance == "E=0.5,P=0.02"
    with pytest.raises(LexibitError, match="'lq' does not use importances"):
        LexibitConfig(rules={"b": {"scheme": "lq", "importance": "E=1"}})
    # a rule that takes away what made the scheme weigh does not take the importance away in silence
    with pytest.raises(LexibitError, match="'ocs' does not use importances"):
        LexibitConfig(
            "ocs", options={"clip": "mse"}, importance="E=1", rules={"a": {"options": {"clip": "max"}}}
        )
    kept = LexibitConfig(
        "ocs", options={"clip": "mse"}, importance="E=1", rules={"a": {"options": {"ratio": 0.1}}}
    )
    assert kept.recipe("a").options == {"clip": "mse", "ratio": 0.1}
    assert kept.recipe("a").importance == "E=1"


# tensors of the user's -------------------------------------------------------------------------------


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 4))


def brought() -> dict[str, Tensor]:
    return {
        f"{index}.weight": torch.rand(shape) + 0.1 for index, shape in enumerate([(9, 6), (5, 6), (4, 5)])
    }


@pytest.mark.parametrize("scheme", ["kmeans", "binary", "mse"])
def test_tensors_and_their_file_do_the_same_to_a_model(tmp_path: Path, scheme: str) -> None:
    tensors = brought()
    importance.save(tensors, tmp_path / "fisher.safetensors")
    assert all(
        torch.equal(importance.load(tmp_path / "fisher.safetensors")[name], tensors[name]) for name in tensors
    )
    by_tensor, by_file, plain = model(), model(), model()
    quantize(by_tensor, LexibitConfig(scheme, 3), importances=tensors, progress=False)
    file = str(tmp_path / "fisher.safetensors")
    quantize(by_file, LexibitConfig(scheme, 3, importance=file), progress=False)
    quantize(plain, LexibitConfig(scheme, 3), progress=False)
    for name, weight in codebooks(by_tensor).items():
        assert same(weight, codebooks(by_file)[name])
        assert not torch.equal(weight.levels, codebooks(plain)[name].levels)
        floats = model().get_parameter(name).detach()
        alone = quantize_tensor(floats, Recipe(scheme, 3), importance=tensors[name])
        assert same(weight, alone)


def test_a_weight_that_is_not_named_counts_alike() -> None:
    tensors = brought()
    del tensors["1.weight"]
    some, plain = model(), model()
    quantize(some, LexibitConfig("kmeans", 3), importances=tensors, progress=False)
    quantize(plain, LexibitConfig("kmeans", 3), progress=False)
    assert same(codebooks(some)["1.weight"], codebooks(plain)["1.weight"])
    assert not same(codebooks(some)["2.weight"], codebooks(plain)["2.weight"])


def test_a_tied_weight_may_be_named_by_any_of_its_names(tiny_model: Any, tmp_path: Path) -> None:
    ours, names = (
        tiny_model("bert-mlm"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    )
    m = torch.rand(ours.get_parameter(names[0]).shape)
    found = []
    for name in names:
        tied = tiny_model("bert-mlm")
        quantize(tied, LexibitConfig("kmeans", 3), importances={name: m}, progress=False)
        found.append(codebooks(tied)[names[0]])
        importance.save({name: m}, tmp_path / "m.safetensors")
        from_file = tiny_model("bert-mlm")
        config = LexibitConfig("kmeans", 3, importance=str(tmp_path / "m.safetensors"))
        quantize(from_file, config, progress=False)
        found.append(codebooks(from_file)[names[0]])
    assert all(same(found[0], other) for other in found[1:])
    quantize(ours, LexibitConfig("kmeans", 3), progress=False)
    assert not same(found[0], codebooks(ours)[names[0]])


def test_two_importances_for_one_tied_weight_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    first, second = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    m = torch.rand(97, 24)
    quantize(tiny_model("bert-mlm"), importances={first: m, second: m.clone()}, progress=False)
    twice = {first: m, second: m + 1}
    with pytest.raises(LexibitError, match=f"{first} and {second} are one weight with two importances"):
        quantize(tiny_model("bert-mlm"), importances=twice, progress=False)
    importance.save(twice, tmp_path / "m.safetensors")
    config = LexibitConfig(importance=str(tmp_path / "m.safetensors"))
    with pytest.raises(LexibitError, match="one weight with two importances"):
        quantize(tiny_model("bert-mlm"), config, progress=False)


def test_a_file_that_no_weight_uses_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    importance.save({"1.bias": torch.ones(5)}, file)
    with pytest.raises(
        LexibitError, match=r"m\.safetensors: names only 1\.bias, and nothing of it is quantized"
    ):
        Plan.of(model(), LexibitConfig(importance=str(file)))
    importance.save(brought(), file)
    with pytest.raises(LexibitError, match="has none for 'weight': give the tensor's name there as name="):
        quantize_tensor(torch.randn(5, 6), Recipe(importance=str(file)))
    assert quantize_tensor(torch.randn(5, 6), Recipe(importance=str(file)), name="1.weight").shape == (5, 6)


@pytest.mark.parametrize("scale", [1e-300, 1e-42, 1e30, 1e200])
def test_only_the_ratios_of_importances_count(scale: float) -> None:
    w = matrix()
    m = torch.rand(12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for recipe in WEIGHING:
        expected, scaled = (
            float((m * (quantize_tensor(w, recipe, importance=given).decode() - w).square()).sum())
            for given in (m, m * scale)
        )
        assert scaled == pytest.approx(expected, rel=0.02)


def test_what_is_no_tensor_of_real_numbers_is_refused(tmp_path: Path) -> None:
    for wrong, said in (
        (np.ones((12, 30)), "ndarray"),
        ([1.0], "list"),
        (torch.ones(12, 30) * 1j, "complex64"),
    ):
        with pytest.raises(
            LexibitError, match=f"w: its importance must be a tensor of real numbers, not .*{said}"
        ):
            quantize_tensor(matrix(), importance=wrong, name="w")
        with pytest.raises(LexibitError, match="w: its importance must be a tensor"):
            importance.save({"w": wrong}, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
    shared = torch.rand(3, 4)
    importance.save({"a": shared, "b": shared}, tmp_path / "m.safetensors")
    assert torch.equal(importance.load(tmp_path / "m.safetensors")["b"], shared)


def test_a_name_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    tensors = brought() | {"1.wieght": torch.ones(5, 6)}
    importance.save(tensors, tmp_path / "m.safetensors")
    config = LexibitConfig(importance=str(tmp_path / "m.safetensors"))
    with pytest.raises(
        LexibitError, match=r"unknown weight in .*m\.safetensors '1\.wieght': did you mean '1\.weight'"
    ):
        Plan.of(model(), config)
    with pytest.raises(LexibitError, match=r"unknown weight in importances '1\.wieght'"):
        quantize(model(), importances=tensors, progress=False)


def test_importances_that_nobody_uses_are_refused() -> None:
    with pytest.raises(LexibitError, match="'lq' does not use importances"):
        quantize(model(), LexibitConfig("lq", 4), importances=brought(), progress=False)
    with pytest.raises(LexibitError, match=r"names only 0\.weight, and nothing of it is quantized"):
        quantize(
            model(), LexibitConfig(exclude=["0"]), importances={"0.weight": torch.ones(9, 6)}, progress=False
        )
    # of mixed schemes those that weigh use them
    mixed = model()
    config = LexibitConfig("kmeans", 3, rules={"0": {"scheme": "lq"}})
    quantize(mixed, config, importances=brought(), progress=False)
    assert {weight.spec.scheme for weight in codebooks(mixed).values()} == {"kmeans", "lq"}


def test_an_importance_that_is_given_twice_is_refused() -> None:
    with pytest.raises(LexibitError, match=r"w: its importance is given twice, as 'E=1' and as a tensor"):
        quantize_tensor(matrix(), Recipe(importance="E=1"), importance=matrix().abs(), name="w")


BAD = {
    "of another shape": (lambda m: m.t(), r"its importance is \[6, 5\], must be \[5, 6\]"),
    "negative": (lambda m: m - 0.5, "finite and not negative, it is as low as -0"),
    "all zero": (lambda m: m * 0, "all zero, so that no error would count: leave the weight out"),
    "NaN": (lambda m: m.index_fill(0, torch.tensor([2]), float("nan")), "NaN or infinite in 6 places"),
    "infinite": (lambda m: m / 0, "NaN or infinite in 30 places"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_importance_is_refused_and_names_its_tensor(tmp_path: Path, kind: str) -> None:
    spoil, said = BAD[kind]
    tensors = brought()
    tensors["1.weight"] = spoil(tensors["1.weight"]).contiguous()
    save_file(tensors, tmp_path / "m.safetensors")
    for scheme in ("kmeans", "linear", "mse", "binary"):
        before = model()
        with pytest.raises(LexibitError, match=rf"1\.weight: .*{said}"):
            quantize(before, LexibitConfig(scheme, 3), importances=tensors, progress=False)
        assert not codebooks(before)
        config = LexibitConfig(scheme, 3, importance=str(tmp_path / "m.safetensors"))
        with pytest.raises(LexibitError, match=rf"1\.weight: .*{said}"):
            quantize(before, config, progress=False)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of use")
    for name in ("none.safetensors", "broken.safetensors"):
        config = LexibitConfig(importance=str(tmp_path / name))
        with pytest.raises(LexibitError, match=rf"importance .*{name}: no safetensors file that can be read"):
            Plan.of(model(), config)


def test_a_row_that_counts_nothing_counts_alike() -> None:
    w, m = matrix(), torch.rand(12, 30)
    m[3] = 0
    for scheme in ("kmeans", "linear", "mse", "binary"):
        found, plain = (quantize_tensor(w, Recipe(scheme, 2, "row"), importance=given) for given in (m, None))
        torch.testing.assert_close(found.levels[3], plain.levels[3])


# squared gradients -----------------------------------------------------------------------------------


class Product(nn.Module):
    """``x W^T`` with an embedding in front, so that gradients can be had by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 3)
        self.unused = nn.Linear(5, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.dropout(self.words(ids)))


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()


def test_fisher_is_the_mean_of_squared_gradients() -> None:
    torch.manual_seed(0)
    ours = Product()
    batches = [torch.tensor([1, 2, 3]), torch.tensor([3, 3, 5]), torch.tensor([0])]
    found = importance.fisher(ours, batches, squared, progress=False)
    # by autograd's other door, one batch after the other
    ours.eval()
    weights = {"words.weight": ours.words.weight, "linear.weight": ours.linear.weight}
    expected = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in batches:
        gradients = torch.autograd.grad(squared(ours, batch), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            expected[name] += gradient.square() / 3
    assert set(found) == set(weights)  # neither biases nor what the loss does not depend on
    for name in weights:
        torch.testing.assert_close(found[name], expected[name])
    assert (found["words.weight"][6] == 0).all()  # a word that never came


def test_fisher_leaves_the_model_as_it_was() -> None:
    ours = Product().train()
    ours.dropout.eval()
    ours.linear.weight.requires_grad_(False)
    ours.words.weight.grad = torch.ones(7, 4)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    for loss in (squared, lambda model, batch: 1 / 0):
        with torch.no_grad():
            if loss is squared:
                assert importance.fisher(ours, [torch.tensor([1])], loss, progress=False)
            else:
                with pytest.raises(ZeroDivisionError):
                    importance.fisher(ours, [torch.tensor([1])], loss, progress=False)
        assert (ours.training, ours.dropout.training) == (True, False)
        assert [p.requires_grad for p in ours.parameters()] == [True, False, True, True, True]
        assert torch.equal(ours.words.weight.grad, torch.ones(7, 4))
        assert ours.linear.weight.grad is None
        assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
        squared(ours, torch.tensor([1])).backward()  # no hook of ours is left
        assert ours.words.weight.grad is not None
        ours.words.weight.grad = torch.ones(7, 4)
        ours.linear.bias.grad = None


def test_fisher_takes_the_loss_that_a_transformers_model_gives(tiny_model: Any) -> None:
    ours = tiny_model("bert-mlm")
    ids = torch.tensor([[5, 6, 7, 8]])
    found = importance.fisher(ours, [{"input_ids": ids, "labels": ids}], progress=False)
    tied = "bert.embeddings.word_embeddings.weight"
    assert tied in found
    assert "cls.predictions.decoder.weight" not in found
    # both uses of the tied weight count in one gradient
    loss = ours(input_ids=ids, labels=ids).loss
    (gradient,) = torch.autograd.grad(loss, [ours.get_parameter(tied)])
    torch.testing.assert_close(found[tied], gradient.square())
    quantize(ours, LexibitConfig("kmeans", 3), importances=found, progress=False)
    assert codebooks(ours)


def test_fisher_is_saved_and_loaded_keyed_like_the_model(tiny_model: Any, tmp_path: Path) -> None:
    ours = tiny_model("distilbert-mlm")
    ids = torch.tensor([[5, 6, 7, 8]])
    found = importance.fisher(ours, [{"input_ids": ids, "labels": ids}], progress=False)
    importance.save(found, tmp_path / "fisher.safetensors")
    assert set(load_file(tmp_path / "fisher.safetensors")) <= {name for name, _ in ours.named_parameters()}
    config = LexibitConfig("binary", 3, importance=str(tmp_path / "fisher.safetensors"))
    other = tiny_model("distilbert-mlm")
    quantize(ours, LexibitConfig("binary", 3), importances=found, progress=False)
    quantize(other, config, progress=False)
    assert all(same(weight, codebooks(other)[name]) for name, weight in codebooks(ours).items())


def test_fisher_holds_one_gradient_at_a_time() -> None:
    layers = nn.Sequential(*[nn.Linear(40, 40) for _ in range(10)])
    alive = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value = model(batch).square().sum()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.register_hook(
                    lambda grad: alive.append(sum(p.grad is not None for p in model.parameters()))
                )
        return value

    importance.fisher(layers, [torch.randn(3, 40)], loss, progress=False)
    assert len(alive) == 10
    assert max(alive) == 0  # when a gradient comes, no other is kept


def test_fisher_does_not_grow_with_the_batches() -> None:
    layers = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))

    def peak(batches: int) -> int:
        gc.collect()
        tracemalloc.start()
        importance.fisher(layers, (torch.randn(2, 50) for _ in range(batches)), squared, progress=False)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(2)
    assert peak(200) < 2 * peak(2) + 100_000


def test_what_fisher_cannot_use_is_refused(tiny_model: Any) -> None:
    ours = Product()
    with pytest.raises(LexibitError, match="no batch to gather gradients from"):
        importance.fisher(ours, [], squared, progress=False)
    with pytest.raises(LexibitError, match="must be a tensor of one number"):
        importance.fisher(ours, [torch.tensor([1])], lambda model, batch: model(batch), progress=False)
    with pytest.raises(LexibitError, match="must be a tensor of one number that depends"):
        importance.fisher(ours, [torch.tensor([1])], lambda model, batch: torch.tensor(1.0), progress=False)
    losses = iter([1.0, float("nan")])

    def spoiled(model: nn.Module, batch: Tensor) -> Tensor:
        return squared(model, batch) * next(losses)

    with pytest.raises(LexibitError, match="loss of batch 1 is nan"):
        importance.fisher(ours, [torch.tensor([1])] * 2, spoiled, progress=False)
    with pytest.raises(LexibitError, match="BertModel gave no loss: put labels in the batches"):
        importance.fisher(tiny_model("bert"), [{"input_ids": torch.tensor([[5]])}], progress=False)
    for config in (LexibitConfig(), LexibitConfig(exclude=["1"])):
        packed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        quantize(packed, config, progress=False)
        with pytest.raises(LexibitError, match="is not a float model: gather from the float model"):
            importance.fisher(packed, [torch.randn(1, 4)], squared, progress=False)


def test_a_gradient_that_is_not_finite_is_refused_and_named() -> None:
    linear = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(linear.weight)
    with pytest.raises(LexibitError, match="weight: some of its gradients are NaN or infinite"):
        importance.fisher(
            linear, [torch.ones(1, 3)], lambda model, batch: model(batch).sqrt().sum(), progress=False
        )
