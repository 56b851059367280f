"""Commands called from Python: checked before, and done in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import typer.main

from lexibit.errors import LexibitError, unknown
from lexibit.files import to_json


def options(command: str, settings: Mapping[str, Any], refused: Mapping[str, str] | None = None) -> list[str]:
    """The words that give a command some options.

    Args:
        command: its name.
        settings: options by name, without dashes. A list gives one several times, settings by name as
            ``NAME=VALUE``, and None not at all.
        refused: options that are not to be given, and why.

    Raises:
        LexibitError: the command has no such option, or takes no such value.
    """
    flags = {
        flag.lstrip("-"): parameter
        for parameter in _command(command).params
        for flag in parameter.opts
        if flag.startswith("--")
    }
    words = []
    for given, value in settings.items():
        name = given.replace("_", "-")
        if name in (refused or {}):
            raise LexibitError(f"{given}: {(refused or {})[name]}")
        if name not in flags:
            known = set(flags) - set(refused or ()) - {"help"}
            raise unknown(f"option of lexibit {command}", given, (flag.replace("-", "_") for flag in known))
        parameter = flags[name]
        if value is None:
            continue
        if getattr(parameter, "is_flag", False):
            if not isinstance(value, bool):
                raise LexibitError(f"{name} must be true or false, not {value!r}")
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        several = isinstance(value, Mapping | list | tuple)
        if several and not getattr(parameter, "multiple", False):
            raise LexibitError(f"{name} takes one value, not {value!r}")
        if isinstance(value, Mapping):
            value = [f"{key}={_text(one)}" for key, one in value.items()]
        for one in value if several else [value]:
            words += [f"--{name}", _text(one)]
    return words


def parsed(words: Sequence[str]) -> Any:
    """A command and its options as the command line understands them: a context, with ``params``.

    Raises:
        LexibitError: it would be refused.
    """
    name, *others = words
    with _refused(name):
        return _command(name).make_context(name, list(others))


def call(words: Sequence[str]) -> None:
    """Do what a command line does, in this process; what it prints goes to standard output.

    Raises:
        LexibitError: it fails.
    """
    from lexibit.cli import app

    with _refused(words[0]):
        app(list(words), standalone_mode=False)


@cache
def _command(name: str) -> Any:
    """A command; made once, which takes as long as reading a hundred command lines."""
    from lexibit.cli import app

    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(to_json(value).split())


@contextmanager
def _refused(command: str) -> Iterator[None]:
    try:
        yield
    except LexibitError:
        raise
    except Exception as error:
        # typer's own, whose class is not the same in all versions
        if not hasattr(error, "format_message"):
            raise
        raise LexibitError(f"lexibit {command}: {error.format_message()}") from error
