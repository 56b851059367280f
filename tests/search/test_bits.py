"""Bits under a budget, from what each layer alone does."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import lexibit
from lexibit import LexibitConfig, LexibitError
from lexibit.fidelity import Reference
from lexibit.search import Problem, Setting, refine, search, sensitivities, under
from lexibit.search.allocation import Option
from lexibit.search.objective import Distance
from lexibit.search.trials import storage

CODES = LexibitConfig("binary", 3)
TEXTS = [f"w{first} w{first + 1} w{first + 2}" for first in range(10, 30)]


@pytest.fixture
def problem(tiny_model: Any, tiny_tokenizer: Any) -> Problem:
    model = tiny_model("bert").eval()
    return Problem(model, CODES, Distance(Reference(model, tiny_tokenizer(), TEXTS)))


def test_damages_are_of_one_layer_alone_and_bytes_are_those_stored(problem: Problem) -> None:
    found = sensitivities(problem, (1, 3, 6), progress=False)
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


@pytest.mark.parametrize("mode", [None, "manual"])
def test_a_budget_is_kept_by_the_model_that_comes_out(
    problem: Problem, tmp_path: Path, mode: str | None
) -> None:
    options = sensitivities(problem, progress=False)
    bits = under(options, 4.5, problem)
    assert len(set(bits.values())) > 1
    where = storage(f"sqlite:///{tmp_path / 'a.db'}")
    found = search(problem, mode, 1, bits=bits, study="s", where=where)
    assert found.value <= problem.value({name: Setting(bits=one) for name, one in bits.items()})
    assert found.start == problem.value({})
    counted = problem.bits_per_weight(found.settings)
    plan = lexibit.quantize(problem.model, problem.result(found.settings), progress=False)
    assert plan.bits_per_weight == pytest.approx(counted)
    assert counted <= 4.5
    assert problem._objective(problem.model) == found.value


def test_refining_keeps_the_budget_and_gains_where_damages_do_not_add_up(
    problem: Problem, tmp_path: Path
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
    where = storage(f"sqlite:///{tmp_path / 'a.db'}")
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


def test_what_cannot_be_is_refused(problem: Problem, tiny_model: Any) -> None:
    with pytest.raises(LexibitError, match="bits must be whole numbers from 1 to 8, not 9"):
        sensitivities(problem, (9,), progress=False)
    with pytest.raises(
        LexibitError, match=r"a budget of 1\.0 stored bits a weight cannot be kept: the .* take \d"
    ):
        under(sensitivities(problem, (2,), progress=False), 1.0, problem)
    for budget in (float("nan"), float("inf"), -1.0):
        with pytest.raises(LexibitError, match="cannot be kept"):
            under(sensitivities(problem, (2,), progress=False), budget, problem)
    values = iter([0.0, 0.0, 0.0, float("nan"), 1.0])
    twice = Problem(
        problem.model, LexibitConfig("binary", 2, include=["pooler*"]), lambda model: next(values)
    )
    assert [one.bits for one in sensitivities(twice, (1, 2), progress=False)["pooler"]] == [2]
    symmetric = Problem(problem.model, LexibitConfig("aciq", 3), problem._objective)
    assert [one.bits for one in sensitivities(symmetric, (1, 2), progress=False)["pooler"]] == [2]
    with pytest.raises(LexibitError, match=r"embeddings: none of \[1\] bits works"):
        sensitivities(symmetric, (1,), progress=False)
