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


@dataclass(frozen=True)
class KMeans(Scheme):
    """Zhao et al. 2020, section 3.3 and Algorithm 1; and the exact optimum.

    The paper says: a k-means++ start and at most a few Lloyd iterations (3 by default; Table 6 tries
    3, 5, 10 and 20), per weight matrix. That is ``init="k-means++"``.

    We chose as default ``init="optimal"``: weights are one-dimensional, where the best partition of all
    can be found outright, sooner than the iterations take, without a seed, and with the lowest error.

    Attributes:
        init: ``optimal`` or ``k-means++``.
        iterations: Lloyd iterations at most, for ``k-means++`` only.
    """

    name: ClassVar[str] = "kmeans"
    weighs: ClassVar[bool] = True

    init: str = "optimal"
    iterations: int = 3

    def __post_init__(self) -> None:
        """Check the options."""
        if self.init not in ("optimal", "k-means++"):
            raise unknown("init of scheme 'kmeans'", self.init, ["optimal", "k-means++"])
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int):
            raise LexibitError(f"kmeans iterations must be a whole number, not {self.iterations!r}")
        if self.iterations < 0:
            raise LexibitError(f"kmeans iterations must not be negative, not {self.iterations}")

    def fit(self, values: Tensor, bits: int, importance: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
        """Levels and codes; see :meth:`Scheme.fit`."""
        x = values.numpy()
        weights = None if importance is None else importance.numpy()
        if self.init == "optimal":
            levels = kmeans1d.optimal(x, 1 << bits, weights)
        else:
            rng = np.random.default_rng(seed)
            levels = kmeans1d.plusplus(x, 1 << bits, self.iterations, rng, weights)
        codes = kmeans1d.nearest(x, levels)
        return torch.from_numpy(levels.astype(np.float32)), torch.from_numpy(codes)
