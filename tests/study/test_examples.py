"""The ready studies: each is read, and every command in it would be taken, wherever models and data are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lexibit import checkpoint
from lexibit.study import cells, digests, read

EXAMPLES = Path(__file__).parents[2] / "examples"
STUDIES = sorted(file.stem for file in EXAMPLES.glob("*.yaml"))


@pytest.fixture
def anywhere(monkeypatch, tiny):
    """Every model and every task's data are there."""
    monkeypatch.setattr(checkpoint, "find", lambda source: tiny)
    monkeypatch.setattr(digests, "of_examples", lambda *_: "examples")


@pytest.mark.parametrize("name", STUDIES)
def test_a_ready_study_is_one_that_could_run(anywhere, name):
    study = read(EXAMPLES / f"{name}.yaml")
    found = cells(study)
    assert len({cell.key for cell in found}) == len(found) > 5
    assert study.name
    assert study.about


def test_every_study_has_a_full_size_twin_and_stands_in_the_list():
    small = {name for name in STUDIES if not name.endswith("_full")}
    assert {f"{name}_full" for name in small} == set(STUDIES) - small
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.yaml`" in listed for name in small)
