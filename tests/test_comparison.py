"""The comparison of schemes: what its lines say, and that they say it of what was really quantized."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lexibit import (
    LexibitConfig,
    LexibitError,
    Recipe,
    Reference,
    compare_schemes,
    quantize,
    quantize_tensor,
    tasks,
)
from lexibit.comparison import ALL, CONTENDERS
from lexibit.importance import save
from lexibit.nn import codebooks

TEXTS = ["w5 w6 w7", "w20 w21 w22 w23 w24", "w90 w7"]


def wide() -> nn.Sequential:
    """Matrices wide enough for groups of several sizes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(150, 96), nn.Linear(96, 200), nn.Linear(200, 64))


@pytest.fixture(scope="module")
def own() -> Any:
    return compare_schemes(wide(), (2, 3), equal=False, levels_dtype="float32", progress=False)


@pytest.fixture(scope="module")
def equal() -> Any:
    return compare_schemes(wide(), (2, 3, 4), overhead=0.1, progress=False)


def test_there_is_a_line_for_every_scheme_width_and_kind(own: Any, equal: Any) -> None:
    for found, widths, lines in ((own, 2, 16), (equal, 3, len(CONTENDERS))):
        assert len(found) == widths * lines * 3
        assert set(found["kind"]) == {"embedding", "linear", ALL}
        assert set(found["scheme"]) == {"linear", "kmeans", "lq", "aciq", "mse", "kl", "ocs", "binary"}
        assert not found.duplicated(["bits", "kind", "name", "groups"]).any()
    assert len(CONTENDERS) == 14


@pytest.mark.parametrize("name", [contender.name for contender in CONTENDERS])
def test_a_line_tells_of_the_weights_as_they_were_quantized(own: Any, name: str) -> None:
    for _, line in own[(own["name"] == name) & (own["kind"] == "linear")].iterrows():
        recipe = Recipe(line["scheme"], line["bits"], line["groups"], json.loads(line["options"]))
        squared = total = scale = count = 0.0
        weights = []
        for module in list(wide())[1:]:
            weight = quantize_tensor(module.weight, recipe)
            weights.append(weight)
            w = module.weight.detach().double()
            squared += float((weight.decode().double() - w).square().sum())
            total += float(w.square().sum())
            if weight.spec.form.value != "table":
                scales = weight.levels if weight.spec.form.value == "binary" else weight.levels[:, 0]
                scale, count = scale + float(scales.double().abs().sum()), count + scales.numel()
        numbers = 96 * 200 + 200 * 64
        assert line["weights"] == numbers
        assert line["bytes"] == sum(weight.nbytes for weight in weights)
        assert line["stored_bits"] == pytest.approx(8 * line["bytes"] / numbers)
        assert line["mse"] == pytest.approx(squared / numbers, rel=1e-6)
        assert line["relative_error"] == pytest.approx(squared / total, rel=1e-6)
        assert line["group_size"] == pytest.approx(
            numbers / sum(weight.spec.groups.count for weight in weights)
        )
        if count:
            assert line["mean_scale"] == pytest.approx(scale / count, rel=1e-6)
        else:
            assert math.isnan(line["mean_scale"])


def test_all_together_is_the_sum_of_the_kinds(own: Any) -> None:
    for _, lines in own.groupby(["bits", "name", "groups"]):
        whole, parts = lines[lines["kind"] == ALL], lines[lines["kind"] != ALL]
        assert whole["bytes"].item() == parts["bytes"].sum()
        assert whole["weights"].item() == parts["weights"].sum()
        squared = (parts["mse"] * parts["weights"]).sum()
        assert whole["mse"].item() == pytest.approx(squared / parts["weights"].sum())
        assert whole["seconds"].item() > 0


def test_equal_bits_are_never_above_the_budget_and_near_it(equal: Any) -> None:
    assert (equal["stored_bits"] <= equal["bits"] * 1.1).all()
    # less than half of what lies above the codes may be left over
    assert (equal["stored_bits"] > equal["bits"] * 1.05).all()


def test_a_larger_budget_is_spent_and_lowers_the_error(equal: Any) -> None:
    poor = compare_schemes(wide(), (3,), overhead=0.01, schemes=["kmeans", "binary", "ocs"], progress=False)
    for _, line in poor[poor["kind"] == ALL].iterrows():
        rich = equal[(equal["kind"] == ALL) & (equal["bits"] == 3) & (equal["name"] == line["name"])]
        assert rich["stored_bits"].item() > line["stored_bits"]
        if line["name"] != "k-means, paper's recipe":  # which depends on its draws
            assert rich["mse"].item() < line["mse"] * 1.001


def test_no_budget_beyond_the_codes_is_a_set_of_levels_a_matrix() -> None:
    found = compare_schemes(wide(), (3,), overhead=0.0, schemes=["kmeans", "lq"], progress=False)
    linear = found[found["kind"] == "linear"]
    assert (linear["group_size"] == (96 * 200 + 200 * 64) / 2).all()


def test_a_width_that_a_scheme_cannot_have_has_no_line_for_it() -> None:
    found = compare_schemes(wide(), (1,), progress=False)
    names = set(found["name"])
    assert {"linear", "k-means", "alternating codes", "min-max, affine"} <= names
    assert not {"LQ", "ACIQ", "OCS"} & names


def test_widths_that_no_scheme_can_have_are_refused() -> None:
    with pytest.raises(LexibitError, match="none of the schemes works with bits 1: choose more bits"):
        compare_schemes(wide(), (1,), schemes=["ocs"], progress=False)


def test_the_config_of_a_line_quantizes_the_model_as_it_was(equal: Any, own: Any) -> None:
    for found in (equal, own):
        assert found[found["kind"] != ALL]["config"].isna().all()
        for _, line in found[(found["kind"] == ALL) & (found["bits"] == 3)].iterrows():
            model = wide()
            quantize(model, LexibitConfig(**json.loads(line["config"])), progress=False)
            packed = codebooks(model)
            assert sum(weight.nbytes for weight in packed.values()) == line["bytes"]
            before = dict(wide().named_parameters())
            squared = sum(
                float((weight.decode() - before[name]).detach().double().square().sum())
                for name, weight in packed.items()
            )
            assert squared / line["weights"] == pytest.approx(line["mse"], rel=1e-6), line["name"]


def test_importance_goes_to_the_schemes_that_weigh() -> None:
    schemes = ["lq", "mse", "binary"]
    plain, weighted = (
        compare_schemes(wide(), (3,), schemes=schemes, importance=importance, progress=False)
        for importance in (None, "E=1")
    )
    differ = (plain["mse"] != weighted["mse"])[plain["kind"] == ALL].tolist()
    names = plain[plain["kind"] == ALL]["name"].tolist()
    assert {name for name, other in zip(names, differ, strict=True) if not other} == {"LQ", "min-max, affine"}


def test_outputs_are_those_with_this_kind_quantized_and_no_other(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model("bert")
    before = {name: p.clone() for name, p in model.named_parameters()}
    reference = Reference(model, tiny_tokenizer(), TEXTS)
    found = compare_schemes(model, (3,), equal=False, schemes=["lq"], reference=reference, progress=False)
    assert not codebooks(model)
    assert [name for name, _ in model.named_parameters()] == list(before)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    line = found[(found["name"] == "LQ")].set_index("kind")
    for kind, options in (
        ("embedding", {"include": ["embeddings.*"]}),
        ("linear", {"exclude": ["embeddings.*"]}),
        (ALL, {}),
    ):
        alone = tiny_model("bert")
        quantize(alone, LexibitConfig("lq", 3, levels_dtype="float16", **options), progress=False)
        fidelity = reference.fidelity(alone)
        assert line.loc[kind, "cosine"] == pytest.approx(fidelity.cosine, rel=1e-5)
        assert line.loc[kind, "output_error"] == pytest.approx(fidelity.relative, rel=1e-4)


def test_a_score_stands_in_the_line_of_all_and_the_float_models_comes_first(tiny_model: Any) -> None:
    def score(model: nn.Module) -> tasks.Score:
        value = 80.0 - len(codebooks(model))
        return tasks.Score("points", value, value - 1, value + 1, 7, 0, 0.0)

    model = tiny_model("bert")
    found = compare_schemes(model, (3,), schemes=["lq", "binary"], score=score, progress=False)
    first, rest = found.iloc[0], found.iloc[1:]
    assert (first["name"], first["bits"], first["score"], first["examples"]) == ("float32", 32, 80.0, 7)
    matrices = sum(p.dim() == 2 for p in model.parameters())
    assert (rest[rest["kind"] == ALL]["score"] == 80.0 - matrices).all()
    assert (rest[rest["kind"] == ALL]["score_low"] == 79.0 - matrices).all()
    assert rest[rest["kind"] != ALL]["score"].isna().all()


def test_tensors_of_a_file_are_compared_by_error_and_size() -> None:
    tensors = {name: p.detach() for name, p in wide().named_parameters()}
    found = compare_schemes(tensors, (3,), schemes=["kmeans"], progress=False)
    of_model = compare_schemes(wide(), (3,), schemes=["kmeans"], progress=False)
    # without a model the embedding is a matrix like any other
    assert set(found["kind"]) == {ALL}
    assert found["mse"].tolist() == of_model[of_model["kind"] == ALL]["mse"].tolist()
    assert "cosine" not in found


def test_conv1d_is_split_along_its_rows(tiny_model: Any) -> None:
    found = compare_schemes(tiny_model("gpt2"), (4,), overhead=0.2, schemes=["ocs", "lq"], progress=False)
    conv = found[found["kind"] == "conv1d"]
    assert (conv["stored_bits"] <= 4 * 1.2).all()
    ocs = conv[conv["name"] == "OCS"]
    assert ocs["stored_bits"].item() > 4.2


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(LexibitError, match="unknown scheme to compare 'kmean': did you mean 'kmeans'"):
        compare_schemes(wide(), schemes=["kmean"], progress=False)
    with pytest.raises(LexibitError, match="no scheme to compare: name some of aciq, binary"):
        compare_schemes(wide(), schemes=[], progress=False)
    for bits in (0, 9, 2.5, True, "3"):
        with pytest.raises(LexibitError, match="bits must be whole numbers from 1 to 8"):
            compare_schemes(wide(), (bits,), progress=False)
    for overhead in (-0.1, 2, float("nan")):
        with pytest.raises(LexibitError, match="overhead must be from 0 to 1"):
            compare_schemes(wide(), overhead=overhead, progress=False)
    with pytest.raises(LexibitError, match="nothing to quantize"):
        compare_schemes(nn.Sequential(nn.ReLU()), progress=False)
    with pytest.raises(LexibitError, match="need a model of transformers"):
        compare_schemes(wide(), score=lambda model: None, progress=False)
    packed = wide()
    quantize(packed, progress=False)
    with pytest.raises(LexibitError, match="quantized already"):
        compare_schemes(packed, progress=False)


def test_an_importance_that_is_wrong_or_not_used_is_refused(tmp_path: Path) -> None:
    save({"bert.1.weight": torch.ones(200, 96)}, tmp_path / "other.safetensors")
    with pytest.raises(LexibitError, match=r"none of its names is in this model, which has 0\.weight"):
        compare_schemes(wide(), importance=str(tmp_path / "other.safetensors"), progress=False)
    save({"1.wieght": torch.ones(200, 96), "2.weight": torch.ones(64, 200)}, tmp_path / "m.safetensors")
    file = str(tmp_path / "m.safetensors")
    with pytest.raises(LexibitError, match=r"m\.safetensors '1\.wieght': did you mean '1\.weight'"):
        compare_schemes(wide(), importance=file, progress=False)
    with pytest.raises(LexibitError, match="'lq' does not use importances"):
        compare_schemes(wide(), schemes=["lq"], importance="E=1", progress=False)
    with pytest.raises(LexibitError, match="unknown importance setting"):
        compare_schemes(wide(), importance="nonsense", progress=False)
    with pytest.raises(
        LexibitError, match="a mask takes a bit a weight, which an equal budget does not have"
    ):
        compare_schemes(wide(), importance="P=0.1,mask", progress=False)
    found = compare_schemes(
        wide(),
        (3,),
        equal=False,
        schemes=["binary"],
        importance="P=0.1,mask",
        levels_dtype="float32",
        progress=False,
    )
    assert (found["stored_bits"] > 4).all()


def test_empty_weights_and_tiny_ones_are_taken() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(3, 700))
    model[0].weight = nn.Parameter(torch.empty(5, 0))
    found = compare_schemes(model, (3,), progress=False)
    assert found["mse"].notna().all()
