"""Training on a task with transformers' Trainer: float models, and the codebooks of quantized ones."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from lexibit import tuning
from lexibit.checkpoint.target import TRAINING, new_folder, save_folder
from lexibit.errors import LexibitError
from lexibit.files import exists_already, to_json, write_json
from lexibit.nn import codebooks
from lexibit.tasks import Examples, Score, Trainable, digest
from lexibit.tasks.epochs import EpochCallback, Epochs
from lexibit.training import checkpoints
from lexibit.training.distillation import distance
from lexibit.training.settings import Settings

REPORT, LOGS = TRAINING
_LEVELS = "levels.safetensors"
_RATE = 5e-5


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        scores: of the model that was saved, on the evaluation examples.
        steps: how many steps were made, those before a resumption included.
        seconds: of this run.
        resumed: whether it went on from an earlier run's checkpoint.
    """

    scores: list[Score]
    steps: int
    seconds: float
    resumed: bool


def seed(number: int) -> None:
    """Seed all that fresh heads, dropout and the order of examples are drawn with."""
    set_seed(number)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Trainable,
    examples: Examples,
    evaluation: Examples,
    out: Path,
    settings: Settings | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    progress: bool = True,
    about: dict[str, Any] | None = None,
    again: bool = False,
) -> Trained:
    """Train a model on a task, and save it to a new folder; of a quantized model the codes stay fixed.

    A model in half precision is trained in float32, and saved as it was.

    After every epoch the model is evaluated and a checkpoint written to the folder ``OUT.training``, where
    TensorBoard logs stand too. A run that was killed goes on from the last whole checkpoint when it is
    started again with the same settings, and ends in the same weights. ``out`` appears when it is whole, with
    the logs and a report (``training.json``); ``OUT.training`` is then removed.

    Args:
        model: with the task's head; trained in place.
        tokenizer: its own.
        task: what to train on.
        examples: to learn from.
        evaluation: to evaluate on.
        out: the new folder.
        settings: how.
        teacher: a float model whose outputs are to be matched as well.
        progress: whether to draw progress bars on the terminal.
        about: what the report says beside the settings, like the names of model and task; an earlier run's
            checkpoints are only gone on from if theirs said the same.
        again: whether ``out`` may hold the result of the same run, which is then not made again.

    Raises:
        LexibitError: a setting that cannot be, ``out`` exists, checkpoints of another run are in the way, or
            the loss or a weight became NaN or infinite.
    """
    settings = settings or Settings()
    if out.exists() and not again:
        raise exists_already(out)
    if not len(examples):
        raise LexibitError(f"{task.name}: no examples to learn from")
    if teacher is not None:
        task.check_teacher(model, teacher)
    work = out.with_name(out.name + ".training")
    quantized = bool(codebooks(model))
    settings = replace(settings, learning_rate=_rate(model, settings))
    run = (about or {}) | {
        "task": task.name,
        "settings": _meant(settings, quantized=quantized, taught=teacher is not None),
        "examples": len(examples),
        "examples_sha256": digest(examples, evaluation),
        # how many share each step, and the examples
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }
    if task.signature:
        run["signature"] = task.signature
    if out.exists():
        return _finished(out, run)
    checkpoints.check_free(work)
    start = time.perf_counter()
    seed(settings.seed)
    with _in_float32(model), tuning.trained_levels(model) if quantized else nullcontext():
        trainer = _Trainer(model, tokenizer, task, examples, evaluation, work, settings, teacher, progress)
        if trainer.is_world_process_zero():
            checkpoints.start(work, run)
            logs = SummaryWriter(str(work / LOGS))
            trainer.add_callback(TensorBoardCallback(logs))  # type: ignore[no-untyped-call]
        trainer.accelerator.wait_for_everyone()
        checkpoint = checkpoints.last(work)
        trainer.ended = checkpoint is not None and checkpoints.had_ended(checkpoint)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.train(False)
    _check_finite(model, task)
    before = time.perf_counter()
    outcomes = task.outcomes(model, tokenizer, evaluation)
    scores = task.scores(outcomes, seconds=time.perf_counter() - before, seed=settings.seed)
    done = Trained(scores, trainer.state.global_step, time.perf_counter() - start, checkpoint is not None)
    if trainer.is_world_process_zero():
        with new_folder(out) as staged:
            save_folder(model, staged)
            tokenizer.save_pretrained(staged)
            write_json(staged / REPORT, run | asdict(done) | {"history": trainer.state.log_history})
            shutil.copytree(work / LOGS, staged / LOGS)
        shutil.rmtree(work)
    return done


def _finished(out: Path, run: dict[str, Any]) -> Trained:
    """What the same run gave before."""
    report = out / REPORT
    said = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    run = json.loads(to_json(run))
    if differences := list(checkpoints.differences({name: said.get(name) for name in run}, run)):
        raise LexibitError(
            f"{out}: holds a run in which {'; '.join(differences)}: go on with what it had, or remove the "
            "folder to start afresh"
        )
    scores = [Score(**_known(score)) for score in said["scores"]]
    return Trained(scores, said["steps"], said["seconds"], said["resumed"])


def _known(values: dict[str, Any]) -> dict[str, Any]:
    # null is what JSON has for NaN
    return {name: math.nan if value is None else value for name, value in values.items()}


def _rate(model: PreTrainedModel, settings: Settings) -> float:
    """The learning rate: as set, or a model's own, or the papers'."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return float(getattr(model, "training_arguments", {}).get("learning_rate", _RATE))


def _meant(settings: Settings, *, quantized: bool, taught: bool) -> dict[str, Any]:
    """The settings that count in a run."""
    idle = [] if quantized else ["levels_factor"]
    idle += [] if taught else ["distill", "temperature"]
    return {name: value for name, value in asdict(settings).items() if name not in idle}


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Half precision as float32 inside: a small step next to a large weight would be rounded away."""

    def numbers() -> Iterator[tuple[str, Tensor]]:
        return chain(model.named_parameters(), model.named_buffers())

    half = {name: one.dtype for name, one in numbers() if one.is_floating_point() and one.itemsize < 4}
    for name, one in numbers():
        if name in half:
            one.data = one.data.float()
    try:
        yield
    finally:
        for name, one in numbers():
            if name in half:
                one.data = one.data.to(half[name])


def _check_finite(model: PreTrainedModel, task: Trainable) -> None:
    """Refuse what the last step spoiled: its loss was that of the weights before it."""
    levels = ((f"{name} (levels)", weight.levels) for name, weight in codebooks(model).items())
    for name, one in chain(model.named_parameters(), levels):
        if not torch.isfinite(one).all():
            raise LexibitError(
                f"{task.name}: {name} became NaN or infinite in the last step: lower the learning rate, or "
                "look at the data"
            )


class _Trainer(Trainer):
    """transformers' Trainer, with a task's features and scores, and levels that learn faster."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Trainable,
        examples: Examples,
        evaluation: Examples,
        work: Path,
        settings: Settings,
        teacher: PreTrainedModel | None,
        progress: bool,
    ) -> None:
        self.ended = False  # whether the run that it goes on with had made its last step
        self.task, self.settings, self.examples = task, settings, evaluation
        self.trained, self.tokenizer = model, tokenizer
        self.teacher = None if teacher is None else teacher.train(False)
        features = task.features(model, tokenizer, examples)
        ordered = getattr(features, "ordered", False)
        if ordered and settings.group_by_length:
            raise LexibitError(f"{type(model).__name__} reads its text in order: leave group_by_length out")
        if ordered and settings.batch_size != Settings.batch_size:
            raise LexibitError(
                f"{type(model).__name__} reads its text in order, in columns of its own: leave batch_size out"
            )
        first = task.metrics[0]
        # a model may bring its own recipe
        own = dict(getattr(model, "training_arguments", {}))
        rate = _rate(model, settings)
        groups = tuning.parameter_groups(model, rate, factor=settings.levels_factor)
        optimizer: torch.optim.Optimizer
        scheduler = None
        callbacks: list[Any] = []
        if setup := getattr(model, "training_setup", None):
            if settings.weight_decay or settings.warmup:
                raise LexibitError(
                    f"{type(model).__name__} brings its own optimizer: leave weight_decay and warmup out"
                )
            optimizer, scheduler, more = setup(rate, parameters=groups)
            callbacks += more
        else:
            for group in groups:
                group.setdefault("weight_decay", settings.weight_decay)
            # in one pass over the weights, which on a CPU takes a seventh of the time
            optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
        if isinstance(features, Epochs):
            callbacks.append(EpochCallback(features))
        if settings.patience is not None:
            callbacks.append(EarlyStoppingCallback(settings.patience))
        shuffled = "group_by_length" if settings.group_by_length else "random"
        cuda = torch.cuda.is_available()
        half = cuda and torch.cuda.is_bf16_supported()
        arguments = TrainingArguments(
            output_dir=str(work),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            learning_rate=rate,
            per_device_train_batch_size=1 if ordered else settings.batch_size,
            train_sampling_strategy="sequential" if ordered else shuffled,
            warmup_steps=settings.warmup,
            max_grad_norm=own.get("max_grad_norm", 1.0),
            lr_scheduler_type="linear",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=settings.patience is not None,
            metric_for_best_model=_key(first.name),
            greater_is_better=first.higher,
            bf16=half,
            fp16=cuda and not half,
            seed=settings.seed,
            data_seed=settings.seed,
            remove_unused_columns=False,
            restore_callback_states_from_checkpoint=True,
            report_to="none",
            logging_steps=20,
            disable_tqdm=not progress,
            dataloader_pin_memory=cuda,
        )
        # without torchrun there is one process, and it uses one GPU: else a batch would be another
        arguments._n_gpu = min(arguments.n_gpu, 1)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=cast(Any, task.collate(model, tokenizer)),
            train_dataset=features,
            eval_dataset=evaluation,
            callbacks=callbacks,
            optimizers=(optimizer, scheduler),
        )
        if self.teacher is not None:
            self.teacher.to(self.args.device)
        # without bars it prints to standard output, which is the command's own
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss, and with a teacher its share of the distance to the teacher's outputs."""
        outputs = model(**inputs)
        loss = outputs.loss
        if self.teacher is not None:
            with torch.no_grad():
                theirs = self.teacher(**inputs)
            far = distance(outputs, theirs, inputs, self.settings.temperature)
            loss = (1 - self.settings.distill) * loss + self.settings.distill * far
        if not torch.isfinite(loss.detach()):
            raise LexibitError(
                f"{self.task.name}: the loss became {loss.item()} in step {self.state.global_step}: lower "
                "the learning rate, or look at the data"
            )
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args: Any, **more: Any) -> None:
        # the Trainer forgets that it had stopped, and asks how many steps there are behind a step only
        if self.ended:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **more)  # type: ignore[no-untyped-call]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # the state, which is written next, says that all have written theirs
        self.accelerator.wait_for_everyone()

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The task's metrics on the evaluation examples."""
        outcomes = self.task.outcomes(self.trained, self.tokenizer, self.examples)
        found = {f"{metric_key_prefix}_{_key(m.name)}": float(m.of(outcomes)) for m in self.task.metrics}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and (weights := codebooks(self.trained)):
            # what is stored of levels may be rounded, and a resumed run would not be the same
            levels = {name: weight.levels.detach().contiguous() for name, weight in weights.items()}
            save_file(levels, Path(output_dir or self.args.output_dir or "") / _LEVELS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_levels(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_levels(str(self.state.best_model_checkpoint))

    def _load_levels(self, checkpoint: str) -> None:
        if weights := codebooks(self.trained):
            levels = load_file(Path(checkpoint) / _LEVELS)
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.levels.copy_(levels[name])


def _key(metric: str) -> str:
    """A metric's name in logs."""
    return metric.removesuffix(" x 100").lower().replace(" ", "_")
