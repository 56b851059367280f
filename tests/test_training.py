"""Training on small data of known answers: that it learns, resumes, and leaves what it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from lexibit import LexibitConfig, LexibitError, checkpoint, quantize, tasks
from lexibit.nn import codebooks
from lexibit.training import Settings, trainer
from lexibit.training.distillation import distance
from lexibit.training.trainer import seed, train

FAST = Settings(epochs=6, learning_rate=3e-3, batch_size=16)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(folder: Path, count: int = 160, heldout: int = 60) -> Path:
    """Texts of which those that hold the word w7 are 'yes', the others 'no'."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", count), ("dev", heldout)):
        lines = ["label\ttext"]
        for index in range(number):
            words = [f"w{word}" for word in rng.integers(10, 97, rng.integers(3, 7))]
            if index % 2:
                words[int(rng.integers(len(words)))] = "w7"
            lines.append(f"{'yes' if index % 2 else 'no'}\t{' '.join(words)}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A tiny encoder with the weights that training begins with."""
    folder = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(0)
    transformers.BertModel(tiny_model("bert").config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, untrained: Path, data: Path) -> Path:
    """What it learns to be."""
    out = tmp_path_factory.mktemp("trained") / "out"
    Run(untrained, data).train(out, about={"model": "tiny"})
    return out


class Run:
    """A model, its tokenizer, and what it learns."""

    def __init__(self, folder: Path, data: Path, config: LexibitConfig | None = None) -> None:
        self.task = tasks.trainable("classification")
        self.learn, self.judge = self.task.load(data, "train"), self.task.load(data, "dev")
        self.tokenizer: PreTrainedTokenizerBase = checkpoint.load_tokenizer(folder)
        seed(0)
        self.model: PreTrainedModel = self.task.model(folder, self.learn)
        if config is not None:
            quantize(self.model, config, progress=False)

    def train(self, out: Path, settings: Settings = FAST, **more: Any) -> Any:
        return train(
            self.model,
            self.tokenizer,
            self.task,
            self.learn,
            self.judge,
            out,
            settings,
            progress=False,
            **more,
        )


def test_a_float_model_learns_and_is_saved_with_its_report(
    untrained: Path, trained: Path, data: Path
) -> None:
    run = Run(untrained, data)
    before = run.task.scores(run.task.outcomes(run.model, run.tokenizer, run.judge))
    assert before[0].value < 70
    report = json.loads((trained / "training.json").read_text())
    assert (report["model"], report["task"], report["settings"]["epochs"]) == ("tiny", "classification", 6)
    assert (report["steps"], report["resumed"]) == (60, False)
    assert report["scores"][0]["value"] > 90
    assert len([entry for entry in report["history"] if "eval_accuracy" in entry]) == 6
    assert list((trained / "logs").iterdir())
    assert not trained.with_name("out.training").exists()
    loaded = checkpoint.load_model(trained)
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    again = run.task.outcomes(loaded, checkpoint.load_tokenizer(trained), run.judge)
    assert run.task.scores(again)[0].value == report["scores"][0]["value"]


def test_tuning_makes_a_broken_quantized_model_good_again_and_no_larger(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    run = Run(trained, data, LexibitConfig("linear", 1, levels_dtype="float16"))
    run.model.save_pretrained(tmp_path / "before")
    codes = {name: weight.codes.clone() for name, weight in codebooks(run.model).items()}
    before = run.task.scores(run.task.outcomes(run.model, run.tokenizer, run.judge))[0]
    done = run.train(tmp_path / "tuned", Settings(epochs=4, learning_rate=1e-3, batch_size=16))
    assert before.value < 75
    assert done.scores[0].value > 90
    loaded = checkpoint.load_quantized(tmp_path / "tuned")
    assert all(torch.equal(weight.codes, codes[name]) for name, weight in codebooks(loaded).items())
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "tuned")]
    assert sizes[0] == sizes[1]
    again = run.task.outcomes(loaded, run.tokenizer, run.judge)
    assert run.task.scores(again)[0].value == done.scores[0].value


def test_patience_stops_early_and_keeps_the_best_epochs_model(
    untrained: Path, data: Path, tmp_path: Path
) -> None:
    run = Run(untrained, data)
    done = run.train(tmp_path / "out", Settings(epochs=12, learning_rate=5e-3, batch_size=16, patience=2))
    history = json.loads((tmp_path / "out" / "training.json").read_text())["history"]
    scores = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    assert len(scores) < 12
    assert max(scores[-2:]) <= max(scores[:-2])
    assert done.scores[0].value == max(scores)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 12, "learning_rate": 5e-3, "patience": 1},
        {"epochs": 1.5},  # within an epoch
        {"max_steps": 7},
    ],
    ids=str,
)
def test_a_run_that_was_killed_behind_its_last_step_makes_no_more(
    untrained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    chosen = replace(FAST, **settings)
    unbroken = Run(untrained, data).train(tmp_path / "unbroken", chosen)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_check_finite", killed)  # what comes next behind training
        with pytest.raises(KeyboardInterrupt):
            Run(untrained, data).train(tmp_path / "broken", chosen)
    resumed = Run(untrained, data).train(tmp_path / "broken", chosen)
    assert (unbroken.resumed, resumed.resumed) == (False, True)
    assert resumed.steps == unbroken.steps
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")


def test_weights_that_the_last_step_spoiled_are_not_saved(
    untrained: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        LexibitError, match="became NaN or infinite in the last step: lower the learning rate"
    ):
        Run(untrained, data).train(tmp_path / "out", replace(FAST, max_steps=1, learning_rate=1e38))
    assert not (tmp_path / "out").exists()


def test_half_precision_is_trained_in_float32_and_saved_as_it_was(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    model = checkpoint.load_float(trained).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    checkpoint.load_tokenizer(trained).save_pretrained(tmp_path / "half")
    packed = tmp_path / "packed"
    checkpoint.quantize_to(tmp_path / "half", packed, LexibitConfig(bits=2), progress=False)
    run = Run(trained, data)
    run.model = checkpoint.load_quantized(packed)
    before = {name: one.detach().clone() for name, one in run.model.named_parameters()}
    # of a LayerNorm's weights, near 1, each such step is less than half precision sees, and ten are more
    run.train(tmp_path / "tuned", Settings(epochs=1, learning_rate=2e-3, batch_size=16))
    after = checkpoint.load_quantized(tmp_path / "tuned")
    assert {one.dtype for one in after.parameters()} == {torch.bfloat16}
    assert {one.dtype for one in run.model.parameters()} == {torch.bfloat16}
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (packed, tmp_path / "tuned")]
    assert sizes[0] == sizes[1]
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    assert not torch.equal(after.get_parameter(name), before[name])


def test_a_teacher_is_matched(trained: Path, data: Path, tmp_path: Path) -> None:
    teacher = checkpoint.load_float(trained)
    far = []
    for distill in (0.0, 1.0):
        run = Run(trained, data, LexibitConfig("linear", 1))
        settings = Settings(epochs=2, learning_rate=1e-3, batch_size=16, distill=distill)
        run.train(tmp_path / f"out{distill}", settings, teacher=teacher)
        inputs = run.tokenizer([example.texts[0] for example in run.judge], padding=True, return_tensors="pt")
        with torch.inference_mode():
            ours = run.model(inputs["input_ids"], inputs["attention_mask"]).logits
            theirs = teacher(inputs["input_ids"], inputs["attention_mask"]).logits
        far.append(float((ours - theirs).square().mean()))
    assert far[1] < far[0]


def test_the_distance_to_a_teacher_is_the_divergence_of_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    ours, theirs = SequenceClassifierOutput(logits=a), SequenceClassifierOutput(logits=b)
    p, q = (b / 2).softmax(-1), (a / 2).softmax(-1)
    expected = 4 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(distance(ours, theirs, {}, 2.0), expected)
    assert distance(ours, ours, {}, 1.0).abs() < 1e-6
    one, other = SequenceClassifierOutput(logits=a[:, :1]), SequenceClassifierOutput(logits=b[:, :1])
    torch.testing.assert_close(distance(one, other, {}, 1.0), F.mse_loss(a[:, :1], b[:, :1]))
    with pytest.raises(LexibitError, match="give a teacher of the same task"):
        distance(ours, one, {}, 1.0)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def has_checkpoint(work: Path) -> bool:
    """Whether a run that is at work there has a whole checkpoint."""
    try:
        return any(work.glob("checkpoint-*/trainer_state.json"))
    except FileNotFoundError:
        # a run begins by making its folder anew, which glob may be looking into
        return False


@pytest.mark.parametrize("command", ["finetune", "tune"])
def test_a_run_that_was_killed_ends_in_the_bytes_of_one_that_was_not(
    untrained: Path, trained: Path, data: Path, tmp_path: Path, command: str
) -> None:
    source = untrained
    if command == "tune":
        source = tmp_path / "packed"
        # levels that are stored with less than they are trained with
        config = LexibitConfig("kmeans", 2, levels_dtype="float16")
        checkpoint.quantize_to(trained, source, config, progress=False)
    line = [sys.executable, "-m", "lexibit", command, str(source), "--task", "classification", "--json"]
    line += ["--data", str(data), "--epochs", "3", "--learning-rate", "1e-3", "--batch-size", "16"]
    line += ["--group-by-length"] if command == "finetune" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    subprocess.run([*line, "--out", unbroken], check=True, env=environment, capture_output=True)
    work = tmp_path / "broken.training"
    deadline = time.monotonic() + 300
    with subprocess.Popen([*line, "--out", broken], env=environment, stdout=subprocess.DEVNULL) as killed:
        try:
            while not has_checkpoint(work) and time.monotonic() < deadline:
                assert killed.poll() is None, "it ended before it could be killed"
                time.sleep(0.002)
        finally:
            killed.send_signal(signal.SIGKILL)
    assert not broken.exists()
    first = min(work.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    # as if it had been killed in the middle of its second checkpoint
    for later in work.glob("checkpoint-*"):
        if later != first:
            shutil.rmtree(later)
    shutil.copytree(first, work / "checkpoint-20")
    (work / "checkpoint-20" / "trainer_state.json").unlink()
    done = subprocess.run([*line, "--out", broken], check=True, env=environment, capture_output=True)
    result = json.loads(done.stdout)
    assert result["resumed"] is True
    assert result["steps"] == 30
    assert weights(broken) == weights(unbroken)
    assert not work.exists()


def test_checkpoints_of_another_run_are_not_gone_on_from(
    untrained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "mine.txt").write_text("not to be lost")
    with pytest.raises(LexibitError, match=r"out\.training: is in the way of checkpoints"):
        Run(untrained, data).train(tmp_path / "out")
    assert (work / "mine.txt").exists()
    (work / "mine.txt").unlink()
    # stopped in the second epoch, behind the first one's checkpoint
    run, outcomes = Run(untrained, data), tasks.trainable("classification").outcomes
    calls = iter([outcomes])
    monkeypatch.setattr(run.task, "outcomes", lambda *args, **options: next(calls)(*args, **options))
    with pytest.raises((StopIteration, RuntimeError)):
        run.train(tmp_path / "out", about={"limit": None})
    other = replace(FAST, batch_size=8, seed=1)
    with pytest.raises(LexibitError, match="in which batch_size was 16, not 8; seed was 0, not 1: go on"):
        Run(untrained, data).train(tmp_path / "out", other, about={"limit": None})
    run = Run(untrained, data)
    run.judge = [*run.judge[1:], run.judge[0]]
    with pytest.raises(LexibitError, match="a run in which the examples were others: go on"):
        run.train(tmp_path / "out", about={"limit": None})
    with pytest.raises(LexibitError, match="limit was None, not 5"):
        Run(untrained, data).train(tmp_path / "out", about={"limit": 5})
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        with pytest.raises(LexibitError, match="processes was 1, not 2"):
            Run(untrained, data).train(tmp_path / "out", about={"limit": None})
    assert Run(untrained, data).train(tmp_path / "out", about={"limit": None}).resumed


def test_a_refused_run_is_in_nobodys_way(trained: Path, untrained: Path, data: Path, tmp_path: Path) -> None:
    run = Run(trained, data)
    run.learn = [run.learn[0]._replace(label="maybe"), *run.learn[1:]]
    with pytest.raises(LexibitError, match="has no class 'maybe', which the data has"):
        run.train(tmp_path / "out")
    assert not (tmp_path / "out.training").exists()
    with pytest.raises(LexibitError, match="the loss became nan"):
        Run(untrained, data).train(tmp_path / "out", replace(FAST, learning_rate=1e30))
    assert (tmp_path / "out.training").exists()
    done = Run(untrained, data).train(tmp_path / "out", replace(FAST, epochs=1))
    assert not done.resumed
    assert not (tmp_path / "out.training").exists()


def test_the_report_says_what_counted(trained: Path) -> None:
    report = json.loads((trained / "training.json").read_text())
    assert report["settings"]["learning_rate"] == FAST.learning_rate
    assert not {"levels_factor", "distill", "temperature"} & report["settings"].keys()
    assert len(report["examples_sha256"]) == 64


def test_a_teacher_of_something_else_is_refused(
    trained: Path, untrained: Path, data: Path, tmp_path: Path
) -> None:
    run = Run(trained, data, LexibitConfig(bits=3))
    other = checkpoint.load_float(trained)
    other.config.id2label = {0: "yes", 1: "no"}
    with pytest.raises(LexibitError, match=r"\(Bert.*\) has the classes yes, no, the model no, yes"):
        run.train(tmp_path / "out", teacher=other)
    headless = checkpoint.load_float(untrained)
    headless.config.id2label = run.model.config.id2label
    with pytest.raises(LexibitError, match="no logits that could be matched: give a teacher with the task's"):
        run.train(tmp_path / "out", teacher=headless)


def test_what_cannot_be_trained_is_refused(untrained: Path, data: Path, tmp_path: Path) -> None:
    run = Run(untrained, data)
    (tmp_path / "there").mkdir()
    with pytest.raises(LexibitError, match="exists already"):
        run.train(tmp_path / "there")
    run.learn = []
    with pytest.raises(LexibitError, match="no examples to learn from"):
        run.train(tmp_path / "out")
    run = Run(untrained, data)
    with pytest.raises(LexibitError, match=r"the loss became nan in step \d+: lower the learning rate"):
        run.train(tmp_path / "out", Settings(epochs=3, learning_rate=1e30))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 0}, "epochs must be more than 0, not 0"),
        ({"epochs": float("inf")}, "epochs must be more than 0, not inf"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"warmup": 1}, "warmup must be 0 or more and less than 1, not 1"),
        ({"weight_decay": float("inf")}, "weight_decay must be 0 or more, not inf"),
        ({"patience": 0}, "patience must be 1 or more"),
        ({"distill": float("nan")}, "distill must be from 0 to 1"),
        ({"learning_rate": -1e-3}, "learning_rate must be 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LexibitError, match=said):
        Settings(**settings)


def test_of_several_learning_rates_the_best_is_kept(
    untrained: Path, data: Path, tmp_path: Path, run_json: Any, fails: Any
) -> None:
    line = ["finetune", untrained, "--task", "classification", "--data", data, "--out", tmp_path / "out"]
    line += ["--epochs", "6", "--batch-size", "16"]
    work = tmp_path / "out.grid"
    assert "give a number like 5e-5, or several" in fails(*line, "--learning-rate", "1e-3;1e-4")
    assert "1e-05, 1e-05 are not all different" in fails(*line, "--learning-rate", "1e-5,1e-05")
    # the first of them by itself, as a run leaves it that was killed in the second
    run_json(*line[:7], work / "1e-05", *line[8:], "--learning-rate", "1e-5")
    before = weights(work / "1e-05")
    assert "a run in which epochs was 6.0, not 1.0" in fails(
        *line, "--learning-rate", "1e-5,3e-3", "--epochs", "1"
    )
    found = run_json(*line, "--learning-rate", "1e-5,3e-3")
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    scores = {one["learning_rate"]: one["score"] for one in report["grid"]}
    assert list(scores) == [1e-5, 3e-3]
    assert report["settings"]["learning_rate"] == max(scores, key=lambda rate: scores[rate]) == 3e-3
    assert found["scores"][0]["value"] == scores[3e-3] > scores[1e-5] + 10
    assert not work.exists()
    assert weights(tmp_path / "out") != before
    # what stands beside the result is kept, unless it is what a kill behind the last step left
    (work / "1e-05").mkdir(parents=True)
    (work / "mine.txt").touch()
    assert "out: exists already" in fails(*line, "--learning-rate", "1e-5,1e-4")
    assert (work / "1e-05").exists()
    assert "out: exists already" in fails(*line, "--learning-rate", "1e-5,3e-3")
    assert [path.name for path in work.iterdir()] == ["mine.txt"]
    line[line.index("--out") + 1] = tmp_path / "other"
    work.rename(tmp_path / "other.grid")
    assert "mine.txt: is in the way of models in training" in fails(*line, "--learning-rate", "1e-5,3e-3")


def test_what_training_cannot_use_is_refused_by_its_command(
    untrained: Path, trained: Path, data: Path, tmp_path: Path, fails: Any
) -> None:
    own = ["--task", "classification", "--data", data, "--out", tmp_path / "out"]
    assert "unknown --model 'awd-ltsm': did you mean 'awd-lstm'? known:" in fails(
        "finetune", "--model", "awd-ltsm", *own
    )
    assert "no model is made from nothing for task 'classification'" in fails(
        "finetune", "--model", "awd-lstm", *own
    )
    assert "--distill goes with --teacher MODEL" in fails("tune", trained, *own, "--distill", ".3")
    assert "not quantized" in fails("tune", trained, *own)
    for split in ("train", "val"):
        for language in ("en", "de"):
            (tmp_path / f"{split}.{language}").write_text("a b\n")
    assert "a model of type 'bert' has no form for this task (ModelForSeq2SeqLM)" in fails(
        "finetune", untrained, "--task", "multi30k", "--data", tmp_path, "--out", tmp_path / "out"
    )
    away = tmp_path / "away"
    for task in ("rte", "squad", "causal-lm", "multi30k"):
        said = fails("finetune", untrained, "--task", task, "--data", away, "--out", tmp_path / "out")
        assert "away: no such folder: name with --data" in said
    assert not (tmp_path / "out").exists()


def test_two_processes_train_one_model(trained: Path, data: Path, tmp_path: Path) -> None:
    checkpoint.quantize_to(trained, tmp_path / "packed", LexibitConfig(bits=2), progress=False)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    line += ["lexibit", "tune", str(tmp_path / "packed"), "--task", "classification", "--data", str(data)]
    line += ["--out", str(tmp_path / "out"), "--epochs", "1", "--batch-size", "8", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    # one of them tells, and each took half of the examples
    assert json.loads(ended.stdout)["steps"] == 160 // 8 // 2
    before, after = (weights(tmp_path / name) for name in ("packed", "out"))
    assert before != after
    assert len(before) == len(after)
    assert not (tmp_path / "out.training").exists()


def test_a_folder_in_which_another_process_trains_is_refused(
    untrained: Path, data: Path, tmp_path: Path
) -> None:
    work = tmp_path / "out.training"
    work.mkdir()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        born = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        (work / "run.json").write_text(json.dumps({"process": f"{socket.gethostname()} {other.pid} {born}"}))
        with pytest.raises(LexibitError, match=rf"another process is training there \({other.pid}\): wait"):
            Run(untrained, data).train(tmp_path / "out")
    finally:
        other.kill()
        other.wait()
    Run(untrained, data).train(tmp_path / "out", replace(FAST, epochs=1))


def test_a_file_in_the_place_of_checkpoints_is_refused(untrained: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out.training").write_text("mine")
    with pytest.raises(LexibitError, match="is in the way of checkpoints"):
        Run(untrained, data).train(tmp_path / "out")
    assert (tmp_path / "out.training").read_text() == "mine"
