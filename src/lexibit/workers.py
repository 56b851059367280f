"""Independent jobs, several at once: in threads within some memory, or on the machines of a Ray cluster."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from lexibit.errors import LexibitError, needs_extra

_TRIES = 10  # of a job whose machine or process is lost


class Job(Protocol):
    """What is done at once, as a whole."""

    @property
    def memory(self) -> int:
        """Bytes that it takes at most."""


J = TypeVar("J", bound=Job)
R = TypeVar("R")


def in_threads(function: Callable[[J], R], jobs: Sequence[J], memory: int) -> Generator[tuple[J, R]]:
    """The results of jobs as they come, with as many threads as PyTorch has, and as memory allows.

    A job that takes more than ``memory`` bytes is done while no other is.
    """
    waiting = sorted(jobs, key=lambda job: -job.memory)  # the largest first: beside it there is enough to do
    threads = max(torch.get_num_threads(), 1)
    pool = ThreadPoolExecutor(threads)
    running: dict[Future[R], J] = {}
    try:
        while waiting or running:
            for job in list(waiting):
                taken = sum(other.memory for other in running.values())
                if len(running) == threads or (running and taken + job.memory > memory):
                    continue
                waiting.remove(job)
                running[pool.submit(function, job)] = job
            done = wait(running, return_when=FIRST_COMPLETED).done
            while done:
                future = done.pop()
                yield running.pop(future), future.result()
                del future  # and its result, which may be large
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def on_ray(function: Callable[[J], R], jobs: Sequence[J], address: str) -> Generator[tuple[J, R]]:
    """The results of jobs as they come, from the machines of a Ray cluster, which all see the same files.

    A job takes one CPU and its memory. Jobs of a machine that is lost are done by another.

    Raises:
        LexibitError: Ray is not installed, there is no cluster at this address, or it could not do a job.
    """
    with connected(address) as ray:
        remote = ray.remote(max_retries=_TRIES)(function)
        waiting = sorted(jobs, key=lambda job: job.memory)
        running: dict[Any, J] = {}
        while waiting or running:
            # twice what can run: a machine that is done has the next one at hand
            most = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
            while waiting and len(running) < most:
                job = waiting.pop()
                running[remote.options(num_cpus=1, memory=job.memory).remote(job)] = job
            done, _ = ray.wait(list(running))
            while done:
                one = done.pop()
                try:
                    result = ray.get(one)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # what the job raised
                except (ray.exceptions.RayError, ConnectionError) as error:
                    raise LexibitError(
                        f"--ray {address}: the cluster could not do a piece of work ({error}): start it "
                        "again, or go on without --ray"
                    ) from error
                yield running.pop(one), result
                del one, result


def ray_memory(address: str) -> int:
    """The bytes that the machine of a Ray cluster with most of them offers.

    Raises:
        LexibitError: as :func:`on_ray`.
    """
    with connected(address) as ray:
        return int(max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]))


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that the program has already is used, and stays."""
    with needs_extra("ray"):
        import ray
    if ray.is_initialized():
        yield ray
        return
    _reach(address)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """See whether anybody listens at an address: Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> LexibitError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return LexibitError(f"--ray {address}: no cluster there ({reason}): start one with 'ray start --head'")
