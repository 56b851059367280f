"""The steps of a study: commands of lexibit, each known by the content of what goes in."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from lexibit import __version__, checkpoint
from lexibit.checkpoint.source import headers, holds_codes
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.study import digests

FINETUNE, QUANTIZE, TUNE, EVALUATE = "finetune", "quantize", "tune", "evaluate"

# options whose values may be files, which count by what is in them
_FILES = frozenset({"--calibrate", "--config", "--importance", "--plan", "--teacher"})
_PROGRAM = 800_000_000  # bytes: an interpreter with PyTorch and transformers
# what a step takes, in the bytes of its float model: weights, gradients and Adam's two means, and activations
_TIMES = {FINETUNE: 6, QUANTIZE: 2, TUNE: 6, EVALUATE: 3}


@dataclass(frozen=True)
class Step:
    """One command of lexibit.

    Attributes:
        key: of its inputs: the command, its options, the content of files that they name, and the key or
            content of the model. Equal keys are one step.
        command: its name.
        options: the words behind the model and the result's place.
        model: what it works on: what another step makes, or a folder; None if it is made from nothing.
        memory: bytes that it takes, about.
        cpus, gpus: that it takes, on a cluster.
    """

    key: str
    command: str = field(compare=False)
    options: tuple[str, ...] = field(compare=False, default=())
    model: Step | str | None = field(compare=False, default=None)
    memory: int = field(compare=False, default=0)
    cpus: int = field(compare=False, default=1)
    gpus: float = field(compare=False, default=0)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.command}-{self.key[:16]}"

    @property
    def needs(self) -> tuple[Step, ...]:
        """The steps that come before it."""
        return (self.model,) if isinstance(self.model, Step) else ()

    @property
    def depth(self) -> int:
        """How many steps come before it, one after the other."""
        return self.model.depth + 1 if isinstance(self.model, Step) else 0

    def words(self, steps: Path) -> list[str]:
        """The command line, without ``lexibit``.

        Args:
            steps: the folder of all steps.
        """
        out, source = str(self.out(steps)), self.source(steps)
        model = [] if source is None else [str(source)]
        if self.command == QUANTIZE:
            return [self.command, *model, out, *self.options]
        return [self.command, *model, *self.options, "--out", out]

    def line(self, steps: Path) -> str:
        """The command line, to be typed again."""
        return shlex.join(["lexibit", *self.words(steps)])

    def out(self, steps: Path) -> Path:
        """Where its result goes."""
        return steps / self.name / ("scores.json" if self.command == EVALUATE else "model")

    def source(self, steps: Path) -> Path | None:
        """The folder, or file, of the model that it works on; None if that is made from nothing."""
        if isinstance(self.model, Step):
            return self.model.out(steps)
        return None if self.model is None else Path(self.model)

    def float_model(self, steps: Path) -> Path | None:
        """What its model was quantized from; None if that was never quantized."""
        one = self
        while one.command != QUANTIZE:
            if not isinstance(one.model, Step):
                return None
            one = one.model
        return one.source(steps)

    def work(self, steps: Path) -> dict[str, Any]:
        """Do it.

        Returns:
            What is to be known of it, as plain values.

        Raises:
            LexibitError: the command fails.
        """
        from lexibit.cli import calls

        # results appear when they are whole: one that is there was not noted before a kill
        if not self.out(steps).exists():
            calls.call(self.words(steps))
        source = self.source(steps)
        return {} if self.command != EVALUATE or source is None else _facts(source)


def step(
    command: str,
    model: Step | str | None,
    options: list[str],
    *content: str,
    memory: int = 0,
    cpus: int = 1,
    gpus: float = 0,
) -> Step:
    """A step with its key.

    Args:
        command: its name.
        model: as of :class:`Step`.
        options: its words.
        content: digests of what else goes in, like examples.
        memory: bytes of the float model.
        cpus: as of :class:`Step`.
        gpus: as of :class:`Step`.
    """
    words = list(options)
    identity = list(options)
    for place, word in enumerate(options[1:], 1):
        flag = options[place - 1]
        if flag == "--data":
            identity[place] = ""  # its examples are in the content
        if flag in _FILES and (Path(word).exists() or flag == "--teacher"):
            identity[place] = digests.of_model(word) if flag == "--teacher" else digests.of_path(Path(word))
        if flag in (*_FILES, "--data") and Path(word).exists():
            words[place] = str(Path(word).absolute())
    if isinstance(model, str):
        model = str(digests.located(model))
        inside: str | None = digests.of_path(Path(model))
    else:
        inside = None if model is None else model.key
    key = digests.of(__version__, command, inside, identity, content)
    return Step(key, command, tuple(words), model, _PROGRAM + _TIMES[command] * memory, cpus, gpus)


def check(command: str, options: list[str]) -> Any:
    """See that a command would take some options.

    Returns:
        The command as it was parsed.

    Raises:
        LexibitError: it would not.
    """
    from lexibit.cli import calls

    out = ["out"] if command == QUANTIZE else ["--out", "out"]
    created = command == FINETUNE and "--model" in options
    return calls.parsed([command, *([] if created else ["model"]), *out, *options])


def check_training(command: str, options: list[str]) -> None:
    """See that training would take some options.

    Raises:
        LexibitError: it would not.
    """
    from lexibit.cli import learning

    learning.settings_of(check(command, options))


def configuration(options: list[str]) -> LexibitConfig:
    """What the options of ``lexibit quantize`` ask for.

    Raises:
        LexibitError: it would not take them.
    """
    from lexibit.cli.options import config_of

    parsed = check(QUANTIZE, options)
    texts = parsed.params["calibrate"]
    if texts is not None and not texts.startswith("task:") and not Path(texts).is_file():
        raise LexibitError(f"calibrate: {texts}: no such file; 'task' stands for each cell's own task")
    return config_of(parsed)


def importance_files(config: LexibitConfig) -> list[Path]:
    """The files of importances that a configuration names, in its rules too.

    Raises:
        LexibitError: one is not there.
    """
    recipes = [config.recipe(), *(config.recipe(pattern) for pattern in config.rules)]
    files = [source for recipe in recipes if isinstance(source := recipe.weighing(), Path)]
    for file in files:
        if not file.is_file():
            raise LexibitError(f"importance: {file}: no such file")
    return files


def _facts(folder: Path) -> dict[str, Any]:
    """How large a model is, from the bytes on disk."""
    if not holds_codes(folder):
        return _float_facts(folder)
    contents = checkpoint.inspect(folder)
    return {
        "bytes": contents.file_bytes,
        "parameters": contents.parameters,
        "bits_per_weight": contents.bits_per_weight,
        "bits_per_parameter": contents.file_bits_per_parameter,
    }


def float_bits(folder: Path) -> int:
    """Of most parameters of a float model; training leaves them as they are."""
    measured = _float_facts(folder)["bits_per_weight"]
    return 32 if measured is None else round(measured)


def _float_facts(folder: Path) -> dict[str, Any]:
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:  # PyTorch's own form says nothing of its tensors without loading them
        nbytes = sum(file.stat().st_size for file in folder.glob("*.bin"))
        return {"bytes": nbytes, "parameters": None, "bits_per_weight": None, "bits_per_parameter": None}
    tensors = [
        tensor for file in files for tensor in headers(file).values() if tensor.dtype.is_floating_point
    ]
    count = max(sum(prod(tensor.shape) for tensor in tensors), 1)
    nbytes = sum(file.stat().st_size for file in files)
    stored = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
    return {
        "bytes": nbytes,
        "parameters": count,
        "bits_per_weight": 8 * stored / count,
        "bits_per_parameter": 8 * nbytes / count,
    }


def versions() -> Mapping[str, str]:
    """Of what scores may depend on."""
    import platform

    import numpy
    import torch
    import transformers

    return {
        "lexibit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
    }
