"""Cells: which there are, what they share, and what their keys mind."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lexibit import LexibitError
from lexibit.study import Study, cells, digests


@pytest.fixture(autouse=True)
def _read_anew():
    digests.of_path.cache_clear()
    digests.of_examples.cache_clear()


def steps(found):
    return Counter(step.command for step in {step for cell in found for step in cell.steps()})


def keys(study):
    return {tuple(cell.labels.items()): cell.key for cell in cells(study)}


def test_every_combination_is_a_cell(settings):
    found = cells(Study(**settings, seeds=[0, 1]))
    labels = [(c.labels["scheme"], c.labels["bits"], c.labels["tuned"], c.labels["seed"]) for c in found]
    quantized = [
        (scheme, bits, tuned)
        for scheme in ("linear", "k-means")
        for bits in (2, 3)
        for tuned in (False, True)
    ]
    assert labels == [(*one, seed) for seed in (0, 1) for one in [("float", 32, False), *quantized]]
    assert len({cell.key for cell in found}) == len(found)


def test_a_float_model_has_the_bits_of_its_own_parameters(settings, tiny, tmp_path):
    half = transformers.BertModel.from_pretrained(tiny, dtype=torch.bfloat16)
    shutil.copytree(tiny, tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    study = Study(**settings | {"models": {"half": str(tmp_path / "half"), "tiny": str(tiny)}})
    floats = [cell.labels for cell in cells(study) if cell.labels["scheme"] == "float"]
    assert [(one["model"], one["bits"]) for one in floats] == [("half", 16), ("tiny", 32)]


def test_a_model_is_trained_once_and_a_scheme_fitted_once(settings):
    found = cells(Study(**settings, seeds=[0, 1]))
    assert steps(found) == {"finetune": 2, "quantize": 8, "tune": 8, "evaluate": 18}


def test_what_is_not_trained_is_fitted_once_for_all_tasks(settings, tmp_path):
    (tmp_path / "dev.txt").write_text("w9 w10\nw11 w12\n")
    tasks = {"classification": {}, "masked-lm": {"data": str(tmp_path)}}
    settings |= {"tasks": tasks, "finetune": None, "tune": None}
    found = cells(Study(**settings))
    assert steps(found) == {"quantize": 4, "evaluate": 10}


def test_a_schemes_own_axes_take_the_place_of_the_studys(settings):
    settings["schemes"]["k-means"] |= {"bits": 5, "groups": ["row", "matrix"]}
    found = [cell.labels for cell in cells(Study(**settings)) if not cell.labels["tuned"]]
    own = [(one["bits"], one["groups"]) for one in found if one["scheme"] == "k-means"]
    assert own == [(5, "row"), (5, "matrix")]
    assert [one["bits"] for one in found if one["scheme"] == "linear"] == [2, 3]


def test_keys_mind_the_content_of_what_goes_in_and_nothing_else(settings, tiny, texts, tmp_path):
    before = keys(Study(**settings))
    assert keys(Study(**settings | {"name": "other", "about": "x", "cpus": 3})) == before
    # the same content elsewhere
    shutil.copytree(tiny, tmp_path / "tiny")
    shutil.copytree(texts, tmp_path / "texts")
    (tmp_path / "texts" / "of_another_task.txt").write_text("x")
    moved = settings | {"models": {"tiny": str(tmp_path / "tiny")}, "data": str(tmp_path / "texts")}
    assert keys(Study(**moved)) == before
    # one example more
    digests.of_examples.cache_clear()
    with (tmp_path / "texts" / "train.tsv").open("a") as file:
        file.write("yes\tw7 w9\n")
    assert not set(keys(Study(**moved)).values()) & set(before.values())
    # another model
    (tmp_path / "tiny" / "config.json").write_text((tiny / "config.json").read_text() + "\n")
    digests.of_path.cache_clear()
    other = Study(**settings | {"models": {"tiny": str(tmp_path / "tiny")}})
    assert not set(keys(other).values()) & set(before.values())


@pytest.mark.parametrize("place", ["axis", "rule", "plan"])
def test_keys_mind_files_of_importances_wherever_they_are_named(settings, tiny, tmp_path, place):
    weights = load_file(tiny / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    file, plan = tmp_path / "i.safetensors", tmp_path / "plan.json"
    plan.write_text(json.dumps({"bits": 3, "importance": str(file)}))
    scheme = {
        "axis": {"importance": str(file)},
        "rule": {"rule": [f"*.query importance={file}"]},
        "plan": {"plan": str(plan)},
    }
    study = Study(**settings | {"schemes": {"one": scheme[place]}, "bits": [3], "tune": None})
    found = []
    for factor in (1.0, 2.0):
        save_file({name: weights[name].abs() * factor}, file)
        digests.of_path.cache_clear()
        found.append(keys(study))
    (float_before, one_before), (float_after, one_after) = (list(each.values()) for each in found)
    assert float_before == float_after
    assert one_before != one_after


def test_a_plan_can_be_a_scheme(settings, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"bits": 5, "rules": {"*.query": {"bits": 2}}}))
    found = cells(Study(**settings | {"schemes": {"mixed": {"config": str(plan)}}}))
    assert [(cell.labels["scheme"], cell.labels["bits"]) for cell in found] == [
        ("float", 32),
        ("mixed", 5),
        ("mixed", 5),
    ]
    assert "--seed" not in found[1].steps()[1].options


def test_a_setting_of_tuning_leaves_the_cells_before_it_as_they_are(settings):
    before, after = keys(Study(**settings)), keys(Study(**settings | {"tune": {"max_steps": 4}}))
    same = {labels for labels in before if before[labels] == after[labels]}
    assert same == {labels for labels in before if not dict(labels)["tuned"]}


def test_a_scheme_is_calibrated_on_the_task_of_each_cell(settings):
    schemes = {"calibrated": {"calibrate": "task"}}
    named = {"calibrated": {"calibrate": "task:classification"}}
    own, same = (cells(Study(**settings | {"schemes": one, "tune": None})) for one in (schemes, named))
    assert [cell.key for cell in own] == [cell.key for cell in same]
    quantized = [cell.steps()[-2].options for cell in own if cell.labels["scheme"] == "calibrated"]
    assert quantized
    for options in quantized:
        assert options[options.index("--calibrate") + 1] == "task:classification"
        assert "--data" in options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"finetune": {"epocs": 3}},
            "finetune of tiny on classification: unknown option .*'epocs': did you mean 'epochs'",
        ),
        ({"finetune": {"epochs": "many"}}, "finetune of tiny on classification: .*--epochs"),
        ({"finetune": {"epochs": -1}}, "finetune of tiny .*: epochs must be more than 0"),
        ({"finetune": {"task": "mrpc"}}, "task: the study sets it"),
        ({"finetune": {"epochs": [1, 2]}}, "epochs takes one value"),
        ({"evaluate": {"against": "x"}}, "against: the study sets it"),
        ({"schemes": {"one": {"scheme": "lq"}}, "bits": [1]}, "schemes.one: .*lq"),
        ({"schemes": {"one": {"scheme": "kmean"}}}, "schemes.one: unknown scheme 'kmean'"),
        ({"schemes": {"one": {"scheme": "linear", "embeddings": 3}}}, "embeddings must be true or false"),
        ({"schemes": {"one": {"importance": "Q=3"}}}, "schemes.one: .*Q"),
        ({"groups": ["rows"]}, "schemes.linear: .*rows"),
        ({"tasks": ["mrcp"]}, "unknown task 'mrcp'"),
        ({"models": {"tiny": "./not-there"}}, "not-there"),
        ({"data": "./not-there"}, "not-there"),
        ({"models": {"made": {"create": "awd-lstn"}}}, "unknown model to create .*'awd-lstm'"),
        ({"published": "bert-bas"}, "unknown model of published numbers 'bert-bas'"),
        (
            {"schemes": {"one": {"calibrate": "nofile.txt"}}},
            "schemes.one: calibrate: nofile.txt: no such file",
        ),
        ({"schemes": {"one": {"calibrate": "task:mrcp"}}}, "schemes.one: unknown task 'mrcp'"),
        ({"importance": ["nofile.safetensors"]}, "nofile.safetensors: no such file"),
        ({"models": {"made": {"create": "awd-lstm"}}, "finetune": None}, "models.made: is made from nothing"),
    ],
)
def test_what_a_command_would_refuse_is_refused_before_any_work(settings, changes, message):
    with pytest.raises(LexibitError, match=message):
        cells(Study(**settings | changes))
