"""Bits under a budget: which layer gets how many, so that the whole loses least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lexibit.errors import LexibitError

_STATES = 1 << 17  # sums that are carried on, at most


class Option(NamedTuple):
    """One way to store a layer.

    Attributes:
        bits: of a code.
        nbytes: all that is stored.
        damage: what it does to the model, less is better; those of several layers are added up.
    """

    bits: int
    nbytes: int
    damage: float


def allocate(options: Mapping[str, Sequence[Option]], nbytes: int) -> dict[str, int]:
    """Choose an option for each layer, of least damage in all, within some bytes.

    A knapsack with one choice of each class, solved by dynamic programming over sums of bytes of which no
    other is smaller and does less damage. It is exact while there are no more than 131072 of these; of
    more, those whose bytes fall into the same of so many equal steps are one, the least damaging, so that the
    budget is kept and the damage is that of a budget which is smaller by one step a layer at most.

    Args:
        options: by layer; one at least.
        nbytes: the budget.

    Returns:
        The bits of each layer; of equal damage, with the fewest bytes.

    Raises:
        LexibitError: the smallest options of all layers take more, or a damage is NaN.
    """
    least = sum(min(one.nbytes for one in some) for some in options.values())
    if least > nbytes:
        raise LexibitError(f"the budget is {nbytes} bytes, and the fewest bits take {least}: give more")
    for name, some in options.items():
        if any(one.damage != one.damage for one in some):
            raise LexibitError(f"{name}: a damage is NaN: bits cannot be chosen by it")
    sizes, damages = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    rest = least
    for some in options.values():
        rest -= min(one.nbytes for one in some)  # what the layers that follow take at least
        size = (sizes[:, None] + np.array([one.nbytes for one in some])).ravel()
        damage = (damages[:, None] + np.array([one.damage for one in some])).ravel()
        kept = _undominated(size, damage, nbytes - rest)
        sizes, damages = size[kept], damage[kept]
        history.append(np.divmod(kept, len(some)))
    at = int(np.lexsort((sizes, damages))[0])
    chosen = {}
    for (name, some), (before, option) in zip(list(options.items())[::-1], history[::-1], strict=True):
        chosen[name] = some[int(option[at])].bits
        at = int(before[at])
    return {name: chosen[name] for name in options}


def _undominated(size: NDArray[np.int64], damage: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """The places of those within ``most`` bytes than which no smaller one does as little damage."""
    order = np.lexsort((damage, size))
    order = order[size[order] <= most]
    best = np.minimum.accumulate(damage[order])
    order = order[np.concatenate([[True], damage[order][1:] < best[:-1]])]
    if len(order) > _STATES:
        step = (size[order] * _STATES) // (most + 1)
        # of one step the last does least damage
        order = order[np.concatenate([step[1:] != step[:-1], [True]])]
    return np.asarray(order, dtype=np.int64)
