"""Trials in a database: resumed after kills, shared by processes, failing without harm."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from lexibit.errors import LexibitError
from lexibit.search.trials import Trials, finished, storage

RANGES = {"x": (-2.0, 2.0, False), "y": (1e-3, 1.0, True)}
STARTS = [{"x": 1.5, "y": 1.0}, {"x": -1.0, "y": 0.5}]


def bowl(at: Mapping[str, float]) -> float:
    return (at["x"] - 0.5) ** 2 + math.log10(at["y"] / 0.03) ** 2


def study(file: Path, name: str = "one", **more: object) -> Trials:
    where = storage(f"sqlite:///{file}")
    return Trials(name, "first", where, RANGES, STARTS, **more)  # type: ignore[arg-type]


def tried(trials: Trials) -> list[tuple[int, dict[str, float], float]]:
    return [(trial.number, dict(trial.parameters), trial.value) for trial in trials.done(99)]


def test_it_begins_where_it_was_told_and_gains(tmp_path: Path) -> None:
    trials = study(tmp_path / "a.db")
    seen: list[int] = []
    trials.run(bowl, 16, seen=lambda trial: seen.append(trial.number))
    assert seen == list(range(16))
    assert [dict(trial.parameters) for trial in trials.done(2)] == STARTS
    assert trials.best(16).value < 0.1 < min(map(bowl, STARTS))


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_a_seed_decides_all(tmp_path: Path, sampler: str) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trials = study(tmp_path / f"{name}.db", seed=seed, sampler=sampler)
        trials.run(bowl, 13)
        found.append(tried(trials))
    assert found[0] == found[1]
    assert found[0][:2] == found[2][:2]
    assert found[0] != found[2]


# tries with a wait, and tells when it is in the middle of one, and how often it was
_WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trials import bowl, study

def slow(at):
    with Path({flag!r}).open("a") as told:
        told.write("busy ")
    time.sleep({wait})
    return bowl(at)

study(Path({file!r}), seed=3).run(slow, {count})
"""


def worker(file: Path, flag: Path, wait: float, count: int) -> subprocess.Popen[bytes]:
    tests = str(Path(__file__).parent)
    code = _WORKER.format(tests=tests, flag=str(flag), wait=wait, file=str(file), count=count)
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_killed_again_and_again_it_ends_where_an_unbroken_search_ends(tmp_path: Path) -> None:
    whole = study(tmp_path / "whole.db", seed=3)
    whole.run(bowl, 14)
    file, flag = tmp_path / "broken.db", tmp_path / "flag"
    kills = 0
    for _ in range(3):
        running = worker(file, flag, 0.3, 14)
        for _ in range(3):  # trials of this life
            flag.unlink(missing_ok=True)
            deadline = time.monotonic() + 120
            while not flag.exists() and time.monotonic() < deadline:
                time.sleep(0.005)
        kills += running.poll() is None
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert kills == 3
    trials = study(file, seed=3)
    assert 3 <= len(trials.done(14)) < 14
    trials.run(bowl, 14)
    assert tried(trials) == tried(whole)


def test_two_processes_share_the_trials(tmp_path: Path) -> None:
    file = tmp_path / "shared.db"
    study(file, seed=3)
    both = [worker(file, tmp_path / name, 0.2, 12) for name in ("a", "b")]
    assert [one.wait(timeout=300) for one in both] == [0, 0]
    trials = study(file, seed=3)
    assert [trial.number for trial in trials.done(99)] == list(range(12))
    # and none is made twice
    assert sum(len((tmp_path / name).read_text().split()) for name in ("a", "b")) == 12
    with sqlite3.connect(file) as opened:
        (workers,) = opened.execute(
            "select count(distinct value_json) from trial_user_attributes where key = 'worker'"
        ).fetchone()
    assert workers == 2


def test_more_trials_than_are_asked_for_do_not_count(tmp_path: Path) -> None:
    trials = study(tmp_path / "a.db")
    trials.run(bowl, 4)
    first = trials.best(2)
    assert first.number < 2
    assert len(trials.done(2)) == 2
    trials.run(lambda at: -1.0, 5)
    assert trials.best(2) == first
    assert trials.best(5).value == -1


def test_of_two_that_take_a_place_one_gets_it(tmp_path: Path) -> None:
    one, other = study(tmp_path / "a.db"), study(tmp_path / "a.db")
    seen: list[object] = []

    def meanwhile(at: Mapping[str, float]) -> float:
        if not seen:  # the other saw the place free as well, and is later
            seen.append(other._one(0, lambda at: 7.0))
        return bowl(at)

    one.run(meanwhile, 2)
    assert seen == [None]
    assert [(trial.number, trial.value) for trial in one.done(9)] == list(enumerate(map(bowl, STARTS)))


def test_what_a_search_has_is_counted_over_its_stages(tmp_path: Path) -> None:
    where = storage(f"sqlite:///{tmp_path / 'a.db'}")
    assert finished(where, "one") == 0
    for name, stage, count in (("one", "first", 3), ("one", "second", 2), ("one more", "first", 2)):
        Trials(name, stage, where, RANGES, STARTS).run(bowl, count)
    assert finished(where, "one") == 5


def test_a_trial_that_was_given_up_meanwhile_is_tried_again(tmp_path: Path) -> None:
    trials, other = study(tmp_path / "a.db"), study(tmp_path / "a.db")
    calls: list[float] = []

    def slow(at: Mapping[str, float]) -> float:
        calls.append(at["x"])
        if len(calls) == 1:
            other._fail(0)
        return bowl(at)

    trials.run(slow, 2)
    assert calls == [STARTS[0]["x"], STARTS[0]["x"], STARTS[1]["x"]]
    assert [trial.number for trial in trials.done(9)] == [0, 1]
    other._fail(0)  # twice is once


def test_many_processes_may_make_the_database(tmp_path: Path) -> None:
    four = [worker(tmp_path / "new.db", tmp_path / str(number), 0.0, 3) for number in range(4)]
    assert [one.wait(timeout=300) for one in four] == [0, 0, 0, 0]
    assert len(study(tmp_path / "new.db", seed=3).done(9)) == 3
    told = [tmp_path / str(number) for number in range(4)]
    assert sum(len(file.read_text().split()) for file in told if file.exists()) == 3


def test_a_trial_that_fails_is_told_and_the_search_goes_on(tmp_path: Path) -> None:
    calls: list[float] = []

    def sometimes(at: Mapping[str, float]) -> float:
        calls.append(at["x"])
        if len(calls) == 1:
            raise LexibitError("w: no")
        return math.nan if len(calls) == 2 else bowl(at)

    trials = study(tmp_path / "a.db")
    trials.run(sometimes, 5)
    assert len(calls) == 5
    assert [trial.fault for trial in trials.done(5)] == ["w: no", "the objective is nan", None, None, None]
    assert trials.best(5).number >= 2
    trials.run(sometimes, 5)
    assert len(calls) == 5
    nothing = study(tmp_path / "a.db", "two")
    nothing.run(lambda at: math.inf, 2)
    with pytest.raises(
        LexibitError, match=r"'two', first: none of its 2 trials succeeded \(the objective is inf\): mend"
    ):
        nothing.best(2)


def test_an_error_that_is_no_trials_own_stops_and_the_place_is_tried_again(tmp_path: Path) -> None:
    def broken(at: Mapping[str, float]) -> float:
        raise RuntimeError("a bug")

    trials = study(tmp_path / "a.db")
    with pytest.raises(RuntimeError, match="a bug"):
        trials.run(broken, 3)
    assert trials.done(3) == []
    trials.run(bowl, 3)
    assert [trial.number for trial in trials.done(9)] == [0, 1, 2]
    assert dict(trials.done(1)[0].parameters) == STARTS[0]


def test_a_study_with_other_settings_is_refused(tmp_path: Path) -> None:
    study(tmp_path / "a.db", settings={"bits": 3})
    with pytest.raises(
        LexibitError, match=r"study 'one', first: was begun with bits 3, now it is 2: go on .*--study"
    ):
        study(tmp_path / "a.db", settings={"bits": 2})
    with pytest.raises(LexibitError, match="was begun with bits 3, now it is not given"):
        study(tmp_path / "a.db")
    nested = {"config": {"bits": 3, "scheme": "binary"}, "model_sha256": "00"}
    study(tmp_path / "a.db", "two", settings=nested)
    other = {"config": {"bits": 3, "scheme": "lq"}}
    with pytest.raises(LexibitError, match=r"was begun with config\.scheme 'binary', now it is 'lq'"):
        study(tmp_path / "a.db", "two", settings=nested | other)
    with pytest.raises(LexibitError, match="was begun with different model:"):
        study(tmp_path / "a.db", "two", settings=nested | {"model_sha256": "01"})
    with pytest.raises(LexibitError, match="was begun with seed 0, now it is 1"):
        study(tmp_path / "a.db", settings={"bits": 3}, seed=1)
    with pytest.raises(LexibitError, match=r"unknown sampler 'grid'.*known: gp, tpe"):
        study(tmp_path / "a.db", sampler="grid")


def test_a_storage_that_cannot_be_used_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(LexibitError, match=r"sqlite:////no/such/folder/a\.db: the storage .* cannot be used"):
        storage("sqlite:////no/such/folder/a.db")
    with pytest.raises(LexibitError, match="nosuch://host/x: the storage of the search cannot be used"):
        storage("nosuch://host/x")
    file = tmp_path / "full.db"
    trials = study(file)
    trials.run(bowl, 3)

    def fills(at: Mapping[str, float]) -> float:
        with sqlite3.connect(file) as opened:
            opened.execute("drop table trial_values")
        return bowl(at)

    with pytest.raises(LexibitError, match="the storage of the search cannot be used"):
        trials.run(fills, 4)


_FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trials import bowl, study
from lexibit.errors import LexibitError

trials = study(Path({file!r}), seed=3)
trials.run(bowl, 3)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
# as on a disk without room: no file may grow
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    trials.run(bowl, 6)
except LexibitError as error:
    print(error)
"""


def test_a_full_disk_is_an_error_and_the_search_goes_on_when_there_is_room(tmp_path: Path) -> None:
    file, whole = tmp_path / "full.db", study(tmp_path / "whole.db", seed=3)
    code = _FULL.format(tests=str(Path(__file__).parent), file=str(file))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "the storage of the search cannot be used" in ended.stdout
    trials = study(file, seed=3)
    assert 3 <= len(trials.done(6)) < 6
    trials.run(bowl, 6)
    whole.run(bowl, 6)
    assert tried(trials) == tried(whole)
