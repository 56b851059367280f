"""Work side by side: its order, its threads, and how much of it waits."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
import torch

from lexibit.threads import side_by_side, single


@pytest.fixture(autouse=True)
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_several_threads_with_one_thread_each() -> None:
    seen: set[int] = set()

    def work(number: int) -> tuple[int, int]:
        seen.add(threading.get_ident())
        time.sleep(0.01 * (number % 3))
        return number, torch.get_num_threads()

    assert list(side_by_side(work, range(20))) == [(number, 1) for number in range(20)]
    assert len(seen) == 3
    assert torch.get_num_threads() == 3


def test_work_inside_of_work_is_done_in_its_own_thread() -> None:
    def outer(number: int) -> list[int]:
        return list(side_by_side(lambda _: threading.get_ident(), range(4)))

    for inner in side_by_side(outer, range(3)):
        assert len(set(inner)) == 1


def test_inside_of_single_there_is_still_work_side_by_side() -> None:
    with single() as threads:
        assert threads == 3
        assert torch.get_num_threads() == 1
        found = set(side_by_side(lambda _: time.sleep(0.01) or threading.get_ident(), range(9)))
        assert len(found) == 3
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_results_that_nobody_asks_for_do_not_pile_up() -> None:
    done: list[int] = []
    with closing(side_by_side(done.append, range(100))) as work:
        next(work)
        time.sleep(0.05)
        assert len(done) <= 7
    assert len(done) <= 10
    assert torch.get_num_threads() == 3


def test_an_error_ends_all_and_gives_the_threads_back() -> None:
    def work(number: int) -> int:
        return 1 // (number - 3)

    with pytest.raises(ZeroDivisionError):
        list(side_by_side(work, range(50)))
    assert torch.get_num_threads() == 3
