"""Work on a tiny study: each step once, whatever is killed, damaged or shared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import lexibit
from lexibit import LexibitError, checkpoint
from lexibit.nn import codebooks
from lexibit.study import Study, cells, results, run, weights

SOURCE = Path(lexibit.__file__).parents[1]
CELLS = 9


def mtimes(folder: Path, name: str = "step.json") -> dict[str, int]:
    """When each step of a study was done."""
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob(f"steps/*/{name}")}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, texts):
    """A study that is done."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    study = Study(
        name="tiny",
        models={"tiny": str(tiny)},
        tasks=["classification"],
        data=str(texts),
        schemes={"linear": {"scheme": "linear"}, "k-means": {"scheme": "kmeans", "groups": "row"}},
        bits=[2, 3],
        finetune={"max_steps": 3},
        tune={"max_steps": 2},
    )
    done = run(study, folder)
    assert (done.cells, done.before, done.failed) == (CELLS, 0, 0)
    return study, folder


# what comes out ---------------------------------------------------------------------------------------------


def test_every_cell_has_a_row_for_each_metric_with_all_that_repeats_it(made):
    _, folder = made
    found = results(folder)
    assert len(found) == 2 * CELLS
    assert set(found["metric"]) == {"accuracy x 100", "macro F1 x 100"}
    assert found["error"].isna().all()
    assert found["score"].between(found["low"], found["high"]).all()
    assert (found["examples"] == 40).all()
    for column in ("bytes", "parameters", "peak_memory", "evaluate_seconds", "finetune_seconds"):
        assert (found[column] > 0).all(), column
    quantized = found[found["scheme"] != "float"]
    assert (quantized["quantize_seconds"] > 0).all()
    assert (quantized[quantized["tuned"]]["tune_seconds"] > 0).all()
    assert json.loads(found["versions"][0])["lexibit"] == lexibit.__version__
    assert found["commands"][0].splitlines()[0].startswith("lexibit finetune ")


def test_the_results_are_a_parquet_data_set_that_others_read(made):
    _, folder = made
    found = pd.read_parquet(folder / "results")
    assert sorted(found["cell"]) == sorted(results(folder)["cell"])


def test_sizes_are_those_on_disk_and_the_models_are_quantized(made):
    _, folder = made
    for row in results(folder).drop_duplicates("cell").to_dict("records"):
        if row["scheme"] == "float":
            continue
        model = folder / "steps" / row["model_key"] / "model"
        assert row["bytes"] == sum(file.stat().st_size for file in model.glob("*.safetensors"))
        found = codebooks(checkpoint.load_quantized(model))
        assert {weight.spec.bits for weight in found.values()} == {row["bits"]}
        assert row["bits_per_weight"] == pytest.approx(checkpoint.inspect(model).bits_per_weight)


def test_scores_are_those_of_the_commands_alone(made, run_json, texts):
    _, folder = made
    row = results(folder).iloc[-1]
    model = folder / "steps" / row["model_key"] / "model"
    said = run_json("evaluate", model, "--task", "classification", "--data", texts)
    (scores,) = said["scores"].values()
    assert scores[-1]["value"] == row["score"]


def test_each_weight_of_a_cell_is_described(made):
    _, folder = made
    found = results(folder)
    tuned = found[(found["scheme"] == "k-means") & found["tuned"]].iloc[0]
    told = weights(folder, tuned["model_key"])
    assert told
    assert all(one["relative_error"] > 0 for one in told)
    assert weights(folder, "no-such-step") is None


# again ------------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(made):
    study, folder = made
    before = mtimes(folder)
    done = run(study, folder)
    assert (done.before, done.failed) == (CELLS, 0)
    assert mtimes(folder) == before


def test_a_study_that_grows_does_only_what_is_new(made):
    study, folder = made
    before = mtimes(folder)
    fields = {name: getattr(study, name) for name in study.__dataclass_fields__}
    done = run(Study(**fields | {"bits": [2, 3, 4], "tune": None}), folder)
    assert (done.cells, done.before) == (7, 5)
    after = mtimes(folder)
    assert {name: after[name] for name in before} == before
    assert (
        sorted(name.split("-")[0] for name in set(after) - set(before)) == ["evaluate"] * 2 + ["quantize"] * 2
    )
    # and what the study does not ask for any more is no longer among its results
    assert set(results(folder)["bits"]) == {32, 2, 3, 4}
    assert not results(folder)["tuned"].any()
    run(study, folder)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "gone"])
def test_damaged_results_are_seen_and_made_anew(made, damage, caplog):
    study, folder = made
    expected = results(folder)
    file = sorted((folder / "results").glob("*.parquet"))[3]
    whole = file.read_bytes()
    steps = mtimes(folder)
    if damage == "gone":
        file.unlink()
    else:
        flipped = bytearray(whole)
        flipped[4:104] = bytes(byte ^ 255 for byte in flipped[4:104])  # of the first column
        others = sorted((folder / "results").glob("*.parquet"))[4].read_bytes()
        made_of = {"cut": whole[: len(whole) // 2], "flipped": bytes(flipped), "empty": b"", "other": others}
        file.write_bytes(made_of[damage])
    assert len(results(folder)) < len(expected)
    done = run(study, folder)
    assert (done.before, done.failed) == (CELLS - 1, 0)
    pd.testing.assert_frame_equal(results(folder), expected)
    # its steps were whole, and so not done again
    assert mtimes(folder) == steps


def test_a_damaged_model_is_made_anew_when_it_is_needed(made, tmp_path):
    study, folder = made
    expected = results(folder)
    (evaluate,) = {
        cell.evaluate for cell in cells(study) if cell.labels == row_labels(expected, "k-means", 3)
    }
    quantize = evaluate.model
    file = quantize.out(folder / "steps") / "model.safetensors"
    whole, before = file.read_bytes(), mtimes(folder)
    file.write_bytes(whole[:-9])
    evaluate.out(folder / "steps").unlink()
    for cell in cells(study):
        if cell.evaluate == evaluate:
            (folder / "results" / f"{cell.key}.parquet").unlink()
    assert run(study, folder).before == CELLS - 1
    assert file.read_bytes() == whole
    changed = {name for name, at in mtimes(folder).items() if at != before[name]}
    assert changed == {quantize.name, evaluate.name}
    assert results(folder)["score"].equals(expected["score"])


def row_labels(found, scheme, bits):
    rows = found[(found["scheme"] == scheme) & (found["bits"] == bits) & ~found["tuned"]]
    row = rows.iloc[0]
    names = ["model", "task", "scheme", "bits", "groups", "importance", "tuned", "seed"]
    return {name: None if pd.isna(row[name]) else row[name] for name in names}


# faults -----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from lexibit.cli import main
if __name__ == "__main__":
    sys.argv = ["lexibit", "study", "run", *sys.argv[1:]]
    main()
"""


def start(tmp_path, file, folder, *options):
    script = tmp_path / "start.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, script, file, "--out", folder, "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def ended(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return json.loads(out)


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def descendants(pid):
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [below for child in found for below in descendants(child)]


def is_there(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_killed_study_goes_on_and_does_nothing_twice(settings, write, tmp_path):
    file, folder = write(settings), tmp_path / "out"
    first = start(tmp_path, file, folder)
    until(lambda: len(mtimes(folder)) >= 4)
    children = descendants(first.pid)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    # its processes end with it, and free what they hold
    until(lambda: not any(map(is_there, children)))
    before = mtimes(folder)
    assert before
    done = ended(start(tmp_path, file, folder))
    assert (done["cells"], done["failed"]) == (CELLS, 0)
    after = mtimes(folder)
    assert {name: after[name] for name in before} == before
    # the same as without a kill
    uninterrupted = tmp_path / "uninterrupted"
    ended(start(tmp_path, file, uninterrupted))
    same = ["cell", "score", "low", "high", "bytes", "bits_per_weight", "model_key"]
    pd.testing.assert_frame_equal(results(folder)[same], results(uninterrupted)[same])


@pytest.mark.parametrize("when", ["noted", "described"])
def test_a_result_that_a_kill_left_unnoted_is_kept(made, when):
    study, folder = made
    expected = results(folder)
    quantize = next(cell.evaluate.model for cell in cells(study) if cell.labels["scheme"] == "k-means")
    model = quantize.out(folder / "steps") / "model.safetensors"
    evaluate = next(cell.evaluate for cell in cells(study) if cell.evaluate.model == quantize)
    at = model.stat().st_mtime_ns
    names = ["step.json", "weights.json"] if when == "noted" else ["weights.json"]
    for name in names:
        (folder / "steps" / quantize.name / name).unlink()
    evaluate.out(folder / "steps").unlink()
    for cell in cells(study):
        if cell.evaluate == evaluate:
            (folder / "results" / f"{cell.key}.parquet").unlink()
    assert run(study, folder).failed == 0
    assert model.stat().st_mtime_ns == at
    assert weights(folder, quantize.name)
    assert results(folder)["score"].equals(expected["score"])


def test_training_that_was_interrupted_begins_anew_where_the_same_data_is_elsewhere(
    settings, texts, tmp_path
):
    folder = tmp_path / "out"
    study = Study(**settings | {"schemes": {"linear": {"scheme": "linear"}}, "bits": [3], "tune": None})
    (finetune,) = {step for cell in cells(study) for step in cell.steps() if step.command == "finetune"}
    left = folder / "steps" / finetune.name / "model.training"
    (left / "checkpoint-1").mkdir(parents=True)
    (left / "run.json").write_text(json.dumps({"model": finetune.model, "data": "/elsewhere"}))
    (left / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (folder / "study.json").write_text("{}")
    assert run(study, folder).failed == 0
    assert not left.exists()


def test_two_processes_share_a_study_and_do_each_step_once(settings, write, tmp_path):
    file, folder = write(settings), tmp_path / "out"
    both = [start(tmp_path, file, folder) for _ in range(2)]
    told = [ended(process) for process in both]
    assert [one["failed"] for one in told] == [0, 0]
    found = results(folder)
    assert found["cell"].nunique() == CELLS
    assert found["error"].isna().all()
    # a step that is done twice tells so twice in its log
    for step in (folder / "steps").iterdir():
        said = (step / "log.txt").read_text()
        assert said.count("$ lexibit ") == 1, step.name


def test_a_failing_cell_is_recorded_and_the_others_go_on(settings, tmp_path):
    settings |= {"tune": None}
    settings["schemes"]["broken"] = {"scheme": "kmeans", "include": ["no.such.weight"]}
    study, folder = Study(**settings), tmp_path / "out"
    done = run(study, folder)
    assert (done.cells, done.failed) == (7, 2)
    failed = results(folder)[results(folder)["scheme"] == "broken"]
    assert failed["error"].str.contains("lexibit quantize: .*no.such.weight|lexibit quantize: nothing").all()
    assert failed["score"].isna().all()
    assert results(folder)["score"].notna().sum() == 10
    # and tried again
    again = run(study, folder)
    assert (again.before, again.failed) == (5, 2)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from lexibit.study import Cell, Store
from lexibit.study.pools import Processes
from lexibit.study.runner import run_cells
from lexibit.study.steps import Step

class Fake(Step):
    def work(self, steps):
        if self.key == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.key == "broken":
            raise RuntimeError("a fault of the program")
        score = {"metric": "m", "value": 1.0, "low": 0.0, "high": 2.0, "higher": True, "examples": 3}
        self.out(steps).write_text(json.dumps({"scores": {"m": [score]}, "split": "dev"}))
        return {"bytes": 1, "parameters": 1, "bits_per_weight": 8.0, "bits_per_parameter": 8.0}

if __name__ == "__main__":
    store = Store(Path(sys.argv[1]))
    store.begin({})
    labels = {"model": "m", "task": "t", "scheme": "s", "groups": None, "importance": None, "tuned": False}
    names = ["one", "killed", "two", "broken", "three"]
    made = [
        Cell(labels | {"bits": bits, "seed": 0}, Fake(name, "evaluate")) for bits, name in enumerate(names)
    ]
    with Processes(2, 10**9) as pool:
        before, failed = run_cells(made, store, pool, "faults")
    errors = [store.read_rows(cell.key)[0]["error"] for cell in made]
    print(json.dumps({"failed": failed, "errors": dict(zip(names, errors))}))
"""


def test_a_process_that_is_killed_takes_its_own_cell_and_no_other(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "out"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["failed"] == 2
    assert "its process was killed" in told["errors"].pop("killed")
    assert told["errors"].pop("broken") == "lexibit evaluate: RuntimeError: a fault of the program"
    assert told["errors"] == {"one": None, "two": None, "three": None}


def test_a_folder_of_something_else_is_left_alone(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    with pytest.raises(LexibitError, match="holds something else than a study"):
        run(Study(**settings), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious.txt"]
