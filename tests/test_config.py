"""What a user asks for: what is refused, what is recorded, and which rule counts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lexibit import LexibitConfig, LexibitError, Recipe


def test_the_defaults() -> None:
    config = LexibitConfig()
    assert config.recipe() == Recipe("kmeans", 4, "matrix", {}, "float32")
    assert (config.embeddings, config.heads, config.seed) == (True, False, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheem": "lq"}, "unknown option of LexibitConfig 'scheem': did you mean 'scheme'"),
        ({"scheme": "linaer"}, "unknown scheme 'linaer': did you mean 'linear'"),
        (
            {"options": {"iteration": 3}},
            "unknown option of scheme 'kmeans' 'iteration': did you mean 'iterations'",
        ),
        ({"groups": "colums:8"}, "unknown groups 'colums:8': did you mean 'columns:N'"),
        ({"levels_dtype": "float61"}, "unknown levels_dtype 'float61': did you mean 'float16'"),
        (
            {"rules": {"*.key": {"bit": 3}}},
            r"unknown setting in the rule for '\*.key' 'bit': did you mean 'bits'",
        ),
        ({"rules": {"*.key": {"scheme": "lqq"}}}, "unknown scheme 'lqq': did you mean 'lq'"),
        ({"rules": {"*.key": {"embeddings": False}}}, "unknown setting in the rule"),
    ],
    ids=str,
)
def test_an_unknown_name_is_refused_with_the_nearest(options: dict[str, object], message: str) -> None:
    with pytest.raises(LexibitError, match=message):
        LexibitConfig(**options)


@pytest.mark.parametrize("bits", [0, 9, -1, 100])
def test_bits_outside_one_to_eight_are_refused(bits: int) -> None:
    with pytest.raises(LexibitError, match=f"bits must be from 1 to 8, not {bits}"):
        LexibitConfig(bits=bits)
    with pytest.raises(LexibitError, match="from 1 to 8"):
        LexibitConfig(rules={"*": {"bits": bits}})


@pytest.mark.parametrize("bits", [True, False, 4.0, 3.5, "4", None])
def test_bits_that_are_no_whole_number_are_refused(bits: object) -> None:
    with pytest.raises(LexibitError, match="bits must be a whole number from 1 to 8, not"):
        LexibitConfig(bits=bits)


def test_bits_that_a_scheme_cannot_work_with_are_refused() -> None:
    with pytest.raises(LexibitError, match="'lq' works with 2 to 8 bits, not 1"):
        LexibitConfig(scheme="lq", bits=1)
    with pytest.raises(LexibitError, match="'lq' works with 2 to 8 bits, not 1"):
        LexibitConfig(bits=1, rules={"*.key": {"scheme": "lq"}})


@pytest.mark.parametrize("groups", [4, None, ["row"]])
def test_groups_that_are_no_text_are_refused(groups: object) -> None:
    with pytest.raises(LexibitError, match="groups must be text"):
        LexibitConfig(groups=groups)


@pytest.mark.parametrize("option", ["include", "exclude", "parameters"])
@pytest.mark.parametrize("value", ["*.key", [1], [None, "*.key"]])
def test_patterns_must_be_a_list_of_text(option: str, value: object) -> None:
    with pytest.raises(LexibitError, match=f"{option} must be a list of patterns, not"):
        LexibitConfig(**{option: value})


@pytest.mark.parametrize("rule", [8, "bits", [("bits", 8, 1)]])
def test_a_rule_that_is_no_mapping_is_refused(rule: object) -> None:
    with pytest.raises(LexibitError, match=r"\*\.key"):
        LexibitConfig(rules={"*.key": rule})


@pytest.mark.parametrize(
    "options",
    [
        {"options": "init"},
        {"options": [1]},
        {"options": {1: 2}},
        {"rules": ["*.key"]},
        {"rules": {5: {"bits": 3}}},
        {"rules": {"*.key": {"options": "init"}}},
    ],
)
def test_settings_that_are_not_by_name_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LexibitError, match="by name, like"):
        LexibitConfig(**options)


@pytest.mark.parametrize("options", [{"include": 5}, {"exclude": None}, {"embeddings": "no"}, {"heads": 1}])
def test_options_of_another_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LexibitError, match=f"{next(iter(options))} must be"):
        LexibitConfig(**options)


def test_options_of_a_rule_add_to_those_before() -> None:
    config = LexibitConfig(
        "lq", options={"affine": True}, rules={"*.key": {"options": {"bias_correction": True}}}
    )
    assert config.recipe("*.key").options == {"affine": True, "bias_correction": True}
    assert config.recipe().options == {"affine": True}


def test_a_rule_whose_scheme_does_not_weigh_drops_the_importance_so_far() -> None:
    rules = {"*.query": {"scheme": "mse", "importance": "E=1"}, "*.0.*": {"scheme": "kl"}}
    assert LexibitConfig(rules=rules).recipe("*.query", "*.0.*").importance is None


def test_a_fault_of_a_rule_names_it() -> None:
    with pytest.raises(
        LexibitError, match=r"with the rule for '\*\.key': scheme 'lq' works with 2 to 8 bits"
    ):
        LexibitConfig(rules={"*.key": {"scheme": "lq", "bits": 1}})
    with pytest.raises(LexibitError, match=r"options\.NAME=VALUE"):
        LexibitConfig(rules={"*.key": {"affine": True}})


@pytest.mark.parametrize("seed", ["0", 1.5, -1, None])
def test_a_seed_that_is_no_whole_number_is_refused(seed: object) -> None:
    with pytest.raises(LexibitError, match="seed"):
        LexibitConfig(seed=seed)


def test_another_quantization_method_is_refused() -> None:
    with pytest.raises(LexibitError, match="quant_method is 'gptq'"):
        LexibitConfig(quant_method="gptq")


# records ---------------------------------------------------------------------------------------

FULL = {
    "outliers": 0.002,
    "scheme": "kmeans",
    "bits": 3,
    "groups": "rows:6",
    "options": {"init": "k-means++", "iterations": 5},
    "levels_dtype": "float16",
    "importance": "E=0.5,C=0.999",
    "embeddings": False,
    "heads": True,
    "include": ["*.query"],
    "exclude": ["*.11.*"],
    "parameters": ["table"],
    "rules": {"*.key": {"bits": 8, "scheme": "linear"}, "*": {"groups": "row"}},
    "seed": 7,
}


def test_a_record_has_every_option_and_the_method() -> None:
    assert LexibitConfig(**FULL).to_dict() == FULL | {"quant_method": "lexibit"}


@pytest.mark.parametrize("options", [{}, FULL], ids=["defaults", "all"])
def test_a_record_comes_back_through_json(options: dict[str, object]) -> None:
    config = LexibitConfig(**options)
    again = LexibitConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    # the order of the rules is part of what they say
    assert list(again.rules) == list(config.rules)


def test_a_configuration_does_not_change_with_what_it_was_made_of() -> None:
    rules, exclude, options = {"*.key": {"bits": 8}}, ["*.query"], {"init": "optimal"}
    config = LexibitConfig(rules=rules, exclude=exclude, options=options)
    rules["*.key"]["bits"] = 1
    exclude.append("*")
    options["init"] = "k-means++"
    assert config.rules == {"*.key": {"bits": 8}}
    assert config.exclude == ["*.query"]
    assert config.recipe().options == {"init": "optimal"}


# rules -----------------------------------------------------------------------------------------


def test_of_two_rules_the_later_counts() -> None:
    config = LexibitConfig(bits=2, rules={"a": {"bits": 3, "groups": "row"}, "b": {"bits": 5}})
    assert config.recipe("a").bits == 3
    assert config.recipe("a", "b") == Recipe("kmeans", 5, "row", {})
    assert config.recipe("b", "a").bits == 3
    assert config.recipe() == Recipe("kmeans", 2, "matrix", {})


def test_a_rule_for_another_scheme_drops_the_options_of_the_first() -> None:
    config = LexibitConfig(
        options={"init": "k-means++"},
        rules={
            "a": {"scheme": "linear"},
            "b": {"scheme": "kmeans"},
            "c": {"scheme": "kmeans", "options": {"init": "optimal"}},
            "d": {"bits": 2},
        },
    )
    assert config.recipe("a").options == {}
    assert config.recipe("b").options == {"init": "k-means++"}
    assert config.recipe("c").options == {"init": "optimal"}
    assert config.recipe("d").options == {"init": "k-means++"}
    assert config.recipe("a", "b").options == {}
    assert config.recipe("a", "c") == Recipe("kmeans", 4, "matrix", {"init": "optimal"})


def test_a_rule_with_options_of_another_scheme_is_refused() -> None:
    with pytest.raises(LexibitError, match="unknown option of scheme 'linear' 'init'"):
        LexibitConfig(rules={"a": {"scheme": "linear", "options": {"init": "optimal"}}})


# recipes ---------------------------------------------------------------------------------------


def test_a_recipe_is_checked_like_a_configuration() -> None:
    with pytest.raises(LexibitError, match="bits must be from 1 to 8"):
        Recipe(bits=9)
    with pytest.raises(LexibitError, match="unknown scheme"):
        Recipe(scheme="none")
    with pytest.raises(LexibitError, match="positive whole number"):
        Recipe(groups="rows:0")
    with pytest.raises(LexibitError, match="unknown levels_dtype"):
        Recipe(levels_dtype="float64")
