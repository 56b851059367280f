"""What a study is: one record, read from a YAML or Python file."""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from lexibit.errors import LexibitError, unknown

Settings = Mapping[str, Any]

FLOAT = "float"  # what float models have in the place of a scheme
AXES = ("bits", "groups", "importance")
_TRAINED = ("finetune", "tune", "evaluate")


@dataclass(frozen=True)
class Study:
    """A matrix of runs: models x tasks x schemes x bits x groups x importance x seeds, and tuned or not.

    Settings are options of the command of that name, without dashes: ``finetune={"epochs": 3}`` is
    ``lexibit finetune --epochs 3``. A list gives an option several times, settings by name give it as
    ``NAME=VALUE``.

    Attributes:
        models: by the name that tables call them, where each is: a folder or a hub name; or settings with
            ``source``, or with ``create`` (a model made from nothing) and ``option``. A model's own
            ``finetune``, ``tune`` and ``evaluate`` add to the study's.
        tasks: by their names, settings that add to the study's: ``data``, ``finetune``, ``tune``,
            ``evaluate``; or the names alone.
        schemes: by the name that tables call them, options of ``lexibit quantize``. A scheme's own ``bits``,
            ``groups`` and ``importance``, one or several, take the place of the study's.
            ``calibrate: task`` is ``--calibrate task:NAME`` with the name of each cell's task.
        bits, groups, importance: the axes; None is the command's default.
        seeds: of everything random, but for evaluation, whose sample and intervals are the same for all.
        finetune: how float models are trained on a task before they are quantized; not at all if not given.
        tune: how the codebooks are trained afterwards; scores are then taken before and after.
        evaluate: how models are measured.
        data: the folder of the tasks' data; the hub if not given.
        cpus, gpus: that a step takes, on a cluster.
        published: the model of papers whose numbers tables stand beside (:mod:`lexibit.study.published`), or
            one by the name of each of the study's models.
        name, about: what tables and pages say of the study.
    """

    models: Mapping[str, str | Settings]
    tasks: Mapping[str, Settings | None] | Sequence[str]
    schemes: Mapping[str, Settings]
    bits: Sequence[int] = (4,)
    groups: Sequence[str | None] = (None,)
    importance: Sequence[str | None] = (None,)
    seeds: Sequence[int] = (0,)
    finetune: Settings | Literal[False] | None = None
    tune: Settings | Literal[False] | None = None
    evaluate: Settings = field(default_factory=dict)
    data: str | None = None
    cpus: int = 1
    gpus: float = 0
    published: str | Mapping[str, str] | None = None
    name: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no study.

        Raises:
            LexibitError: a field is of another kind; names it.
        """
        for what in ("models", "schemes"):
            _by_name(what, getattr(self, what))
        if isinstance(self.tasks, str) or not isinstance(self.tasks, Mapping | Sequence) or not self.tasks:
            raise LexibitError(f"tasks must be names of tasks, like [cola, rte], not {self.tasks!r}")
        if isinstance(self.tasks, Mapping):
            _by_name("tasks", self.tasks)
        for axis in (*AXES, "seeds"):
            values = getattr(self, axis)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise LexibitError(f"{axis} must be a list, like [{_example(axis)}], not {values!r}")
            _check_values(axis, axis, values)
        for label, model in self.models.items():
            if not isinstance(model, str | Mapping):
                raise LexibitError(f"models.{label} must be a folder or a hub name, not {model!r}")
            settings = model_settings(model)
            if ("source" in settings) == ("create" in settings):
                raise LexibitError(
                    f"models.{label}: give either a source, or create, a model made from nothing"
                )
            if "option" in settings and "create" not in settings:
                raise LexibitError(f"models.{label}: option goes with create, a model made from nothing")
            _known(f"models.{label}", settings, {"source", "create", "option", *_TRAINED})
        for task, settings in self.by_task().items():
            _known(f"tasks.{task}", settings, {"data", *_TRAINED})
        for label, scheme in self.schemes.items():
            if label == FLOAT:
                raise LexibitError(f"schemes.{label}: the name is that of the float models: choose another")
            settings = _settings(f"schemes.{label}", scheme)
            for axis in AXES:
                _check_values(axis, f"schemes.{label}.{axis}", self.axis(axis, settings))
        for name, kind, least in (("cpus", int, 1), ("gpus", int | float, 0)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, kind) or number < least:
                bound = f"{'whole and ' if kind is int else ''}{least} or more"
                raise LexibitError(f"{name} must be a number, {bound}, not {number!r}")
        if isinstance(self.published, Mapping):
            _known("published", self.published, set(self.models))
        elif not isinstance(self.published, str | None):
            raise LexibitError(f"published must be a model's name, not {self.published!r}")
        for name in _TRAINED:
            if getattr(self, name) is not False:
                _settings(name, getattr(self, name))

    def by_task(self) -> dict[str, Settings]:
        """The settings of every task."""
        if isinstance(self.tasks, Mapping):
            return {name: _settings(f"tasks.{name}", settings) for name, settings in self.tasks.items()}
        return {name: {} for name in self.tasks}

    def by_scheme(self) -> dict[str, Settings]:
        """The settings of every scheme."""
        return {name: _settings(f"schemes.{name}", settings) for name, settings in self.schemes.items()}

    def axis(self, name: str, scheme: Settings) -> list[Any]:
        """The values of an axis for a scheme."""
        values = scheme.get(name, getattr(self, name))
        return list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]

    def with_model(self, name: str, source: str) -> Study:
        """The same study with one of its models elsewhere.

        Raises:
            LexibitError: it has no such model.
        """
        if name not in self.models:
            raise unknown("model of the study", name, self.models)
        # one that was to be made from nothing is there already
        made = {"create", "option"}
        moved = {key: value for key, value in model_settings(self.models[name]).items() if key not in made}
        return replace(self, models={**self.models, name: {**moved, "source": source}})

    def how(self, command: str, model: str, task: str) -> Settings | None:
        """The options of a command for a model and a task: the study's, the model's and the task's.

        None if the command is not to be done.
        """
        merged: dict[str, Any] | None = None
        for settings in (
            {command: getattr(self, command)},
            model_settings(self.models[model]),
            self.by_task()[task],
        ):
            own = settings.get(command)
            if own is False:
                merged = None
            elif own is not None:
                merged = {**(merged or {}), **_settings(command, own)}
        return merged


def read(file: Path, **changed: Any) -> Study:
    """The study in a file: YAML, or Python that makes a ``Study``, or settings, by the name ``study``.

    Python in the file is run: read files of people whom you trust.

    Args:
        file: ``.yaml``, ``.yml`` or ``.py``.
        changed: fields that take the place of the file's.

    Raises:
        LexibitError: it cannot be read, or holds no study.
    """
    settings = _python(file) if file.suffix == ".py" else _yaml(file)
    if isinstance(settings, Study):
        settings = {each.name: getattr(settings, each.name) for each in fields(Study)}
    if not isinstance(settings, Mapping):
        raise LexibitError(f"{file}: holds no study: write its fields by name, like 'bits: [3, 4]'")
    values = dict(settings) | changed
    values["name"] = values.get("name") or file.stem
    known = [each.name for each in fields(Study)]
    for name in values:
        if name not in known:
            raise LexibitError(f"{file}: {unknown('field of a study', name, known)}")
    if missing := [name for name in ("models", "tasks", "schemes") if not values.get(name)]:
        raise LexibitError(f"{file}: a study needs {' and '.join(missing)}")
    try:
        return Study(**values)
    except LexibitError as error:
        raise LexibitError(f"{file}: {error}") from error


def model_settings(model: str | Settings) -> Settings:
    """What is said of a model, by name."""
    return {"source": model} if isinstance(model, str) else model


def _yaml(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise LexibitError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LexibitError(f"{file}: is no YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's safe loader, but that a name that is given twice is an error, and not lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is given twice", node.value[place][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _python(file: Path) -> Any:
    if not file.is_file():
        raise LexibitError(f"{file}: cannot be read: no such file")
    try:
        made = runpy.run_path(str(file))
    except LexibitError:
        raise
    except Exception as error:  # anything may go wrong in it
        raise LexibitError(f"{file}: its Python fails: {type(error).__name__}: {error}") from error
    if "study" not in made:
        raise LexibitError(f"{file}: makes nothing by the name of 'study': write study = Study(...)")
    return made["study"]


def _by_name(what: str, given: Any) -> None:
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
        raise LexibitError(f"{what} must be settings by name, not {given!r}")


def _settings(what: str, given: Any) -> Settings:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise LexibitError(f"{what} must be settings by name, like {{epochs: 3}}, not {given!r}")
    return {name.replace("-", "_"): value for name, value in given.items()}


def _check_values(axis: str, where: str, values: Sequence[Any]) -> None:
    """See that the values of an axis are such as a row of results has."""
    for value in values:
        if axis in ("bits", "seeds"):
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, str | None)
        if not fits:
            raise LexibitError(f"{where} must be like [{_example(axis)}], not {value!r}")


def _known(what: str, settings: Settings, known: set[str]) -> None:
    for name in settings:
        if name not in known:
            raise unknown(f"setting in {what}", name, known)


def _example(axis: str) -> str:
    return {"bits": "2, 3, 4", "groups": "matrix, row", "seeds": "0, 1, 2"}.get(axis, "'E=1,C=0.999'")
