"""Bits under a budget, from what each layer alone does."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import BaseStorage

import lexibit
from lexibit import LexibitConfig, LexibitError
from lexibit.fidelity import Reference
from lexibit.search import Problem, Setting, check_budget, refine, search, sensitivities, under, uniform
from lexibit.search.allocation import Option
from lexibit.search.objective import Distance
from lexibit.search.trials import storage

CODES = LexibitConfig("binary", 3)
TEXTS = [f"w{first} w{first + 1} w{first + 2}" for first in range(10, 30)]


@pytest.fixture
def problem(tiny_model: Any, tiny_tokenizer: Any) -> Problem:
    model = tiny_model("bert").eval()
    return Problem(model, CODES, Distance(Reference(model, tiny_tokenizer(), TEXTS)))


@pytest.fixture
def where(tmp_path: Path) -> BaseStorage:
    return storage(f"sqlite:///{tmp_path / 'a.db'}")


def test_damages_are_of_one_layer_alone_and_bytes_are_those_stored(
    problem: Problem, where: BaseStorage
) -> None:
    found, trials = sensitivities(problem, (1, 3, 6), study="s", where=where)
    assert len(trials) == 3 * len(problem.layers)
    assert list(found) == [layer.name for layer in problem.layers]
    one = found["encoder.layer.1"][1]
    assert (one.bits, [option.bits for option in found["pooler"]]) == (3, [1, 3, 6])
    config = LexibitConfig("binary", 3, include=["encoder.layer.1.*"])
    plan = lexibit.quantize(problem.model, config, progress=False)
    assert one.nbytes == sum(weight.bytes_after for weight in plan.weights)
    assert one.damage == problem._objective(problem.model) - problem.float_value
    for some in found.values():
        assert some[0].nbytes < some[1].nbytes < some[2].nbytes
        assert some[0].damage >= some[1].damage >= some[2].damage


def test_what_a_layer_does_alone_is_measured_once(
    problem: Problem, where: BaseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Mapping[str, Setting]] = []
    value = problem.value

    def stopped(settings: Mapping[str, Setting], **more: Any) -> float:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(settings)
        return value(settings, **more)

    monkeypatch.setattr(problem, "value", stopped)
    with pytest.raises(KeyboardInterrupt):
        sensitivities(problem, (1, 3), study="s", where=where)
    monkeypatch.setattr(problem, "value", lambda *of, **more: calls.append(*of) or value(*of, **more))
    found = sensitivities(problem, (1, 3), study="s", where=where)
    assert len(calls) == 2 * len(problem.layers)
    whole = storage("sqlite:///:memory:")
    assert sensitivities(problem, (1, 3), study="s", where=whole)[0] == found[0]
    with pytest.raises(LexibitError, match=r"each layer alone: was begun with widths \[1, 3\], now"):
        sensitivities(problem, (1, 4), study="s", where=where)


@pytest.mark.parametrize("mode", [None, "manual"])
def test_a_budget_is_kept_by_the_model_that_comes_out(
    problem: Problem, where: BaseStorage, mode: str | None
) -> None:
    options, _ = sensitivities(problem, study="s", where=where)
    bits, same = under(options, 4.5, problem), uniform(options, 4.5, problem)
    assert len(set(bits.values())) > 1
    found = search(problem, mode, 1, bits=bits, before=same, study="s", where=where)
    assert found.value <= problem.value({name: Setting(bits=one) for name, one in bits.items()})
    assert found.before == {name: Setting(bits=one) for name, one in same.items()}
    assert found.start == problem.value(found.before)
    counted = problem.bits_per_weight(found.settings)
    plan = lexibit.quantize(problem.model, problem.result(found.settings), progress=False)
    assert plan.bits_per_weight == pytest.approx(counted)
    assert counted <= 4.5
    assert problem._objective(problem.model) == found.value


def test_refining_keeps_the_budget_and_gains_where_damages_do_not_add_up(
    problem: Problem, where: BaseStorage
) -> None:
    names = [layer.name for layer in problem.layers]
    # what is best together is the opposite of what is best alone
    alone = {"encoder.layer.0": 1.0, "encoder.layer.1": 8.0}
    together = {"encoder.layer.0": 8.0, "encoder.layer.1": 1.0}

    def bits(settings: Mapping[str, Setting]) -> dict[str, int]:
        return {name: one.bits or 0 for name, one in settings.items()}

    calls: list[dict[str, int]] = []

    def value(settings: Mapping[str, Setting], **more: object) -> float:
        calls.append(bits(settings))
        return sum(together.get(name, 0.1) / width for name, width in bits(settings).items())

    options = {
        layer.name: [
            Option(width, problem.nbytes(layer, Setting(bits=width)), alone.get(layer.name, 0.1) / width)
            for width in range(1, 7)
        ]
        for layer in problem.layers
    }
    first = under(options, 4.0, problem)
    assert first["encoder.layer.1"] > first["encoder.layer.0"]
    problem.value = value  # type: ignore[method-assign]
    found, trials = refine(options, 4.0, problem, 24, study="s", where=where)
    assert calls[0] == first
    assert all(calls[number] not in calls[:number] for number in range(len(calls)))
    assert found["encoder.layer.1"] < found["encoder.layer.0"]
    assert len(trials) == 24
    everything = [dict(zip(names, widths, strict=True)) for widths in product(range(1, 7), repeat=len(names))]
    kept = [
        {name: Setting(bits=width) for name, width in one.items()}
        for one in everything
        if problem.bits_per_weight({name: Setting(bits=width) for name, width in one.items()}) <= 4.0
    ]
    assert {name: Setting(bits=width) for name, width in found.items()} in kept
    values = sorted(value(one) for one in kept)
    worth = value({name: Setting(bits=width) for name, width in found.items()})
    assert worth == min(trial.value for trial in trials)
    assert worth <= values[0] + 0.1 * (
        value({name: Setting(bits=w) for name, w in first.items()}) - values[0]
    )
    # what stands in the storage is not measured again
    count = len(calls)
    assert refine(options, 4.0, problem, 24, study="s", where=where) == (found, trials)
    assert len(calls) == count
    with pytest.raises(LexibitError, match=r"was begun with budget 4\.0, now it is 5\.0"):
        refine(options, 5.0, problem, 24, study="s", where=where)


def test_the_same_bits_for_all_layers_are_the_most_that_the_budget_allows(
    problem: Problem, where: BaseStorage
) -> None:
    options, _ = sensitivities(problem, study="s", where=where)

    def takes(width: int) -> float:
        return problem.bits_per_weight({layer.name: Setting(bits=width) for layer in problem.layers})

    for budget in (takes(1), takes(3), (takes(3) + takes(4)) / 2, takes(6)):
        found = uniform(options, budget, problem)
        assert set(found) == set(options)
        (width,) = set(found.values())
        assert takes(width) <= budget
        assert width == 6 or takes(width + 1) > budget
    # a layer that cannot takes what it can
    options["pooler"] = [one for one in options["pooler"] if one.bits != 3]
    found = uniform(options, takes(3), problem)
    assert (found.pop("pooler"), set(found.values())) == (2, {3})
    options["pooler"] = options["pooler"][4:]
    assert uniform(options, takes(4), problem)["pooler"] == options["pooler"][0].bits == 6


def test_a_budget_that_leaves_nothing_to_choose_is_refused(problem: Problem) -> None:
    least, most = (
        problem.bits_per_weight({layer.name: Setting(bits=width) for layer in problem.layers})
        for width in (1, 6)
    )
    check_budget(least + 1e-9, problem)
    check_budget((least + most) / 2, problem)
    with pytest.raises(LexibitError, match=r"cannot be kept: the .* take \d.*; larger groups, or --levels"):
        check_budget(1.1, problem)
    for budget in (0.5, -1.0):
        with pytest.raises(LexibitError, match=r"cannot be kept: .* codes alone take 1: give more"):
            check_budget(budget, problem)
    with pytest.raises(LexibitError, match="cannot be kept"):
        check_budget(float("nan"), problem)
    for budget in (most, 32.0, float("inf")):
        with pytest.raises(
            LexibitError, match=r"nothing to choose: the most bits of all layers, 6 at most, take .*--bits"
        ):
            check_budget(budget, problem)


def test_what_cannot_be_is_refused(problem: Problem, where: BaseStorage) -> None:
    with pytest.raises(LexibitError, match="bits must be whole numbers from 1 to 8, not 9"):
        sensitivities(problem, (9,), study="s", where=where)
    options, _ = sensitivities(problem, (2,), study="two", where=where)
    for budget, message in ((1.0, "fewest bits take"), (float("nan"), "not nan"), (float("inf"), "not inf")):
        with pytest.raises(LexibitError, match=message):
            under(options, budget, problem)
    values = iter([0.0, 0.0, 0.0, float("nan"), 1.0])
    twice = Problem(
        problem.model, LexibitConfig("binary", 2, include=["pooler*"]), lambda model: next(values)
    )
    found, trials = sensitivities(twice, (1, 2), study="twice", where=where)
    assert [one.bits for one in found["pooler"]] == [2]
    assert [trial.fault for trial in trials] == ["the objective is nan", None]
    nothing = iter([0.0] * 3 + [float("nan")] * 2)
    never = Problem(
        problem.model, LexibitConfig("binary", 2, include=["pooler*"]), lambda model: next(nothing)
    )
    with pytest.raises(LexibitError, match="pooler: no width could be measured: the objective is nan"):
        sensitivities(never, (1, 2), study="never", where=where)
    symmetric = Problem(problem.model, LexibitConfig("aciq", 3), problem._objective)
    found, _ = sensitivities(symmetric, (1, 2), study="aciq", where=where)
    assert [one.bits for one in found["pooler"]] == [2]
    with pytest.raises(LexibitError, match=r"embeddings: its scheme works with none of \[1\] bits"):
        sensitivities(symmetric, (1,), study="none", where=where)
