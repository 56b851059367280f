"""The cells of a study: every combination, as the steps that lead to its scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lexibit import models, tasks
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError, unknown
from lexibit.study import digests, published
from lexibit.study.definition import AXES, FLOAT, Settings, Study, model_settings
from lexibit.study.steps import (
    EVALUATE,
    FINETUNE,
    QUANTIZE,
    TUNE,
    Step,
    check,
    check_training,
    configuration,
    float_bits,
    importance_files,
    step,
)

_OWN_TASK = "task"  # what a scheme calibrates on in each cell: what the cell's own task trains on
_SET = "the study sets it"
_PLANS = {"config", "plan"}  # options that say all of a quantization
_REFUSED = {
    FINETUNE: dict.fromkeys(("task", "data", "out", "seed", "model", "option", "json"), _SET),
    QUANTIZE: dict.fromkeys(("bits", "groups", "importance", "seed", "json", "ray"), _SET),
    TUNE: dict.fromkeys(("task", "data", "out", "seed", "json"), _SET),
    EVALUATE: dict.fromkeys(("task", "data", "out", "against", "json"), _SET),
}


@dataclass(frozen=True)
class Cell:
    """One combination, and the step that measures it.

    Attributes:
        labels: the columns of its row that say which it is: model, task, scheme, bits, groups, importance,
            tuned, seed.
        evaluate: the last step.
    """

    labels: Mapping[str, Any]
    evaluate: Step

    @property
    def key(self) -> str:
        """Of its row: what it is called, and what goes in."""
        return digests.of(dict(self.labels), self.evaluate.key)[:32]

    def steps(self) -> list[Step]:
        """All its steps, the first first."""
        chain = [self.evaluate]
        while isinstance(chain[0].model, Step):
            chain.insert(0, chain[0].model)
        return chain


def cells(study: Study) -> list[Cell]:
    """Every cell of a study; reads the models, examples and files that it names, for their digests.

    Raises:
        LexibitError: a model, a task's data or a file is not there, or a command would not take an option;
            names the place in the study.
    """
    for name in study.published.values() if isinstance(study.published, Mapping) else [study.published]:
        if name is not None and name not in published.models():
            raise unknown("model of published numbers", name, published.models())
    return [
        cell
        for model in study.models
        for task in study.by_task()
        for seed in dict.fromkeys(study.seeds)
        for cell in _Cells(study, model, task, seed).all()
    ]


class _Cells:
    """The cells of a model on a task with a seed."""

    def __init__(self, study: Study, model: str, task: str, seed: int) -> None:
        self.study, self.model, self.task, self.seed = study, model, task, seed
        data = study.by_task()[task].get("data", study.data)
        self.data = None if data is None else str(data)
        tasks.task(task)
        self.said = model_settings(study.models[model])
        self.source = str(self.said["source"]) if "source" in self.said else None
        if self.source is None and self.said["create"] not in models.names():
            raise unknown(f"model to create in models.{model}", self.said["create"], models.names())
        # of a model made from nothing, nobody knows before it is made
        self.memory = 0 if self.source is None else _nbytes(digests.located(self.source))
        self.evaluating = self._evaluating()

    def all(self) -> Iterator[Cell]:
        floats = self._floats()
        bits = 32 if self.source is None else float_bits(digests.located(self.source))
        yield self._cell(floats, FLOAT, {"bits": bits, "groups": None, "importance": None}, tuned=False)
        tuning = self._training(TUNE)
        for scheme, settings in self.study.by_scheme().items():
            own = {name: value for name, value in settings.items() if name not in AXES}
            planned = _PLANS & own.keys()
            # a plan says all of it
            several = product(*([None] if planned else self.study.axis(name, settings) for name in AXES))
            for values in dict.fromkeys(several):
                axes = dict(zip(AXES, values, strict=True))
                quantized, config = self._quantized(
                    floats, scheme, own, {} if planned else axes | {"seed": self.seed}
                )
                axes["bits"] = config.bits
                yield self._cell(quantized, scheme, axes, tuned=False)
                if tuning is not None:
                    yield self._cell(self._step(TUNE, quantized, *tuning), scheme, axes, tuned=True)

    def _floats(self) -> Step | str:
        training = self._training(FINETUNE)
        if training is not None:
            return self._step(FINETUNE, self.source, *training)
        if self.source is None:
            raise LexibitError(f"models.{self.model}: is made from nothing: say how to finetune it")
        return self.source

    def _training(self, command: str) -> tuple[list[str], str] | None:
        """The options of ``finetune`` or ``tune``, and the digest of its examples; None if it is not done."""
        how = self.study.how(command, self.model, self.task)
        if how is None:
            return None
        ours = {"task": self.task, "data": self.data, "seed": self.seed}
        if command == FINETUNE and self.source is None:
            ours |= {"model": self.said["create"], "option": self.said.get("option")}
        with _at(f"{command} of {self.model} on {self.task}"):
            options = self._options(command, how, ours)
            check_training(command, options)
            tasks.trainable(self.task)
        return options, digests.of_examples(self.task, self.data, "train", "dev")

    def _evaluating(self) -> tuple[list[str], str]:
        """The options of ``evaluate``, and the digest of its examples."""
        how = self.study.how(EVALUATE, self.model, self.task) or {}
        with _at(f"{EVALUATE} of {self.model} on {self.task}"):
            options = self._options(EVALUATE, how, {"task": self.task, "data": self.data})
            check(EVALUATE, options)
        return options, digests.of_examples(self.task, self.data, str(how.get("split", "dev")))

    def _quantized(
        self, floats: Step | str, scheme: str, own: Settings, ours: Settings
    ) -> tuple[Step, LexibitConfig]:
        calibrated_on = str(own.get("calibrate", ""))
        if calibrated_on == _OWN_TASK:
            calibrated_on = f"task:{self.task}"
            own = dict(own) | {"calibrate": calibrated_on}
        content = []
        with _at(f"schemes.{scheme}"):
            if calibrated_on.startswith("task:"):
                own = {"data": self.data} | dict(own)
                data = None if own["data"] is None else str(own["data"])
                content = [digests.of_examples(calibrated_on.removeprefix("task:"), data, "train")]
            options = self._options(QUANTIZE, own, ours)
            config = configuration(options)
            content += [digests.of_path(file) for file in importance_files(config)]
            return self._step(QUANTIZE, floats, options, *content), config

    def _cell(self, model: Step | str, scheme: str, axes: Settings, *, tuned: bool) -> Cell:
        labels = {
            "model": self.model,
            "task": self.task,
            "scheme": scheme,
            **axes,
            "tuned": tuned,
            "seed": self.seed,
        }
        return Cell(labels, self._step(EVALUATE, model, *self.evaluating))

    def _options(self, command: str, settings: Settings, ours: Settings) -> list[str]:
        from lexibit.cli import calls

        return calls.options(command, settings, _REFUSED[command]) + calls.options(command, ours)

    def _step(self, command: str, model: Step | str | None, options: list[str], *content: str) -> Step:
        return step(
            command,
            model,
            options,
            *content,
            memory=self.memory,
            cpus=self.study.cpus,
            gpus=self.study.gpus if command in (FINETUNE, TUNE) else 0,
        )


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Say of an error where in the study it is."""
    try:
        yield
    except LexibitError as error:
        raise LexibitError(f"{place}: {error}") from error


def _nbytes(folder: Path) -> int:
    files = [folder] if folder.is_file() else list(folder.glob("*.safetensors")) or folder.glob("*.bin")
    return sum(file.stat().st_size for file in files)
