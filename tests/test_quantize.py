"""Whole models into codes in place, all or nothing, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lexibit import CodebookWeight, LexibitConfig, LexibitError, Plan, dequantize, quantize, quantize_tensor
from lexibit.nn import Quantized, codebooks

Tiny = Callable[..., Any]

LINEAR = LexibitConfig(scheme="linear", bits=3)
MODELS = [
    "bert",
    "bert-mlm",
    "bert-classifier",
    "albert-mlm",
    "distilbert-mlm",
    "roberta-qa",
    "gpt2",
    "llama",
]


def run(model: nn.Module) -> torch.Tensor:
    ids = torch.tensor([[5, 17, 29, 8], [60, 3, 3, 96]])
    with torch.no_grad():
        return model(input_ids=ids)[0]


def quantized_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Quantized)]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs_from_codes_as_it_runs_from_the_decoded_weights(tiny_model: Tiny, name: str) -> None:
    model = tiny_model(name)
    classes = [type(module) for module in model.modules()]
    floats, before = copy.deepcopy(model), run(model)

    plan = quantize(model, LINEAR, progress=False)

    assert isinstance(plan, Plan)
    assert set(codebooks(model)) >= {weight.name for weight in plan.weights}
    for weight in plan.weights:
        for use in weight.uses:
            assert isinstance(use.module, Quantized)
            expected = quantize_tensor(floats.get_parameter(use.name), weight.recipe)
            assert torch.equal(getattr(use.module, use.parameter), expected.decode())
    after = run(model)
    assert after.shape == before.shape
    assert not torch.equal(after, before)
    assert after.isfinite().all()

    dequantize(model)
    assert quantized_modules(model) == []
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model), after)
    for name, parameter in model.named_parameters():
        assert parameter.shape == floats.get_parameter(name).shape


def test_the_plan_that_is_returned_is_the_plan(tiny_model: Tiny) -> None:
    expected = Plan.of(tiny_model("bert"), LINEAR).to_dict()
    assert quantize(tiny_model("bert"), LINEAR, progress=False).to_dict() == expected


def test_what_is_not_planned_is_not_touched(tiny_model: Tiny) -> None:
    model = tiny_model("bert-classifier")
    before = {name: parameter for name, parameter in model.named_parameters()}
    plan = quantize(model, LINEAR, progress=False)
    assert len(plan.weights) > 0
    for kept in plan.kept:
        assert model.get_parameter(kept.name) is before[kept.name]
    assert {name for name, _ in model.named_parameters()} == {kept.name for kept in plan.kept}


def test_the_default_is_kmeans_with_four_bits(tiny_model: Tiny) -> None:
    plan = quantize(nn.Sequential(nn.Linear(6, 5)), progress=False)
    assert (plan.weights[0].spec.scheme, plan.weights[0].spec.bits) == ("kmeans", 4)


def test_a_single_layer_is_a_model_too() -> None:
    linear = nn.Linear(6, 5)
    plan = quantize(linear, LINEAR, progress=False)
    assert isinstance(linear, Quantized)
    assert [weight.name for weight in plan.weights] == ["weight"]


def test_more_bits_bring_a_model_nearer_to_the_float_one(tiny_model: Tiny) -> None:
    expected = run(tiny_model("bert"))
    errors = []
    for bits in (2, 4, 8):
        model = tiny_model("bert")
        quantize(model, LexibitConfig(scheme="linear", bits=bits), progress=False)
        assert quantized_modules(model)
        errors.append(float((run(model) - expected).square().mean()))
    assert errors[0] > errors[1] > errors[2] > 0


def test_progress_is_drawn_on_the_terminal_and_not_in_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    quantize(nn.Sequential(nn.Linear(6, 5)), LINEAR, progress=False)
    assert capsys.readouterr() == ("", "")
    quantize(nn.Sequential(nn.Linear(6, 5)), LINEAR)
    assert capsys.readouterr().out == ""


# identity --------------------------------------------------------------------------------------


def test_tied_weights_share_one_weight_in_codes(tiny_model: Tiny) -> None:
    model = tiny_model("bert-mlm")
    quantize(model, LINEAR, progress=False)
    words, decoder = model.bert.embeddings.word_embeddings, model.cls.predictions.decoder
    assert isinstance(words, Quantized)
    assert isinstance(decoder, Quantized)
    assert words.weight_codebook is decoder.weight_codebook

    dequantize(model)
    assert isinstance(words.weight, nn.Parameter)
    assert words.weight is decoder.weight


def test_a_deep_copy_keeps_ties_and_results(tiny_model: Tiny) -> None:
    model = tiny_model("bert-mlm")
    quantize(model, LINEAR, progress=False)
    other = copy.deepcopy(model)
    words, decoder = other.bert.embeddings.word_embeddings, other.cls.predictions.decoder
    assert isinstance(words, Quantized)
    assert words.weight_codebook is decoder.weight_codebook
    assert words.weight_codebook is not model.bert.embeddings.word_embeddings.weight_codebook
    expected = run(model)
    assert torch.equal(run(other), expected)
    words.weight_codebook.levels.zero_()
    assert not torch.equal(run(other), expected)
    assert torch.equal(run(model), expected)


def test_tying_again_changes_nothing(tiny_model: Tiny) -> None:
    model = tiny_model("bert-mlm")
    quantize(model, LINEAR, progress=False)
    expected = run(model)
    model.tie_weights()
    assert torch.equal(run(model), expected)
    words, decoder = model.bert.embeddings.word_embeddings, model.cls.predictions.decoder
    assert words.weight_codebook is decoder.weight_codebook
    assert all(parameter.dim() < 2 for parameter in (*words.parameters(), *decoder.parameters()))
    assert not any(isinstance(v, torch.Tensor) for module in model.modules() for v in vars(module).values())


@pytest.mark.usefixtures("exact")
def test_a_module_used_in_two_places_is_quantized_once() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 2))
    plan = quantize(model, LINEAR, progress=False)
    assert len(plan.weights) == len(codebooks(model)) == 2
    assert model[0] is model[2] is shared
    x = torch.randn(3, 6)
    expected = model(x)
    dequantize(model)
    assert model[0] is model[2] is shared
    assert type(shared) is nn.Linear
    assert torch.equal(model(x), expected)


def test_a_state_dict_is_loaded_into_a_model_quantized_the_same_way(tiny_model: Tiny) -> None:
    source, target = tiny_model("bert-mlm", seed=1), tiny_model("bert-mlm", seed=2)
    for model in (source, target):
        quantize(model, LINEAR, progress=False)
    assert not torch.equal(run(source), run(target))
    result = target.load_state_dict(source.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(run(source), run(target))


# all or nothing --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", range(4))
def test_a_failure_leaves_the_model_as_it_was(bad: int) -> None:
    model = nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 20), nn.LSTM(20, 7), nn.Linear(7, 2))
    parameter = [p for p in model.parameters() if p.dim() > 1][bad if bad < 3 else -1]
    with torch.no_grad():
        parameter[-1, -1] = float("nan")
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    classes = [type(module) for module in model.modules()]

    with pytest.raises(LexibitError, match="NaN or infinite"):
        quantize(model, LINEAR, progress=False)

    assert [type(module) for module in model.modules()] == classes
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, p in model.named_parameters():
        assert p is before[name]
        assert torch.equal(p.nan_to_num(), values[name].nan_to_num())
    assert not any(isinstance(module, CodebookWeight) for module in model.modules())

    with torch.no_grad():
        parameter[-1, -1] = 0
    assert quantize(model, LINEAR, progress=False).weights
    assert quantized_modules(model)


def test_a_failure_names_the_tensor(tiny_model: Tiny) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[2, 3] = float("inf")
    with pytest.raises(
        LexibitError, match=r"encoder\.layer\.1\.output\.dense\.weight: 1 of .* row 2, column 3"
    ):
        quantize(model, LINEAR, progress=False)
    assert quantized_modules(model) == []
    assert not getattr(model, "is_quantized", False)


def test_a_model_is_not_quantized_twice(tiny_model: Tiny) -> None:
    model = tiny_model("bert")
    quantize(model, LINEAR, progress=False)
    expected = run(model)
    with pytest.raises(LexibitError, match="quantized already"):
        quantize(model, LexibitConfig(scheme="linear", bits=2), progress=False)
    assert torch.equal(run(model), expected)


def test_a_model_that_was_dequantized_can_be_quantized_anew(tiny_model: Tiny) -> None:
    model = tiny_model("bert")
    quantize(model, LexibitConfig(scheme="linear", bits=8), progress=False)
    dequantize(model)
    plan = quantize(model, LexibitConfig(scheme="lq", bits=2), progress=False)
    assert {weight.spec.scheme for weight in codebooks(model).values()} == {"lq"}
    assert len(plan.weights) == len(codebooks(model))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (nn.Sequential(nn.LayerNorm(4)), {}),
        (nn.Sequential(nn.Embedding(3, 4)), {"embeddings": False}),
        (nn.Sequential(nn.Linear(3, 4)), {"exclude": ["*"]}),
    ],
    ids=["norm", "embedding", "excluded"],
)
def test_a_model_in_which_nothing_is_quantized_is_refused(model: nn.Module, options: dict[str, Any]) -> None:
    with pytest.raises(LexibitError, match="nothing to quantize in Sequential"):
        quantize(model, LexibitConfig(**options), progress=False)


def test_a_model_without_weights_in_memory_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    with pytest.raises(LexibitError, match="meta"):
        quantize(model, LINEAR, progress=False)
    assert type(model[0]) is nn.Linear


# and back --------------------------------------------------------------------------------------


def test_dequantizing_brings_back_the_state_dict_of_the_float_model(tiny_model: Tiny) -> None:
    model = tiny_model("bert-mlm")
    before = {key: tensor.shape for key, tensor in model.state_dict().items()}
    quantize(model, LINEAR, progress=False)
    assert {key for key in model.state_dict() if key.endswith("_levels")}
    dequantize(model)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == before
    tiny_model("bert-mlm", seed=3).load_state_dict(model.state_dict())


def test_dequantized_weights_can_be_trained(tiny_model: Tiny) -> None:
    model = tiny_model("bert")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    quantize(model, LINEAR, progress=False)
    dequantize(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model(input_ids=torch.tensor([[5, 6]]))[0].square().sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def test_a_quantized_model_passes_gradients_to_what_stays_float(tiny_model: Tiny) -> None:
    model = tiny_model("bert")
    floats = copy.deepcopy(model)
    quantize(model, LINEAR, progress=False)
    assert quantized_modules(model)
    with torch.no_grad():
        for name, parameter in floats.named_parameters():
            owner, _, last = name.rpartition(".")
            parameter.copy_(getattr(model.get_submodule(owner), last))
    for one in (model, floats):
        one(input_ids=torch.tensor([[5, 6, 7]]))[0].square().sum().backward()
    norm, float_norm = (m.encoder.layer[0].output.LayerNorm.weight.grad for m in (model, floats))
    assert norm.abs().sum() > 0
    torch.testing.assert_close(norm, float_norm, rtol=1e-4, atol=1e-4)
