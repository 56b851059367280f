"""A study's work: its steps, each once, in processes of this machine or on a Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import torch

from lexibit import memory
from lexibit.description import describe
from lexibit.errors import LexibitError
from lexibit.files import write_json
from lexibit.study.cells import Cell, cells
from lexibit.study.definition import Study
from lexibit.study.pools import Cluster, Pool, Processes, in_order
from lexibit.study.steps import EVALUATE, QUANTIZE, TUNE, Step, versions
from lexibit.study.store import Store

_logger = logging.getLogger("lexibit")

_DONE, _BUSY = "done", "busy"

# a cell, its rows, and how many cells of all are done
Tell = Callable[[Cell, list[dict[str, Any]], int, int], None]


@dataclass(frozen=True)
class Done:
    """What a run did.

    Attributes:
        cells: of the study.
        before: those that were done before.
        failed: those that failed, and are tried again by the next run.
        seconds: that it took.
    """

    cells: int
    before: int
    failed: int
    seconds: float


def run(
    study: Study,
    folder: Path,
    *,
    processes: int | None = None,
    memory_bytes: int | None = None,
    ray: str | None = None,
    tell: Tell | None = None,
) -> Done:
    """Work through a study: what is in its folder already is not done again.

    A step is a command of lexibit, known by the content of what goes in; several cells share it. A run that
    was killed goes on when it is started again, and several runs may work on one folder. A cell that fails is
    recorded with its error, and the others go on.

    Args:
        study: which.
        folder: of its results; made if it is not there.
        processes: at once; one for every four threads that PyTorch has, if not given.
        memory_bytes: that they take together, about; what is free, if not given.
        ray: the address of a Ray cluster, whose machines do the steps and see ``folder`` and the study's
            files under the same paths.
        tell: is told of every cell and its rows, as it is done.

    Raises:
        LexibitError: the study names something that is not there, the folder is of something else, or the
            cluster is not there.
    """
    start = time.perf_counter()
    all_cells = cells(study)
    store = Store(folder)
    name = study.name or folder.name
    store.begin(asdict(study) | {"name": name, "cells": [cell.key for cell in all_cells]})
    if ray is not None:
        pool: Any = Cluster(
            ray, study.cpus, max((step.gpus for c in all_cells for step in c.steps()), default=0)
        )
    else:
        count = processes or max(torch.get_num_threads() // 4, 1)
        pool = Processes(count, memory.available() if memory_bytes is None else memory_bytes)
    with pool:
        before, failed = run_cells(all_cells, store, pool, name, tell)
    return Done(len(all_cells), before, failed, time.perf_counter() - start)


def run_cells(
    all_cells: Sequence[Cell], store: Store, pool: Pool, name: str, tell: Tell | None = None
) -> tuple[int, int]:
    """Do those of some cells that are not done.

    Returns:
        How many were done before, and how many failed.
    """
    graph: TopologicalSorter[Step] = TopologicalSorter()
    waiting: dict[Step, list[Cell]] = {}
    pending = [cell for cell in all_cells if not finished(store, cell)]
    before = done = len(all_cells) - len(pending)
    for cell in pending:
        if (rows := _known(cell, name, store)) is not None:
            store.write_rows(cell.key, rows)
            done += 1
            if tell is not None:
                tell(cell, rows, done, len(all_cells))
            continue
        waiting.setdefault(cell.evaluate, []).append(cell)
        for step in cell.steps():
            graph.add(step, *step.needs)
    graph.prepare()
    errors: dict[Step, str] = {}
    failed = 0
    for step, outcome in in_order(partial(_attempt, store, Path.cwd()), graph, pool, _BUSY):
        if outcome != _DONE:
            errors[step] = _message(step, outcome)
        for cell in waiting.get(step, []):
            error = next((errors[one] for one in cell.steps() if one in errors), None)
            rows = None if error else _known(cell, name, store)
            if rows is None:
                failed += 1
                rows = [_failed(cell, name, error or "what its steps made was removed or damaged meanwhile")]
            store.write_rows(cell.key, rows)
            done += 1
            if tell is not None:
                tell(cell, rows, done, len(all_cells))
    return before, failed


def finished(store: Store, cell: Cell) -> bool:
    """Whether the rows of a cell are there, whole and without an error."""
    rows = store.read_rows(cell.key)
    return bool(rows) and all(row["error"] is None for row in rows or [])


def _attempt(store: Store, cwd: Path, step: Step) -> str:
    """Do a step, unless it is done; the message of its error if it fails.

    Args:
        store: the study's folder.
        cwd: what paths in the study are relative to.
        step: which.
    """
    os.chdir(cwd)
    for needed in step.needs:
        if not store.is_done(needed):
            return "what it needs is not there"
    with store.claimed(step) as mine:
        if not mine:
            return _BUSY
        try:
            if not store.is_done(step):
                store.begin_step(step)
                _perform(store, step)
            if step.command in (QUANTIZE, TUNE) and not store.weights_file(step).exists():
                _describe(store, step)
        except LexibitError as error:
            return str(error)
        except Exception as error:  # one cell's fault is not the others'
            _logger.debug("%s", step.name, exc_info=True)
            return f"{type(error).__name__}: {error}"
    return _DONE


def _perform(store: Store, step: Step) -> None:
    start = time.perf_counter()
    memory.reset_peak()
    with _printing_to(store.steps / step.name / "log.txt"):
        print("$", step.line(store.steps), flush=True)
        facts = step.work(store.steps)
        seconds = time.perf_counter() - start
    record = {
        "command": step.line(store.steps),
        "seconds": seconds,
        "peak_memory": memory.peak(),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} CPUs",
        "versions": dict(versions()),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.finish_step(step, record | facts)


def _describe(store: Store, step: Step) -> None:
    """Keep what a report says of a model's weights; that it cannot be known is no fault of the model."""
    with _printing_to(store.steps / step.name / "log.txt"):
        try:
            weights = describe(step.out(store.steps), step.float_model(store.steps))
        except LexibitError as error:
            print("not known of its weights:", error)
            weights = []
        write_json(store.weights_file(step), weights)


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Have a file get what this process prints, even from compiled code and by handlers of logs."""
    with log.open("a", encoding="utf-8") as file:
        kept = []
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            kept.append((os.dup(number), number))
            os.dup2(file.fileno(), number)
        try:
            with redirect_stdout(file):
                yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for copy, number in kept:
                os.dup2(copy, number)
                os.close(copy)


def _message(step: Step, outcome: Any) -> str:
    text = " ".join(str(outcome).split())
    return f"lexibit {step.command}: {text or type(outcome).__name__}"


def _rows(cell: Cell, study: str, store: Store) -> list[dict[str, Any]]:
    """A row for every metric."""
    steps = cell.steps()
    records = {step.command: store.record(step) for step in steps}
    last = records[EVALUATE]
    said = store.scores(cell.evaluate)
    (scores,) = said["scores"].values()
    model = cell.evaluate.model
    shared = {
        "cell": cell.key,
        "study": study,
        **cell.labels,
        **{name: last[name] for name in ("bytes", "parameters", "bits_per_weight", "bits_per_parameter")},
        **{f"{command}_seconds": record["seconds"] for command, record in records.items()},
        "split": said["split"],
        "peak_memory": max(record["peak_memory"] for record in records.values()),
        "model_key": model.name if isinstance(model, Step) else None,
        "commands": "\n".join(record["command"] for record in records.values()),
        "versions": _json(last["versions"]),
        "machine": last["machine"],
        "at": last["at"],
    }
    return [
        shared
        | {"score": score["value"]}
        | {name: score[name] for name in ("metric", "low", "high", "higher", "examples")}
        for score in scores
    ]


def _known(cell: Cell, study: str, store: Store) -> list[dict[str, Any]] | None:
    """The rows of a cell whose steps were done before; None if they were not, or cannot be read."""
    if not store.is_done(cell.evaluate):
        return None
    try:
        return _rows(cell, study, store)
    except (OSError, ValueError, KeyError):
        return None


def _failed(cell: Cell, study: str, error: str) -> dict[str, Any]:
    return {
        "cell": cell.key,
        "study": study,
        **cell.labels,
        "versions": _json(versions()),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "error": error,
    }


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), sort_keys=True)
