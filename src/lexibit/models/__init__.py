"""Models that transformers lacks, or that are made from nothing: one file each, and this registry.

Importing this package tells transformers' Auto classes of them. To add one, write its file, with ``SETTINGS``
and ``create``, and add its module to the list below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit.errors import LexibitError, unknown
from lexibit.models import awd_lstm, transformer
from lexibit.models.awd_lstm import AWDLSTMConfig, AWDLSTMForCausalLM

__all__ = ["CLASSES", "AWDLSTMConfig", "AWDLSTMForCausalLM", "create", "names"]

_MODELS: dict[str, ModuleType] = {"awd-lstm": awd_lstm, "transformer": transformer}

# what a config.json may name in 'architectures' that transformers does not have
CLASSES: dict[str, type[PreTrainedModel]] = {cls.__name__: cls for cls in (AWDLSTMForCausalLM,)}


def create(
    name: str, task_texts: Iterable[str], settings: Mapping[str, Any] | None = None, *, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with random weights, and a tokenizer made from the text that it will be trained on.

    Args:
        name: one of :func:`names`.
        task_texts: the training text, in pieces of any size.
        settings: what is to differ from the model's ``SETTINGS``: numbers, or texts that are numbers.
        seed: of the random weights.

    Raises:
        LexibitError: no such model or setting, a setting that is no number or out of range, or no text.
    """
    if name not in _MODELS:
        raise unknown("model", name, _MODELS)
    module = _MODELS[name]
    values = {}
    for setting, value in (settings or {}).items():
        if setting not in module.SETTINGS:
            raise unknown(f"setting of {name}", setting, module.SETTINGS)
        values[setting] = _number(f"{name}: {setting}", value, type(module.SETTINGS[setting]))
    made: tuple[PreTrainedModel, PreTrainedTokenizerBase] = module.create(task_texts, values, seed)
    return made


def _number(what: str, value: object, kind: type[int] | type[float]) -> int | float:
    """A setting's value as the number that its default is."""
    number = None
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            number = kind(value)
    except (ValueError, OverflowError):
        pass
    if number is None or (isinstance(value, float) and number != value):
        raise LexibitError(f"{what} must be {'a whole' if kind is int else 'a'} number, not {value!r}")
    return number


def sizes() -> str:
    """The settings of all models with their defaults, as a text."""
    return " ".join(
        f"{name}: {', '.join(f'{key}={value}' for key, value in _MODELS[name].SETTINGS.items())}."
        for name in names()
    )


def names() -> Iterator[str]:
    """The names of all models."""
    return iter(sorted(_MODELS))
