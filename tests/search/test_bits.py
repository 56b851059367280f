"""Bits under a budget, from what each layer alone does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lexibit
from lexibit import LexibitConfig, LexibitError
from lexibit.fidelity import Reference
from lexibit.search import Problem, Setting, search, sensitivities, under
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
