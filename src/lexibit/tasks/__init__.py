"""Tasks: what a model is good for, measured on data. One file each, and this registry.

To add one, write its file and add its class to the list below.
"""

from __future__ import annotations

from collections.abc import Iterator

from lexibit.errors import LexibitError, unknown
from lexibit.tasks.base import Difference, Examples, Score, Task, Trainable, digest
from lexibit.tasks.causal import CausalLM
from lexibit.tasks.cola import CoLA
from lexibit.tasks.masked import MaskedLM
from lexibit.tasks.mnli import MNLI, MNLIMismatched
from lexibit.tasks.mrpc import MRPC
from lexibit.tasks.multi30k import Multi30k
from lexibit.tasks.own import Classification, Regression
from lexibit.tasks.ptb import PTB
from lexibit.tasks.qnli import QNLI
from lexibit.tasks.qqp import QQP
from lexibit.tasks.rte import RTE
from lexibit.tasks.squad import SQuAD
from lexibit.tasks.sst2 import SST2
from lexibit.tasks.sts import STS
from lexibit.tasks.stsb import STSB
from lexibit.tasks.wikitext2 import WikiText2

__all__ = ["Difference", "Examples", "Score", "Task", "Trainable", "digest", "names", "task", "trainable"]

_TASKS: dict[str, type[Task]] = {
    cls.name: cls
    for cls in (
        CoLA,
        SST2,
        RTE,
        QNLI,
        MNLI,
        MNLIMismatched,
        MRPC,
        QQP,
        STSB,
        STS,
        SQuAD,
        Multi30k,
        Classification,
        Regression,
        CausalLM,
        WikiText2,
        PTB,
        MaskedLM,
    )
}


def task(name: str) -> Task:
    """The task of that name.

    Raises:
        LexibitError: no such task.
    """
    if name not in _TASKS:
        raise unknown("task", name, _TASKS)
    return _TASKS[name]()


def trainable(name: str) -> Trainable:
    """The task of that name, to train a model on.

    Raises:
        LexibitError: no such task, or one that only measures.
    """
    known = list(names(Trainable))
    if name not in _TASKS:
        raise unknown("task", name, known)
    found = task(name)
    if not isinstance(found, Trainable):
        raise LexibitError(
            f"task {name!r} measures models, and trains none: choose one of {', '.join(known)}"
        )
    return found


def names(kind: type[object] = object) -> Iterator[str]:
    """The names of all tasks, or of those of a kind."""
    return iter(sorted(name for name, cls in _TASKS.items() if issubclass(cls, kind)))
