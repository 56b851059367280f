"""Work that is cut short, by a kill, a fault or another process, and gone on with."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lexibit
from lexibit import FormatError, LexibitConfig, LexibitError, checkpoint
from lexibit.checkpoint import streaming, target
from lexibit.checkpoint.unfinished import unfinished

SOURCE = Path(lexibit.__file__).parents[1]
CONFIG = LexibitConfig(scheme="kmeans", bits=6, options={"init": "k-means++", "iterations": 40})

# Begins again and again, each time in a new process that gets some time and then SIGKILL; compares what is
# whole with what is expected, and goes on until it has killed so many times.
KILLS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from lexibit import LexibitConfig, checkpoint
source, out, expected, kills = *map(Path, sys.argv[1:4]), int(sys.argv[4])
config = LexibitConfig(scheme="kmeans", bits=6, options={"init": "k-means++", "iterations": 40})
journal = out.with_name(f".{out.name}.unfinished") / "journal.jsonl"
random.seed(1)
finished = killed = whole = 0
while killed < kills or not whole:
    child = os.fork()
    if child == 0:
        try:
            checkpoint.quantize_to(source, out, config, progress=False)
        except BaseException as error:
            print("FAULT", error, flush=True)
        os._exit(0)
    if killed < kills:
        time.sleep(random.random() * 0.4)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    killed += os.WIFSIGNALED(status)
    if out.exists():
        for path in expected.rglob("*"):
            assert (out / path.relative_to(expected)).read_bytes() == path.read_bytes(), path
        assert len(list(out.rglob("*"))) == len(list(expected.rglob("*")))
        shutil.rmtree(out)
        whole, finished = whole + 1, 0
        continue
    now = journal.read_bytes().count(b"\\n") if journal.exists() else 0
    assert now >= finished, (now, finished)
    finished = now
print("killed", killed, "whole", whole)
"""


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def environment():
    return os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def streamed(source, out, config=CONFIG, **options):
    checkpoint.quantize_to(source, out, config, progress=False, **options)
    return contents(out)


@pytest.fixture
def slow_folder(float_folder):
    """A model of some fifty weights, each of some hundredths of a second."""
    return float_folder("bert", hidden_size=64, intermediate_size=256, num_hidden_layers=8, vocab_size=800)


@pytest.fixture
def stopping(monkeypatch):
    """A function that lets so many weights be quantized, and then fails."""

    def after(count, error):
        quantize_planned, left = streaming.quantize_planned, [count]

        def stop(*arguments, **options):
            if left[0] == 0:
                raise error
            left[0] -= 1
            return quantize_planned(*arguments, **options)

        monkeypatch.setattr(streaming, "quantize_planned", stop)
        monkeypatch.setattr(streaming.torch, "get_num_threads", lambda: 1)
        return lambda: monkeypatch.setattr(streaming, "quantize_planned", quantize_planned)

    return after


@pytest.fixture
def counted(monkeypatch):
    """The names of the weights that are quantized from here on."""
    quantize_planned, names = streaming.quantize_planned, []

    def count(planned, *arguments, **options):
        names.append(planned.name)
        return quantize_planned(planned, *arguments, **options)

    monkeypatch.setattr(streaming, "quantize_planned", count)
    return names


def test_fifty_kills_end_in_the_same_bytes(float_folder, tmp_path):
    source = float_folder("bert", hidden_size=64, intermediate_size=256, num_hidden_layers=4, vocab_size=800)
    streamed(source, tmp_path / "expected")
    done = subprocess.run(
        [sys.executable, "-c", KILLS, source, tmp_path / "packed", tmp_path / "expected", "50"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "FAULT" not in done.stdout
    killed, whole = map(int, done.stdout.split()[1::2])
    assert killed == 50
    assert whole >= 1
    assert {path.name for path in tmp_path.iterdir()} <= {"float", "expected", ".packed.unfinished"}


def test_what_was_finished_is_not_done_again(float_folder, tmp_path, stopping, caplog):
    source = float_folder("bert")
    expected = streamed(source, tmp_path / "expected")
    go_on = stopping(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING, "lexibit"):
        streamed(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert "keeps what is finished: the same command goes on with it" in caplog.text
    caplog.clear()
    go_on()
    quantize_planned, names = streaming.quantize_planned, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            streaming,
            "quantize_planned",
            lambda planned, *rest, **seed: (
                names.append(planned.name) or quantize_planned(planned, *rest, **seed)
            ),
        )
        assert streamed(source, tmp_path / "packed") == expected
    assert len(names) == len(checkpoint.plan(source, CONFIG).weights) - 5
    assert {path.name for path in tmp_path.iterdir()} == {"float", "expected", "packed"}


@pytest.mark.parametrize("change", ["bits", "source", "shards"])
def test_other_work_begins_anew_and_says_so(float_folder, tmp_path, stopping, counted, caplog, change):
    source = float_folder("bert")
    go_on = stopping(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        streamed(source, tmp_path / "packed")
    go_on()
    counted.clear()
    config, options = CONFIG, {}
    if change == "bits":
        config = LexibitConfig(scheme="linear", bits=2)
    elif change == "source":
        tensors = load_file(source / "model.safetensors")
        tensors["embeddings.word_embeddings.weight"][0, 0] += 1
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    else:
        options = {"shard_size": 3000}
    with caplog.at_level(logging.WARNING, "lexibit"):
        found = streamed(source, tmp_path / "packed", config, **options)
    assert "begins anew" in caplog.text
    assert found == streamed(source, tmp_path / "expected", config, **options)


def test_what_is_not_as_it_was_written_is_done_again(float_folder, tmp_path, stopping):
    source = float_folder("bert")
    expected = streamed(source, tmp_path / "expected")
    go_on = stopping(9, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        streamed(source, tmp_path / "packed")
    go_on()
    work = tmp_path / ".packed.unfinished"
    # as after a power cut: the journal is on the disk but for its last line, what it tells of is not
    file = work / "folder" / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(b"\0" * size)
    journal = work / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert streamed(source, tmp_path / "packed") == expected


def test_a_journal_of_anything_is_no_reason_to_fail(float_folder, tmp_path):
    source = float_folder("bert")
    expected = streamed(source, tmp_path / "expected")
    work = tmp_path / ".packed.unfinished"
    for text in (b"", b"[1]\n", b"\xff\xfe\n{}\n", b'{"key": 3}\n', b"{" * 5000):
        work.mkdir()
        (work / "journal.jsonl").write_bytes(text)
        assert streamed(source, tmp_path / "packed") == expected
        assert not work.exists()
        for path in (tmp_path / "packed").iterdir():
            path.unlink()
        (tmp_path / "packed").rmdir()


def test_one_process_at_a_time(slow_folder, tmp_path):
    code = """
import sys
from pathlib import Path
from lexibit import checkpoint
from lexibit.checkpoint.unfinished import unfinished
with unfinished(Path(sys.argv[1]), "key") as work:
    (work.folder / "mine").write_text("mine")
    print("begun", flush=True)
    sys.stdin.readline()
"""
    out = tmp_path / "packed"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert other.stdout.readline() == "begun\n"
        with pytest.raises(LexibitError, match="another process is writing it"):
            streamed(slow_folder, out)
        assert not out.exists()
        other.communicate("\n", timeout=60)
    finally:
        other.kill()
    assert contents(out) == {"mine": b"mine"}
    with pytest.raises(LexibitError, match="exists already"):
        streamed(slow_folder, out)


def test_many_at_once_give_one_whole_folder(slow_folder, tmp_path):
    out = tmp_path / "packed"
    code = """
import os, random, sys, time
from pathlib import Path
import torch
from lexibit import LexibitConfig, checkpoint
source, out = map(Path, sys.argv[1:3])
config = LexibitConfig(scheme="linear", bits=3)
children = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        time.sleep(random.random() * 0.2)
        try:
            checkpoint.quantize_to(source, out, config, progress=False)
        except Exception as error:
            os._exit(3 if "another process" in str(error) or "exists already" in str(error) else 4)
        os._exit(0)
    children.append(child)
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, slow_folder, out],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    assert codes.count(0) == 1, codes
    assert set(codes) == {0, 3}, codes
    assert contents(out) == streamed(
        slow_folder, tmp_path / "expected", LexibitConfig(scheme="linear", bits=3)
    )


# faults of the disk -----------------------------------------------------------------------------------------


def fails(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 7, done.stderr
    return done.stdout


LIMITED = """
import resource, signal, sys
from pathlib import Path
import lexibit
from lexibit import checkpoint
from lexibit.checkpoint import streaming
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
config = lexibit.LexibitConfig(scheme="kmeans", bits=6, options={"init": "k-means++", "iterations": 40})
try:
    checkpoint.quantize_to(Path(sys.argv[1]), Path(sys.argv[2]), config, progress=False)
except lexibit.LexibitError as error:
    print(error)
    sys.exit(7)
"""


def test_a_disk_that_is_too_small_is_known_before_any_work(float_folder, tmp_path):
    source = float_folder("bert", vocab_size=5000)
    out = fails(LIMITED, source, tmp_path / "packed", 20_000)
    assert f"{tmp_path / 'packed'}: cannot be written" in out
    assert "free some space" in out
    assert "nothing was left there" in out
    assert {path.name for path in tmp_path.iterdir()} == {"float"}


def test_a_disk_that_fills_up_later_keeps_what_is_finished(float_folder, tmp_path, monkeypatch, counted):
    source = float_folder("bert")
    expected = streamed(source, tmp_path / "expected")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, "copy_companions", fail)
        with pytest.raises(LexibitError, match=r"free some space.*finished is kept in .*packed\.unfinished"):
            streamed(source, tmp_path / "packed")
    counted.clear()
    assert streamed(source, tmp_path / "packed") == expected
    assert counted == []


def test_an_output_in_a_folder_of_others_is_an_error(float_folder, tmp_path):
    source = float_folder("bert")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LexibitError, match="cannot be written"):
        streamed(source, tmp_path / "file" / "packed")


def test_a_new_folder_has_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with unfinished(tmp_path / "out", "key") as work:
            (work.folder / "file").write_text("text")
            os.chmod(work.folder / "file", 0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o640


def test_the_bytes_do_not_depend_on_the_number_of_threads(float_folder, tmp_path):
    source = float_folder("bert")
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(streamed(source, tmp_path / str(threads)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_a_companion_that_was_cut_short_is_copied_anew(float_folder, tmp_path, monkeypatch, counted):
    source = float_folder("bert")
    expected = streamed(source, tmp_path / "expected")

    def fail(content, copy):
        copy.write(content.read(100))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target.shutil, "copyfileobj", fail)
        with pytest.raises(LexibitError, match="finished is kept"):
            streamed(source, tmp_path / "packed")
    cut = [path for path in (tmp_path / ".packed.unfinished" / "folder").glob("*token*")]
    assert [path.stat().st_size for path in cut] == [100]
    (source / "tokenizer_config.json").write_text("{}")  # changed meanwhile
    counted.clear()
    found = streamed(source, tmp_path / "packed")
    assert counted == []
    assert found["tokenizer.json"] == expected["tokenizer.json"]
    assert found["tokenizer_config.json"] == b"{}"


def begun(source, out, stopping):
    go_on = stopping(5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        streamed(source, out)
    go_on()
    return (out.with_name(f".{out.name}.unfinished") / "journal.jsonl").read_bytes()


def test_a_wrong_option_takes_nothing_of_what_is_finished(float_folder, tmp_path, stopping):
    source, out = float_folder("bert"), tmp_path / "packed"
    before = begun(source, out, stopping)
    for workers in (streaming.Local(1000), streaming.Cluster("127.0.0.1:1")):
        with pytest.raises(LexibitError, match=r"--memory allows|no cluster there"):
            streamed(source, out, workers=workers)
        assert (tmp_path / ".packed.unfinished" / "journal.jsonl").read_bytes() == before


def test_a_weight_that_is_wrong_takes_nothing_of_an_earlier_runs_work(float_folder, tmp_path, stopping):
    source, out = float_folder("bert"), tmp_path / "packed"
    begun(source, out, stopping)
    stopping(0, LexibitError("wrong"))
    with pytest.raises(LexibitError, match="wrong"):
        streamed(source, out)
    assert (tmp_path / ".packed.unfinished" / "journal.jsonl").read_bytes().count(b"\n") == 6


def test_a_journal_that_cannot_be_read_takes_nothing(float_folder, tmp_path, stopping, monkeypatch):
    source, out = float_folder("bert"), tmp_path / "packed"
    before = begun(source, out, stopping)

    def fail(_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("lexibit.checkpoint.unfinished._lines", fail)
        with pytest.raises(LexibitError, match="finished is kept"):
            streamed(source, out)
    assert (tmp_path / ".packed.unfinished" / "journal.jsonl").read_bytes() == before


def test_a_source_that_is_cut_short_while_it_is_read_is_an_error(float_folder, tmp_path):
    source = float_folder("bert")
    expected = streamed(source, tmp_path / "expected")
    whole = (source / "model.safetensors").read_bytes()
    found = streaming.Job.memory  # what is asked when the headers are read, and no weight is

    def cut(job):
        os.truncate(source / "model.safetensors", len(whole) // 2)
        return found.fget(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.Job, "memory", property(cut))
        with pytest.raises(FormatError, match=r"model\.safetensors: ends inside of"):
            streamed(source, tmp_path / "packed")
    (source / "model.safetensors").write_bytes(whole)
    assert streamed(source, tmp_path / "packed") == expected


def test_a_name_relative_to_the_working_folder(float_folder, tmp_path, monkeypatch):
    source = float_folder("bert")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    streamed(Path("../float"), Path("../packed"))
    checkpoint.load_quantized(Path("../packed"))
    streamed(Path("../float"), Path("."))
    assert contents(tmp_path / "here") == contents(tmp_path / "packed")
    assert source.is_dir()
