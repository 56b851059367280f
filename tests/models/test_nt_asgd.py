"""NT-ASGD against the paper's Algorithm 1 written out, and under transformers' Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lexibit import LexibitError, models, tasks
from lexibit.models.nt_asgd import NTASGD
from lexibit.tasks.epochs import EpochCallback

STEPS_AN_EVALUATION = 3


def gradient(weight: Tensor, step: int) -> Tensor:
    """Of a noisy quadratic."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
    return weight - 1 + noise


def by_the_paper(weight: Tensor, perplexities: list[float], lr: float, n: int) -> tuple[int, Tensor, Tensor]:
    """Algorithm 1: when averaging begins (T), the last iterate, and the mean of w_T, ..., w_k."""
    logs: list[float] = []
    t, T, iterates = 0, 0, []
    for k in range(1, STEPS_AN_EVALUATION * len(perplexities) + 1):
        weight = weight - lr * gradient(weight, k)
        iterates.append(weight)
        if k % STEPS_AN_EVALUATION == 0 and T == 0:
            v = perplexities[k // STEPS_AN_EVALUATION - 1]
            if t > n and v > min(logs[: t - n]):
                T = k
            logs.append(v)
            t += 1
    return T, weight, torch.stack(iterates[T - 1 :]).mean(0)


@pytest.mark.parametrize(
    ("perplexities", "begins"),
    [
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], 0),
        ([9, 1, 8, 7, 6, 5, 4, 3, 2], 5),  # the first that is worse than the best of more than two before
        ([5, 5, 5, 5, 5, 5, 5, 5, 5], 0),
        ([1, 9, 9, 9, 9, 9, 9, 9, 9], 4),  # not before there were more than two
        ([9, 8, 7, 6, 5, 6, 6, 6, 6], 8),
    ],
)
def test_averaging_begins_and_averages_as_the_paper_says(perplexities: list[float], begins: int) -> None:
    parameter = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    T, last, mean = by_the_paper(parameter.detach().clone(), perplexities, 0.1, 2)
    assert begins * STEPS_AN_EVALUATION == T
    optimizer = NTASGD([parameter], lr=0.1, weight_decay=0.0, patience=2)
    for step in range(1, STEPS_AN_EVALUATION * len(perplexities) + 1):
        parameter.grad = gradient(parameter.detach(), step)
        optimizer.step()
        if step % STEPS_AN_EVALUATION == 0:
            optimizer.observe(perplexities[step // STEPS_AN_EVALUATION - 1])
            assert optimizer.averaging == (0 < T <= step)
    torch.testing.assert_close(parameter.detach(), last)
    optimizer.use_averages(True)
    torch.testing.assert_close(parameter.detach(), mean if T else last)
    optimizer.use_averages(True)
    optimizer.use_averages(False)
    torch.testing.assert_close(parameter.detach(), last)
    assert optimizer.perplexities == perplexities


def test_a_step_is_scaled_by_the_length_with_its_decay_and_each_groups_own_rate() -> None:
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = NTASGD([{"params": [one]}, {"params": [two], "lr": 3.0}], lr=0.5, weight_decay=0.1)
    one.grad, two.grad = torch.full((3,), 0.2), torch.full((2,), 0.2)
    optimizer.length_scale = 0.5
    optimizer.step()
    torch.testing.assert_close(one.detach(), torch.full((3,), 1 - 0.25 * 0.3))
    torch.testing.assert_close(two.detach(), torch.full((2,), 1 - 1.5 * 0.3))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 3.0]


@pytest.mark.parametrize("in_model", [False, True])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path: Path, in_model: bool) -> None:
    def steps(parameter: nn.Parameter, optimizer: NTASGD, some: range) -> None:
        for step in some:
            optimizer.use_averages(False)
            parameter.grad = gradient(parameter.detach(), step)
            optimizer.step()
            optimizer.observe(step)

    parameter = nn.Parameter(torch.ones(4))
    optimizer = NTASGD([parameter], lr=0.1, patience=2)
    steps(parameter, optimizer, range(8))
    assert optimizer.averaging
    optimizer.use_averages(in_model)
    torch.save({"model": parameter.data, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    steps(parameter, optimizer, range(8, 12))

    saved = torch.load(tmp_path / "state.pt")
    again = nn.Parameter(saved["model"])
    resumed = NTASGD([again], lr=7.0, patience=2)
    resumed.load_state_dict(saved["optimizer"])
    steps(again, resumed, range(8, 12))
    assert torch.equal(again, parameter)
    assert resumed.perplexities == optimizer.perplexities
    for one in (optimizer, resumed):
        one.use_averages(True)
    assert torch.equal(again, parameter)


def test_misuse_is_refused() -> None:
    with pytest.raises(LexibitError, match="patience must be 1 or more, not 0"):
        NTASGD([nn.Parameter(torch.ones(1))], patience=0)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = NTASGD([parameter], patience=1)
    for perplexity in (1, 2, 3):
        optimizer.observe(perplexity)
    optimizer.use_averages(True)
    with pytest.raises(RuntimeError, match="the averages stand in the model"):
        optimizer.step()


# under the Trainer -----------------------------------------------------------------------------------

WORDS = [f"w{index}" for index in range(20)]
SETTINGS = {
    "embedding_size": 8,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "bptt": 10,
    "batch_columns": 4,
}


def text(lines: int, seed: int) -> list[str]:
    """Words that tell the next one nearly."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (lines, 12), generator=generator).cumsum(1) % len(WORDS)
    return [" ".join(WORDS[index] for index in line) + "\n" for line in steps.tolist()]


class Killed(TrainerCallback):
    """Stops a run as a kill would, between two checkpoints."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Ordered(Trainer):
    """As little of a trainer as the contract of the callback asks for."""

    evaluated: Any
    forced: Any = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        task, tokenizer, examples = self.evaluated
        (score,) = task.scores(task.outcomes(self.model, tokenizer, examples))
        # for the trigger: worse from the first evaluation on
        metrics = {"eval_perplexity": self.state.global_step if self.forced else score.value}
        metrics["eval_real"] = score.value
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def trainer(
    folder: Path,
    *,
    killed: int | None = None,
    forced: bool = True,
    settings: dict[str, float] | None = None,
    **changes: Any,
) -> Ordered:
    task = tasks.task("causal-lm")
    assert isinstance(task, tasks.Trainable)
    examples = text(40, 0)
    model, tokenizer = models.create("awd-lstm", examples, SETTINGS | (settings or {}))
    features = task.features(model, tokenizer, examples)
    optimizer, scheduler, callbacks = model.training_setup(10.0, patience=1)
    values = dict(model.training_arguments) | {
        "output_dir": str(folder),
        "max_steps": 40,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 8,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    made = Ordered(
        model=model,
        args=TrainingArguments(**values | changes),
        train_dataset=features,
        eval_dataset=features,
        data_collator=task.collate(model, tokenizer),
        callbacks=[*callbacks, EpochCallback(features), *([] if killed is None else [Killed(killed)])],
        optimizers=(optimizer, scheduler),
    )
    made.evaluated, made.forced = (task, tokenizer, text(20, 1)), forced
    return made


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_killed_and_resumed_run_ends_in_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = trainer(tmp_path / "a")
    unbroken.train()
    steps_an_epoch = len(unbroken.train_dataset)
    assert 16 % steps_an_epoch  # the checkpoint lies within an epoch
    killed = trainer(tmp_path / "b", killed=18)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 40
    for name, weight in weights(unbroken.model).items():
        assert torch.equal(resumed.model.get_parameter(name), weight), name
    real = [[entry["eval_real"] for entry in run.state.log_history if "eval_real" in entry] for run in
            (unbroken, resumed)]  # fmt: skip
    assert real[0] == real[1]


def test_what_is_evaluated_saved_and_left_are_the_averages(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    iterates: dict[int, dict[str, Tensor]] = {}

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            iterates[state.global_step + 1] = copy.deepcopy(weights(run.model))

    run.add_callback(Watch())
    run.train()
    # evaluations at 4, 8, 12: the third is the first with more than one before it
    for step in (16, 32, 40):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        for name, value in saved.items():
            mean = torch.stack([iterates[k][name] for k in range(12, step + 1)]).mean(0)
            torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-6)
    last = load_file(tmp_path / "checkpoint-40" / "model.safetensors")
    for name, value in last.items():
        assert torch.equal(run.model.get_parameter(name), value)


def test_training_learns_with_rates_in_proportion_to_the_chunks(tmp_path: Path) -> None:
    bare = {f"{of}_dropout": 0.0 for of in ("embedding", "input", "hidden", "output", "weight")}
    bare |= {"activation_regularization": 0.0, "temporal_regularization": 0.0, "num_hidden_layers": 1}
    changes = {"max_steps": 120, "eval_steps": 40, "save_strategy": "no"}
    run = trainer(tmp_path, forced=False, settings=bare, **changes)
    scales = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            scales.append(run.optimizer.optimizer.length_scale)

    run.add_callback(Watch())
    run.train()
    real = [entry["eval_real"] for entry in run.state.log_history if "eval_real" in entry]
    assert real[-1] < 5  # 20 is what knows nothing, 2 what knows all
    features = run.train_dataset
    lengths = [feature["input_ids"].shape[1] for feature in features]
    assert sorted(scales[: len(lengths)]) == sorted(length / 10 for length in lengths)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2: .* trained with 1"),
        ({"per_device_train_batch_size": 4}, "train_batch_size is 4"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0"),
    ],
)
def test_a_trainer_that_does_not_keep_to_the_contract_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(LexibitError, match=said):
        trainer(tmp_path, **changes).train()
