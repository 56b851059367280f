"""k-means: the levels that lie nearest to the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lexibit.errors import LexibitError, unknown
from lexibit.schemes import kmeans1d
from lexibit.schemes.base import Scheme
from lexibit.schemes.line.codes import nearest

# Where the exact optimum takes moments; above, it takes seconds a matrix and gains next to nothing.
_MOST_EXACT_BITS = 4
_INITS = ("auto", "optimal", "companding", "k-means++")
_ITERATIONS = {"k-means++": 3, "companding": 50}


@dataclass(frozen=True)
class KMeans(Scheme):
    """Zhao et al. 2020, section 3.3 and Algorithm 1; and the exact optimum.

    The paper says: a k-means++ start and at most a few Lloyd iterations (3 by default; Table 6 tries 3,
    5, 10 and 20), per weight matrix. That is ``init="k-means++"``.

    We chose two more: ``optimal``, the best partition of all, which can be found outright because
    weights are one-dimensional; and ``companding``, which starts from levels as dense as the cube root
    of the weights' density (Panter and Dite 1951) and iterates until nothing moves. Both need no seed.
    The default, ``auto``, is ``optimal`` up to 4 bits and ``companding`` above.

    Attributes:
        init: ``auto``, ``optimal``, ``companding`` or ``k-means++``.
        iterations: Lloyd iterations at most: 3 by default for ``k-means++``, 50 for ``companding``.
    """

    name: ClassVar[str] = "kmeans"

    init: str = "auto"
    iterations: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.init not in _INITS:
            raise unknown("init of scheme 'kmeans'", self.init, _INITS)
        if self.iterations is None:
            return
        if self.init not in _ITERATIONS:
            raise LexibitError(
                f"kmeans iterations do not apply to init={self.init!r}: add init=k-means++ or init=companding"
            )
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int):
            raise LexibitError(f"kmeans iterations must be a whole number, not {self.iterations!r}")
        if self.iterations < 0:
            raise LexibitError(f"kmeans iterations must not be negative, not {self.iterations}")

    @property
    def weighs(self) -> bool:
        """It minimises a weighted error."""
        return True

    @property
    def separate(self) -> bool:
        """Not if it draws: one generator serves all groups."""
        return self.init != "k-means++"

    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Levels and codes; see :meth:`Scheme.fit`."""
        x, k = values.numpy(), 1 << bits
        weights = None if importance is None else importance.numpy()
        init = self.init
        if init == "auto":
            init = "optimal" if bits <= _MOST_EXACT_BITS else "companding"
        if init == "optimal":
            levels = kmeans1d.optimal(x, k, weights)
        else:
            iterations = _ITERATIONS[init] if self.iterations is None else self.iterations
            if init == "companding":
                levels = kmeans1d.companding(x, k, iterations, weights)
            else:
                rng = np.random.default_rng(seed)
                levels = kmeans1d.plusplus(x, k, iterations, rng, weights)
        codes = nearest(x, levels)
        return torch.from_numpy(levels.astype(np.float32)), torch.from_numpy(codes)
