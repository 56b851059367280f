"""Tasks: what a model is good for, measured on data. One file each, and this registry."""

from __future__ import annotations

from collections.abc import Iterator

from lexibit.errors import unknown
from lexibit.tasks.base import Examples, Score, Task
from lexibit.tasks.sts import STS

__all__ = ["Examples", "Score", "Task", "names", "task"]

_TASKS: dict[str, type[Task]] = {cls.name: cls for cls in (STS,)}


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        LexibitError: no such task.
    """
    if name not in _TASKS:
        raise unknown("task", name, _TASKS)
    return _TASKS[name]()


def names() -> Iterator[str]:
    """The names of all tasks."""
    return iter(sorted(_TASKS))
