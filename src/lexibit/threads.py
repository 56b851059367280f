"""Work in threads whose results do not depend on how many there are."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")

_state = threading.local()


@contextmanager
def single() -> Iterator[int]:
    """PyTorch on one thread inside: how a product is cut into parts for several can change its last bits.

    Gives how many threads there were outside, for :func:`side_by_side`.
    """
    before = getattr(_state, "threads", None)
    threads: int = before or torch.get_num_threads()
    _state.threads = threads
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        _state.threads = before
        if before is None:
            torch.set_num_threads(threads)


def side_by_side(function: Callable[[In], Out], items: Iterable[In]) -> Generator[Out]:
    """``function`` of every item, in their order: as many at once as PyTorch has threads, each on one.

    Inside a piece of such work there is one thread, and one piece is done after the other.
    """
    items = list(items)
    with single() as threads:
        if threads == 1 or len(items) < 2:
            yield from map(function, items)
            return
        pool = ThreadPoolExecutor(threads)
        waiting: deque[Future[Out]] = deque()
        try:
            for item in items:
                # results that are not asked for yet take memory
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
        finally:
            # what has not begun is not wanted any more, if the caller stops here
            pool.shutdown(cancel_futures=True)
