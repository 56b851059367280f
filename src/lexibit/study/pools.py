"""Where a study's steps are done: processes of this machine, or the machines of a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from itertools import count
from typing import Any, Protocol

import torch
from tqdm import tqdm

from lexibit.errors import LexibitError
from lexibit.study.steps import Step
from lexibit.workers import connected

_TRIES = 10  # of a step whose machine or process is lost
_PAUSE = 0.2  # seconds, before a step that another process is at is asked for again


class Pool(Protocol):
    """Where steps are done."""

    def room(self, step: Step) -> bool:
        """Whether a step can be begun."""

    def submit(self, function: Callable[[Step], Any], step: Step) -> Future[Any]:
        """Begin a step."""

    def outcome(self, future: Future[Any]) -> Any:
        """What came of a step that has ended: a result, or what was raised; its place is free again."""


def in_order(
    function: Callable[[Step], Any], graph: TopologicalSorter[Step], pool: Pool, again: Any
) -> Generator[tuple[Step, Any]]:
    """Steps as they are done, each behind those that it needs.

    Args:
        function: does a step; pickled.
        graph: the steps, prepared; each is marked as done when its outcome was taken.
        pool: where.
        again: the result of a step that is to be tried once more, later.

    Yields:
        A step, and its result or what it raised.
    """
    order = count()
    waiting: list[tuple[int, int, Step]] = []
    later: list[Step] = []
    running: dict[Future[Any], Step] = {}
    while graph.is_active():
        # what is begun is ended first: rows come early
        for step in graph.get_ready():
            heappush(waiting, (-step.depth, next(order), step))
        while waiting and pool.room(waiting[0][2]):
            _, _, step = heappop(waiting)
            running[pool.submit(function, step)] = step
        if running:
            ended = wait(running, timeout=_PAUSE if later else None, return_when=FIRST_COMPLETED).done
        else:
            time.sleep(_PAUSE)
            ended = set()
        if not waiting:
            for step in later:
                heappush(waiting, (-step.depth, next(order), step))
            later = []
        for future in ended:
            step, outcome = running.pop(future), pool.outcome(future)
            if outcome == again:
                later.append(step)
                continue
            yield step, outcome
            graph.done(step)


class Processes:
    """Some processes of this machine, within some memory.

    A process does one step after the other. One that ends takes its own step with it, and no other.
    """

    def __init__(self, count: int, memory: int) -> None:
        """Take up to ``count`` processes, whose steps take ``memory`` bytes together; one always may run."""
        self._count, self._memory = count, memory
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[Any], tuple[ProcessPoolExecutor, int]] = {}

    def __enter__(self) -> Processes:
        """Start nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the processes, whatever they are at."""
        busy = [executor for executor, _ in self._busy.values()]
        for executor in busy:
            # it has no public way to stop what runs
            for process in list((getattr(executor, "_processes", None) or {}).values()):
                process.kill()
        for executor in [*self._idle, *busy]:
            executor.shutdown(cancel_futures=True)

    def room(self, step: Step) -> bool:
        """Whether a step can be begun."""
        taken = sum(memory for _, memory in self._busy.values())
        return not self._busy or (len(self._busy) < self._count and taken + step.memory <= self._memory)

    def submit(self, function: Callable[[Step], Any], step: Step) -> Future[Any]:
        """Begin a step."""
        executor = self._idle.pop() if self._idle else self._start()
        try:
            future = executor.submit(function, step)
        except BrokenProcessPool:
            # ended while it had nothing to do
            executor.shutdown(wait=False)
            executor = self._start()
            future = executor.submit(function, step)
        self._busy[future] = executor, step.memory
        return future

    def outcome(self, future: Future[Any]) -> Any:
        """What came of a step that has ended."""
        executor, _ = self._busy.pop(future)
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            executor.shutdown(wait=False)
            return LexibitError(
                "its process was killed: was there too little memory, or is the program a script without "
                "if __name__ == '__main__'?"
            )
        self._idle.append(executor)
        return future.result() if error is None else error

    def _start(self) -> ProcessPoolExecutor:
        threads = max(torch.get_num_threads() // self._count, 1)
        # a new interpreter: a copy of this one would have its locks, held by threads that the copy lacks
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (threads,))


def _begin(threads: int) -> None:
    """A process's first act: it ends with the one that started it, which alone minds Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    # progress bars would share a lock with other processes, which a kill leaves behind
    tqdm.set_lock(threading.RLock())
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


class Cluster:
    """The machines of a Ray cluster, which all see the same files under the same paths.

    A step that takes more memory than any machine has gets one whole.
    """

    def __init__(self, address: str, cpus: int = 1, gpus: float = 0) -> None:
        """Use a cluster.

        Args:
            address: of the cluster, or ``auto``.
            cpus: the most that a step takes.
            gpus: the most that a step takes.
        """
        self._address, self._cpus, self._gpus = address, cpus, gpus
        self._connection: AbstractContextManager[Any] = connected(address)
        self._running = 0

    def __enter__(self) -> Cluster:
        """Connect to it.

        Raises:
            LexibitError: Ray is not installed, there is no cluster there, or no machine has so many CPUs and
                GPUs.
        """
        self._ray = self._connection.__enter__()
        fit = [
            node["Resources"]
            for node in self._ray.nodes()
            if node["Alive"]
            and node["Resources"].get("CPU", 0) >= self._cpus
            and node["Resources"].get("GPU", 0) >= self._gpus
        ]
        if not fit:
            self._connection.__exit__(None, None, None)
            raise LexibitError(
                f"--ray {self._address}: no machine has {self._cpus} CPUs and {self._gpus:g} GPUs: ask for "
                "fewer, as cpus and gpus in the study"
            )
        self._memory = int(max(resources.get("memory", 0) for resources in fit))
        self._most = self._count()
        # made once: each that is made is sent to the cluster
        self._remote = self._ray.remote(max_retries=_TRIES)(_with_threads)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave it."""
        self._connection.__exit__(None, None, None)

    def room(self, step: Step) -> bool:
        """Whether a step can be begun: twice what can run, so that every machine has its next at hand."""
        return self._running < self._most

    def _count(self) -> int:
        return 2 * max(int(self._ray.cluster_resources().get("CPU", 1)), 1)

    def submit(self, function: Callable[[Step], Any], step: Step) -> Future[Any]:
        """Begin a step; if its machine is lost, another does it."""
        remote = self._remote.options(
            num_cpus=step.cpus, num_gpus=step.gpus, memory=min(step.memory, self._memory)
        )
        self._running += 1
        future: Future[Any] = remote.remote(function, step).future()
        return future

    def outcome(self, future: Future[Any]) -> Any:
        """What came of a step that has ended."""
        self._running -= 1
        self._most = self._count()  # machines come and go
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, self._ray.exceptions.RayTaskError):
            return error.cause or error
        return LexibitError(f"its machine was lost: {' '.join(str(error).split())[:300]}")


def _with_threads(function: Callable[[Step], Any], step: Step) -> Any:
    torch.set_num_threads(max(step.cpus, 1))
    return function(step)
