"""Which weights are quantized, and why the others are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lexibit import LexibitConfig, LexibitError, Plan, quantize
from lexibit.nn import Quantized, codebooks

Tiny = Callable[..., Any]


def planned(model: nn.Module, **options: Any) -> Plan:
    return Plan.of(model, LexibitConfig(**options))


def names(plan: Plan) -> list[str]:
    return [weight.name for weight in plan.weights]


def reasons(plan: Plan) -> dict[str, str]:
    return {kept.name: kept.reason for kept in plan.kept}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 5)
        self.conv = Conv1D(4, 5)
        self.lstm = nn.LSTM(4, 3)
        self.norm = nn.LayerNorm(3)
        self.table = nn.Parameter(torch.randn(3, 2))
        self.classifier = nn.Linear(3, 2)


# what is there ---------------------------------------------------------------------------------


def test_every_parameter_is_planned_or_kept_with_a_reason_once() -> None:
    model = Small()
    plan = planned(model)
    assert names(plan) == [
        "words.weight",
        "body.weight",
        "conv.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
    ]
    assert sorted(names(plan) + list(reasons(plan))) == sorted(name for name, _ in model.named_parameters())
    assert reasons(plan)["norm.weight"] == "1 axis: not a matrix"
    assert "bare parameter" in reasons(plan)["table"]
    assert "task head" in reasons(plan)["classifier.weight"]
    kinds = {weight.name: weight.kind for weight in plan.weights}
    assert kinds["words.weight"] == "embedding"
    assert kinds["body.weight"] == "linear"
    assert kinds["conv.weight"] == "conv1d"
    assert kinds["lstm.weight_ih_l0"] == kinds["lstm.weight_hh_l0"] == "recurrent"


def test_tied_weights_are_one_entry_with_all_their_names(tiny_model: Tiny) -> None:
    model = tiny_model("bert-mlm")
    words = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is words
    plan = planned(model)
    entry = next(w for w in plan.weights if w.name == "bert.embeddings.word_embeddings.weight")
    assert {use.name for use in entry.uses} == {
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
    }
    assert entry.kind == "embedding+linear"
    assert "cls.predictions.decoder.weight" not in names(plan)
    assert entry.bytes_before == words.numel() * 4
    unique = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    assert plan.bytes_before == sum(unique.values())


def test_a_tie_that_transformers_does_not_know_is_one_entry_too() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False))
    model[1].weight = model[0].weight
    plan = planned(model)
    assert names(plan) == ["0.weight"]
    assert [use.name for use in plan.weights[0].uses] == ["0.weight", "1.weight"]


def test_shared_layers_are_planned_once(tiny_model: Tiny) -> None:
    one, many = (tiny_model("albert-mlm", num_hidden_layers=n) for n in (1, 6))
    assert names(planned(one)) == names(planned(many))
    assert sum("ffn.weight" in name for name in names(planned(many))) == 1


def test_a_layer_under_two_names_can_be_called_by_either() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(4, 4)
    for pattern in ("a", "b"):
        plan = planned(model, exclude=[pattern])
        assert names(plan) == []
        assert "excluded by pattern" in reasons(plan).values()


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("bert-classifier", ["classifier"]),
        ("distilbert-classifier", ["pre_classifier", "classifier"]),
        ("roberta-qa", ["qa_outputs"]),
        ("gpt2-classifier", ["score"]),
    ],
)
def test_task_heads_stay_as_they_are_unless_asked_for(tiny_model: Tiny, name: str, heads: list[str]) -> None:
    model = tiny_model(name)
    before = {head: model.get_submodule(head).weight.detach().clone() for head in heads}
    plan = quantize(model, LexibitConfig(scheme="linear"), progress=False)
    assert len(plan.weights) > 5
    for head in heads:
        module = model.get_submodule(head)
        assert "task head" in reasons(plan)[f"{head}.weight"]
        assert type(module) is nn.Linear
        assert torch.equal(module.weight, before[head])

    model = tiny_model(name)
    plan = quantize(model, LexibitConfig(scheme="linear", heads=True), progress=False)
    for head in heads:
        assert f"{head}.weight" in names(plan)
        assert isinstance(model.get_submodule(head), Quantized)


def test_an_output_layer_tied_to_embeddings_is_no_head() -> None:
    model = nn.Module()
    model.words, model.classifier = nn.Embedding(9, 6), nn.Linear(6, 9)
    model.classifier.weight = model.words.weight
    assert names(planned(model)) == ["words.weight"]


# the options -----------------------------------------------------------------------------------


def test_embeddings_can_be_left_out(tiny_model: Tiny) -> None:
    model = tiny_model("bert-mlm")
    without = planned(model, embeddings=False)
    assert {weight.kind for weight in planned(model).weights} == {"linear", "embedding", "embedding+linear"}
    assert {weight.kind for weight in without.weights} == {"linear"}
    # the decoder is tied to them and stays with them
    assert reasons(without)["bert.embeddings.word_embeddings.weight"] == "embedding (embeddings=False)"


def test_patterns_are_matched_with_and_without_the_last_part_of_a_name() -> None:
    for pattern in ("body", "body.weight", "b*y", "b?dy.*", "[ab]ody"):
        plan = planned(Small(), include=[pattern])
        assert names(plan) == ["body.weight"]
        assert reasons(plan)["conv.weight"] == "not in the include patterns"


def test_exclude_wins_over_everything() -> None:
    plan = planned(Small(), include=["*"], parameters=["*"], heads=True, exclude=["body", "table", "lstm*"])
    assert set(names(plan)) == {"words.weight", "conv.weight", "classifier.weight"}
    assert reasons(plan)["body.weight"] == reasons(plan)["table"] == "excluded by pattern"


def test_a_pattern_for_one_name_of_a_tied_weight_is_for_the_weight() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9), nn.Linear(9, 9))
    model[1].weight = model[0].weight
    assert names(planned(model, exclude=["1"])) == ["2.weight"]
    assert names(planned(model, include=["1"])) == ["0.weight"]
    plan = planned(model, rules={"1": {"bits": 7}})
    assert {weight.name: weight.spec.bits for weight in plan.weights} == {"0.weight": 7, "2.weight": 4}


def test_bare_parameters_are_quantized_when_asked_for() -> None:
    plan = planned(Small(), parameters=["table"])
    assert "table" in names(plan)
    assert next(weight for weight in plan.weights if weight.name == "table").kind == "parameter"
    assert "body.weight" in names(plan)


def test_rules_change_the_recipe_and_the_later_counts() -> None:
    plan = planned(
        Small(),
        bits=2,
        rules={"*": {"bits": 3}, "body": {"scheme": "lq", "groups": "row"}, "b*": {"bits": 5}},
    )
    found = {weight.name: weight for weight in plan.weights}
    assert (found["conv.weight"].spec.bits, found["conv.weight"].spec.scheme) == (3, "kmeans")
    body = found["body.weight"]
    assert (body.spec.bits, body.spec.scheme, body.spec.block) == (5, "lq", (1, 6))
    assert (body.recipe.groups, body.spec.form.value) == ("row", "symmetric")


@pytest.mark.parametrize("option", ["include", "exclude", "parameters", "rules"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(option: str) -> None:
    value = {"*.bodi": {"bits": 3}} if option == "rules" else ["*.bodi"]
    with pytest.raises(
        LexibitError, match=rf"{option}: the pattern '\*\.bodi' matches no parameter.*body\.weight"
    ):
        planned(Small(), **{option: value})


def test_a_recipe_that_rules_make_together_is_checked() -> None:
    with pytest.raises(LexibitError, match="'lq' works with 2 to 8 bits, not 1"):
        planned(Small(), rules={"b*": {"bits": 1}, "body": {"scheme": "lq", "bits": 2}, "*y": {"bits": 1}})


# what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(("inside", "outside"), [(4, 6), (5, 5)])
def test_memory_shared_in_another_layout_is_kept_with_the_reason(inside: int, outside: int) -> None:
    model = nn.Sequential(nn.Linear(inside, outside), nn.Linear(outside, inside), nn.Linear(inside, 4))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    plan = planned(model)
    assert names(plan) == ["2.weight"]
    assert reasons(plan)["0.weight"] == "shares its memory in another layout with 1.weight"
    assert reasons(plan)["1.weight"] == "shares its memory in another layout with 0.weight"


def test_equal_values_in_memory_of_their_own_are_two_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    assert names(planned(model)) == ["0.weight", "1.weight"]


def test_whole_numbers_and_vectors_are_kept_with_the_reason() -> None:
    model = Small()
    model.counts = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    model.scalar = nn.Parameter(torch.zeros(()))
    plan = planned(model, parameters=["*"])
    assert reasons(plan)["counts"] == "torch.int8: not floating point"
    assert reasons(plan)["scalar"] == "0 axis: not a matrix"
    assert reasons(plan)["body.bias"] == "1 axis: not a matrix"


def test_an_embedding_that_renormalises_its_rows_is_kept() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, 6))
    plan = planned(model)
    assert names(plan) == ["1.weight"]
    assert "max_norm" in reasons(plan)["0.weight"]


# sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"scheme": "linear", "bits": 2, "groups": "columns:5", "levels_dtype": "float16"},
        {"scheme": "lq", "groups": "row", "heads": True, "rules": {"*.query": {"bits": 8}}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert-classifier", "albert-mlm", "gpt2", "marian"])
def test_the_bytes_after_are_the_bytes_really_stored(tiny_model: Tiny, name: str, options: Any) -> None:
    model = tiny_model(name)
    if name != "bert-classifier":
        options = {option: value for option, value in options.items() if option != "rules"}
    plan = planned(model, **options)
    assert plan.bytes_before == sum(p.numel() * p.element_size() for p in model.parameters())
    done = quantize(model, LexibitConfig(**options), progress=False)
    assert done.to_dict() == plan.to_dict()
    weights = codebooks(model)
    assert len(weights) == len(plan.weights) > 0
    stored = [t for name, weight in weights.items() for t in weight.tensors(name).values()]
    stored += list(model.parameters())
    assert plan.bytes_after == sum(t.numel() * t.element_size() for t in stored) < plan.bytes_before


def test_the_share_covered_and_the_bits_a_weight_are_those_of_the_bytes() -> None:
    # 54 + 30 + 20 + 48 + 36 weights in codes, 5 + 4 + 24 + 6 + 6 + 8 numbers kept
    plan = planned(Small(), scheme="lq", bits=4, groups="matrix")
    assert plan.bytes_before == 4 * (188 + 53)
    assert plan.covered == pytest.approx(188 / 241)
    stored = (27 + 15 + 10 + 24 + 18) + 5 * 4
    assert plan.bits_per_weight == pytest.approx(8 * stored / 188)
    assert plan.bytes_after == stored + 4 * 53


def test_a_plan_is_plain_json() -> None:
    plan = planned(Small(), options={"init": "optimal"}, rules={"body": {"groups": "rows:2"}})
    record = json.loads(json.dumps(plan.to_dict()))
    body = next(weight for weight in record["weights"] if weight["name"] == "body.weight")
    assert body["block"] == [2, 6]
    assert body["groups"] == "rows:2"
    assert body["options"] == {"init": "optimal"}
    assert body["aliases"] == []
    assert body["bytes_before"] == 120
    assert record["covered"] == plan.covered
    assert [kept["name"] for kept in record["kept"]] == list(reasons(plan))


def test_a_model_without_parameters_has_an_empty_plan() -> None:
    plan = planned(nn.Sequential(nn.ReLU()))
    assert (plan.weights, plan.kept) == ([], [])
    assert (plan.bytes_before, plan.bytes_after, plan.covered, plan.bits_per_weight) == (0, 0, 0.0, 0.0)


# without the weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-mlm", "albert-mlm", "gpt2", "distilbert-classifier", "llama-tied"])
def test_a_model_on_the_meta_device_has_the_same_plan(tiny_model: Tiny, name: str) -> None:
    model = tiny_model(name)
    with torch.device("meta"):
        meta = type(model)(model.config)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert len(planned(model).weights) > 3
    assert planned(meta).to_dict() == planned(model).to_dict()


def test_a_file_is_planned_by_its_names() -> None:
    tensors = {
        "encoder.embeddings.word.weight": torch.zeros(9, 6),
        "encoder.key.weight": torch.zeros(6, 6, dtype=torch.float16),
        "encoder.key.bias": torch.zeros(6),
        "encoder.table": torch.zeros(2, 6),
        "classifier.weight": torch.zeros(2, 6),
        "lstm.weight_ih_l0": torch.zeros(8, 6),
        "position_ids": torch.zeros(1, 9, dtype=torch.int64),
    }
    plan = Plan.of_tensors(tensors, LexibitConfig(bits=3))
    assert {weight.name: weight.kind for weight in plan.weights} == {
        "encoder.embeddings.word.weight": "embedding",
        "encoder.key.weight": "linear",
        "lstm.weight_ih_l0": "linear",
    }
    assert {weight.name: weight.spec.dtype for weight in plan.weights}["encoder.key.weight"] == "float16"
    assert reasons(plan)["encoder.key.bias"] == "1 axis: not a matrix"
    assert "bare parameter" in reasons(plan)["encoder.table"]
    assert "task head" in reasons(plan)["classifier.weight"]
    assert reasons(plan)["position_ids"] == "torch.int64: not floating point"

    plan = Plan.of_tensors(tensors, LexibitConfig(embeddings=False, heads=True, parameters=["*.table"]))
    assert set(names(plan)) == {
        "encoder.key.weight",
        "encoder.table",
        "classifier.weight",
        "lstm.weight_ih_l0",
    }


def test_only_the_matrices_of_a_module_are_taken_for_its_weight():
    class Scaled(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 5)
            self.weight_scale = torch.nn.Parameter(torch.ones(5, 1))

    plan = Plan.of(torch.nn.Sequential(Scaled()), LexibitConfig(bits=2))
    assert [weight.name for weight in plan.weights] == ["0.weight"]
    assert "0.weight_scale" in {kept.name for kept in plan.kept}
