"""A model in a folder on a task: scores, and the difference to another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lexibit import LexibitConfig, LexibitError, checkpoint, evaluation, tasks
from lexibit.tasks import base


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "RESAMPLES", 50)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs in the form of MRPC."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "MRPC"
    folder.mkdir(parents=True)
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    for index in range(40):
        first, second = (" ".join(f"w{word}" for word in rng.integers(5, 97, 4)) for _ in range(2))
        lines.append(f"{index % 2}\t1\t2\t{first}\t{second}")
    (folder / "dev.tsv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def folders(float_folder: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A classifier, and the same in one bit."""
    floats = float_folder("bert-classifier")
    checkpoint.quantize_to(floats, tmp_path / "packed", LexibitConfig("linear", 1), progress=False)
    return floats, tmp_path / "packed"


def evaluate(*arguments: Any, **options: Any) -> evaluation.Evaluation:
    return evaluation.evaluate(*arguments, progress=False, **options)


def test_a_float_and_a_quantized_folder_are_measured(folders: tuple[Path, Path], data: Path) -> None:
    task = tasks.task("mrpc")
    examples = task.load(data)
    for folder in folders:
        found = evaluate(folder, "mrpc", data)
        model, tokenizer = checkpoint.load_model(folder), checkpoint.load_tokenizer(folder)
        expected = task.scores(task.outcomes(model, tokenizer, examples))
        (scores,) = found.scores.values()
        assert [score.metric for score in scores] == ["accuracy x 100", "F1 x 100"]
        assert [score.value for score in scores] == [score.value for score in expected]
        assert all(score.examples == 40 and score.seconds > 0 for score in scores)
        assert all(score.low <= score.value <= score.high for score in scores)
        assert found.differences == []


def test_two_models_are_compared_on_the_same_examples(folders: tuple[Path, Path], data: Path) -> None:
    floats, packed = folders
    found = evaluate(packed, "mrpc", data, against=floats, limit=30, seed=3)
    ours, theirs = found.scores[str(packed)], found.scores[str(floats)]
    assert ours[0].examples == theirs[0].examples == 30
    for one, first, second in zip(found.differences, ours, theirs, strict=True):
        assert one.value == pytest.approx(first.value - second.value)
        assert one.low <= one.value <= one.high
        assert 0 < one.p <= 1
    same = evaluate(floats, "mrpc", data, against=floats)
    assert len(same.scores) == 2
    assert all((one.value, one.low, one.high, one.p) == (0, 0, 0, 1) for one in same.differences)


def test_the_same_seed_gives_the_same_result(folders: tuple[Path, Path], data: Path) -> None:
    def numbers(seed: int) -> Any:
        result = asdict(evaluate(folders[1], "mrpc", data, against=folders[0], limit=25, seed=seed))
        for scores in result["scores"].values():
            for score in scores:
                del score["seconds"]
        return result

    assert numbers(1) == numbers(1)
    assert numbers(1) != numbers(2)


def test_what_is_not_for_the_task_is_refused(
    folders: tuple[Path, Path], data: Path, float_folder: Callable[..., Path]
) -> None:
    with pytest.raises(LexibitError, match="did you mean 'mrpc'"):
        evaluate(folders[0], "mrcp", data)
    with pytest.raises(LexibitError, match=r"no train\.tsv in it"):
        evaluate(folders[0], "mrpc", data, split="train")
    with pytest.raises(LexibitError, match="train one with lexibit finetune"):
        evaluate(float_folder("bert", "encoder"), "mrpc", data)
    with pytest.raises(LexibitError, match="no such folder or file"):
        evaluate(data / "none", "mrpc", data)


# the command -----------------------------------------------------------------------------------------


def test_evaluate_prints_scores_and_differences(
    run: Callable[..., Any], folders: tuple[Path, Path], data: Path
) -> None:
    floats, packed = folders
    code, out, _ = run("evaluate", packed, "--task", "mrpc", "--data", data, "--against", floats)
    assert code == 0
    for said in ("accuracy x 100", "F1 x 100", "less", "difference"):
        assert said in out


def test_evaluate_as_json_and_in_a_file_is_the_python_call(
    run_json: Callable[..., Any], folders: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    options = ["--task", "mrpc", "--data", data, "--limit", "20", "--seed", "1", "--out", file]
    found = run_json("evaluate", folders[1], *options)
    expected = asdict(evaluate(folders[1], "mrpc", data, limit=20, seed=1))
    for result in (found, expected):
        for score in result["scores"][str(folders[1])]:
            assert score.pop("seconds") > 0
    assert found == expected
    assert json.loads(file.read_text())["task"] == "mrpc"


def test_evaluate_fails_with_a_word_on_what_is_missing(
    fails: Callable[..., str], folders: tuple[Path, Path], data: Path
) -> None:
    assert "did you mean 'mrpc'" in fails("evaluate", folders[0], "--task", "mrpcc", "--data", data)
    assert "no dev.tsv in it" in fails("evaluate", folders[0], "--task", "rte", "--data", data)
    assert "Missing option '--task'" in fails("evaluate", folders[0], code=2)


def test_a_quantized_model_is_measured_in_int8(folders: tuple[Path, Path], data: Path) -> None:
    floats, packed = folders
    found = evaluate(packed, "mrpc", data, against=floats, compute="int8")
    assert found.compute == "int8"
    assert list(found.scores) == [str(packed), str(floats)]
    with pytest.raises(LexibitError, match="no weights in codes: quantize it first"):
        evaluate(floats, "mrpc", data, compute="int8")
    with pytest.raises(LexibitError, match="unknown compute 'int4'"):
        evaluate(packed, "mrpc", data, compute="int4")
