"""One weight at a time: that each is quantized alone, what is measured, and that nothing stays changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lexibit import LexibitConfig, LexibitError, Reference, quantize, quantize_tensor, sensitivity, tasks
from lexibit.nn import codebooks

TEXTS = ["w5 w6 w7", "w20 w21 w22 w23 w24", "w90 w7"]
CONFIG = LexibitConfig("linear", 2)


@pytest.fixture
def ours(tiny_model: Any) -> PreTrainedModel:
    return tiny_model("bert")


@pytest.fixture
def reference(ours: PreTrainedModel, tiny_tokenizer: Any) -> Reference:
    return Reference(ours, tiny_tokenizer(), TEXTS)


def test_every_weight_of_the_plan_is_ranked_by_what_it_does(
    ours: PreTrainedModel, reference: Reference
) -> None:
    found = sensitivity(ours, CONFIG, reference=reference, progress=False).weights
    matrices = {name for name, p in ours.named_parameters() if p.dim() == 2}
    assert {one.name for one in found} == matrices
    damage = [one.output_error for one in found]
    assert damage == sorted(damage, reverse=True)
    assert damage[0] > 0
    pooler = next(one for one in found if one.name == "pooler.dense.weight")
    assert (pooler.output_error, pooler.error > 0) == (0.0, True)  # hidden states do not depend on it
    assert all(one.score is None and one.drop is None for one in found)


def test_the_damage_is_that_of_a_model_with_this_weight_quantized_and_no_other(
    ours: PreTrainedModel, reference: Reference
) -> None:
    found = sensitivity(ours, CONFIG, reference=reference, progress=False).weights
    for one in found[:3]:
        alone = copy.deepcopy(ours)
        quantize(alone, LexibitConfig("linear", 2, include=[one.name]), progress=False)
        assert list(codebooks(alone)) == [one.name]
        fidelity = reference.fidelity(alone)
        assert one.output_error == pytest.approx(fidelity.relative, rel=1e-5)
        assert one.cosine == pytest.approx(fidelity.cosine, rel=1e-5)
        weight = quantize_tensor(ours.get_parameter(one.name), CONFIG.recipe())
        assert (one.nbytes, one.bits_per_weight) == (weight.nbytes, weight.bits_per_weight)
        w = ours.get_parameter(one.name).detach()
        assert one.error == pytest.approx(
            float((weight.decode() - w).square().sum() / w.square().sum()), rel=1e-4
        )


def test_the_model_is_left_as_it_was(ours: PreTrainedModel, reference: Reference) -> None:
    ours.train()
    before = {name: (id(p), p.clone()) for name, p in ours.named_parameters()}
    classes = [type(module) for module in ours.modules()]
    sensitivity(ours, CONFIG, reference=reference, progress=False)
    assert list(before) == [name for name, _ in ours.named_parameters()]
    for name, p in ours.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])
    assert [type(module) for module in ours.modules()] == classes
    assert ours.training
    assert not codebooks(ours)


def test_the_drop_of_a_score_ranks_first(ours: PreTrainedModel, reference: Reference) -> None:
    seen: list[list[str]] = []

    def score(model: PreTrainedModel) -> tasks.Score:
        seen.append(list(codebooks(model)))
        value = 90.0 - (5.0 if "encoder.layer.1.output.dense.weight" in codebooks(model) else 0.0)
        return tasks.Score("points", value, value, value, 3, 0, 0.0)

    ranking = sensitivity(ours, CONFIG, reference=reference, score=score, progress=False)
    found = ranking.weights
    assert ranking.float_score == tasks.Score("points", 90.0, 90.0, 90.0, 3, 0, 0.0)
    assert seen[0] == []
    assert sorted(seen[1:]) == sorted([one.name] for one in found)
    assert found[0].name == "encoder.layer.1.output.dense.weight"
    assert (found[0].score, found[0].drop) == (85.0, 5.0)
    assert all((one.score, one.drop) == (90.0, 0.0) for one in found[1:])
    rest = [one.output_error for one in found[1:]]
    assert rest == sorted(rest, reverse=True)


def test_a_score_that_is_not_a_number_is_the_worst_damage(ours: PreTrainedModel) -> None:
    def score(model: PreTrainedModel) -> tasks.Score:
        value = {"pooler.dense.weight": float("nan")}.get(next(iter(codebooks(model)), ""), 50.0)
        value -= len(codebooks(model))
        return tasks.Score("points", value, value, value, 3, 0, 0.0)

    found = sensitivity(ours, CONFIG, score=score, progress=False).weights
    assert found[0].name == "pooler.dense.weight"
    assert math.isnan(found[0].drop)
    assert all(one.drop == 1.0 for one in found[1:])
    with pytest.raises(LexibitError, match="the float model's score is nan"):
        sensitivity(
            ours, CONFIG, score=lambda _: tasks.Score("points", float("nan"), 0, 0, 3, 0, 0.0), progress=False
        )


def test_a_tied_weight_is_quantized_in_all_its_places(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: Any
) -> None:
    model = tiny_model("bert-mlm")
    found = sensitivity(
        model, CONFIG, reference=Reference(model, tiny_tokenizer(), TEXTS), progress=False
    ).weights
    tied = next(one for one in found if one.name == "bert.embeddings.word_embeddings.weight")
    assert tied.kind == "embedding+linear"
    assert "cls.predictions.decoder.weight" not in {one.name for one in found}
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_what_cannot_be_measured_is_refused(ours: PreTrainedModel, reference: Reference) -> None:
    with pytest.raises(LexibitError, match="give text or a task"):
        sensitivity(ours, progress=False)
    with pytest.raises(LexibitError, match="nothing to quantize in BertModel"):
        sensitivity(ours, LexibitConfig(exclude=["*"]), reference=reference, progress=False)
    quantize(ours, CONFIG, progress=False)
    with pytest.raises(LexibitError, match="quantized already"):
        sensitivity(ours, CONFIG, reference=reference, progress=False)
