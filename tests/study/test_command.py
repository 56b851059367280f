"""The commands of studies: what they print, write and refuse."""

from __future__ import annotations

import re

import pytest

from lexibit.study import results


@pytest.fixture
def small(settings, write):
    """A file of a study of three cells."""
    return write(settings | {"tune": None, "schemes": {"linear": {"scheme": "linear"}}})


@pytest.mark.parametrize("command", ["run", "plan", "table"])
def test_the_help_has_examples(run, command):
    code, out, _ = run("study", command, "--help")
    assert code == 0
    assert len(re.findall(rf"lexibit study {command}\b", out.partition("Examples")[2])) >= 2


def test_a_plan_shows_the_cells_and_does_nothing(run_json, run, small, tmp_path):
    told = run_json("study", "plan", small, "--out", tmp_path / "out")
    assert [cell["bits"] for cell in told["cells"]] == [32, 2, 3]
    assert not any(cell["done"] for cell in told["cells"])
    assert told["steps"] == {"finetune": 1, "evaluate": 3, "quantize": 2}
    assert not (tmp_path / "out").exists()
    shown = run("study", "plan", small, "--out", tmp_path / "out")[1]
    assert "3 cells, 3 to do; steps to do: 1 x finetune" in " ".join(shown.split())


def test_a_run_its_plan_and_its_table(run, run_json, small, tmp_path):
    out = tmp_path / "out"
    code, said, err = run("study", "run", small, "--out", out, "--memory", "4GB", "--processes", "1")
    assert code == 0, err
    assert "3/3: " in said
    assert "tiny, classification, linear, 3 bits, seed 0: accuracy x 100" in said
    assert "3 cells, 0 done before, 0 failed" in " ".join(said.split())
    assert len(results(out)) == 6
    assert all(cell["done"] for cell in run_json("study", "plan", small, "--out", out)["cells"])
    again = run_json("study", "run", small, "--out", out)
    assert (again["cells"], again["before"], again["failed"]) == (3, 3, 0)
    _, text, _ = run("study", "table", out)
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 5
    run("study", "table", out, "--format", "csv", "-o", tmp_path / "table.csv")
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 4


def test_models_and_data_can_be_elsewhere(run_json, settings, write, tmp_path, tiny, texts):
    file = write(settings | {"models": {"tiny": "./no-model"}, "data": "./no-data"})
    told = run_json("study", "plan", file, "--data", texts, "--model", f"tiny={tiny}")
    assert len(told["cells"]) == 9


def test_a_run_with_failed_cells_fails_and_keeps_the_others(run, settings, write, tmp_path):
    broken = {"broken": {"scheme": "linear", "include": ["no.such.weight"], "bits": 2}}
    file = write(settings | {"tune": None, "schemes": broken})
    code, out, err = run("study", "run", file, "--out", tmp_path / "out")
    assert code == 1
    assert "1 of 2 cells failed" in " ".join(err.split())
    assert "float, 32 bits" in out
    assert "Failed: tiny, classification, broken, 2 bits" in run("study", "table", tmp_path / "out")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study", "run", "none.yaml"], "none.yaml: cannot be read"),
        (["study", "run", "{file}", "--model", "tiny"], "--model 'tiny': write NAME=SOURCE"),
        (["study", "run", "{file}", "--model", "other=x"], "unknown model of the study 'other'"),
        (["study", "run", "{file}", "--memory", "much"], "--memory 'much': write a size"),
        (["study", "run", "{file}", "--ray", "x:1", "--processes", "2"], "--ray leaves work to others"),
        (["study", "table", "none"], "none: is no study's folder"),
    ],
)
def test_wrong_usage_is_one_message(fails, small, words, message):
    assert message in " ".join(fails(*(word.format(file=small) for word in words)).split())
