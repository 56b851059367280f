"""Running only the part of a model that changed: what its first layers give is kept, and given again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

from torch import Tensor, nn


class Replay:
    """Gives again what a model's first layers gave, for runs that ask the same in the same order.

    A run is any function that calls the model, always with the same batches; the n-th call of one run has the
    input of the n-th of any other. Which layers are replayed moves forward only, as a search does that goes
    from layer to layer: what they give is computed from what is kept, once.

    Args:
        blocks: the modules that run one after another, each called once whenever the model is. With none,
            nothing is kept, and all is run.
        which: gives the number of the call that is made, for runs whose calls come in any order, or in
            several threads; the n-th call of a run has the number n if not given.
    """

    def __init__(self, blocks: Sequence[nn.Module], which: Callable[[], int] | None = None) -> None:
        self._blocks = list(blocks)
        self._kept: dict[int, Any] = {}  # by call, what the block in front of the first that runs gave
        self._which = which
        self.first = 0

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    def kept(self, number: int) -> Any:
        """What the block in front of the first that runs gave in a call."""
        return self._kept[number]

    def advance(self, first: int, run: Callable[[], object]) -> None:
        """Keep what the blocks in front of ``first`` give as they are now, by one run, and replay it on."""
        first = min(first, self.count)
        if first <= self.first:
            return
        kept: dict[int, Any] = {}
        which = self._which or count().__next__

        def keep(*call: Any) -> None:
            kept[which()] = _detached(call[2])

        hook = self._blocks[first - 1].register_forward_hook(keep)
        try:
            with self.replaying():
                run()
        finally:
            hook.remove()
        self.first, self._kept = first, kept

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """The model with its first blocks replaced by what they gave; for one run."""
        skipped = self._blocks[: self.first]
        which = self._which or count().__next__
        current = threading.local()

        def begin(*_: Any, **__: Any) -> Any:
            current.given = self._kept[which()]
            return current.given

        before = [module.__dict__.get("forward") for module in skipped]
        try:
            for place, module in enumerate(skipped):
                # an attribute of the module itself, which hides its class's
                module.__dict__["forward"] = begin if place == 0 else lambda *_, **__: current.given
            yield
        finally:
            for module, forward in zip(skipped, before, strict=True):
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward


def chains(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Modules, with their names, that may run one after another, each on what the one before it gave.

    These are a model's lists of layers, several in an encoder-decoder; none where one layer is used again.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(one) for one in module}) == 1
    ]
    return [
        [(f"{name}.{number}", child) for number, child in enumerate(module)]
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists) and len(set(module)) == len(module)
    ]


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    return value


def trace(
    model: nn.Module, blocks: Sequence[nn.Module], modules: Iterable[nn.Module], run: Callable[[], object]
) -> dict[nn.Module, int] | None:
    """How many of a model's blocks have ended when each module is called first, by one run.

    Args:
        model: that runs.
        blocks: the modules that should run one after another, once in each call of the model.
        modules: to look at.
        run: calls the model.

    Returns:
        By module that was called; None if the blocks do not run so.
    """
    ended, seen, orderly = 0, dict[nn.Module, int](), True

    def starts(*_: object) -> None:
        nonlocal ended, orderly
        orderly &= ended in (0, len(blocks))
        ended = 0

    def called(module: nn.Module, _: object) -> None:
        seen[module] = min(seen.get(module, ended), ended)

    def begins(module: nn.Module, _: object) -> None:
        nonlocal orderly
        orderly = orderly and ended < len(blocks) and module is blocks[ended]

    def ends(*_: object) -> None:
        nonlocal ended
        ended += 1

    hooks = [model.register_forward_pre_hook(starts)]
    hooks += [block.register_forward_pre_hook(begins) for block in blocks]
    hooks += [module.register_forward_pre_hook(called) for module in modules]
    hooks += [block.register_forward_hook(ends) for block in blocks]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen if orderly and ended in (0, len(blocks)) else None
