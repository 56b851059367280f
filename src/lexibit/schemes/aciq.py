"""ACIQ: a uniform grid that is clipped where a bell curve of the weights' width would want it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from scipy.optimize import brentq
from scipy.special import lambertw, ndtr
from torch import Tensor

from lexibit.errors import unknown
from lexibit.schemes.lq import extremes
from lexibit.schemes.uniform import Uniform, mean_of, moments

_PRIORS = ("best", "gauss", "laplace")


@dataclass(frozen=True)
class ACIQ(Uniform):
    """Analytical clipping of Banner, Nahshan and Soudry 2019, as Hu, Meinel and Yang 2022 use it.

    The papers say: ``alpha`` minimises the expected squared error of clipping and rounding under a Laplace
    prior, ``2 b^2 exp(-alpha / b) + alpha^2 / (3 4^M)``, with ``b`` the mean of ``|w - mean|``, or a Gauss
    prior, ``(sigma^2 + alpha^2) (1 - erf(alpha / (sigma sqrt 2))) - sqrt(2 / pi) alpha sigma exp(-alpha^2 /
    (2 sigma^2)) + alpha^2 / (3 4^M)``, for ``M`` bits; whichever has the lower error on the tensor is kept.

    We chose: the minimum is solved for, by Lambert's W (``alpha / b = W(3 4^M)``) or as the root of the
    derivative; the grid never reaches beyond the outermost weights, where it would gain nothing, and to them
    where weights are equal and have no width; an affine grid is clipped about the mean. Of each group the
    better prior is found by quantizing with both.

    Attributes:
        prior: ``best``, ``gauss`` or ``laplace``.
    """

    name: ClassVar[str] = "aciq"

    prior: str = "best"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.prior not in _PRIORS:
            raise unknown("prior of scheme 'aciq'", self.prior, _PRIORS)

    def reach(self, values: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """To the better threshold; see :meth:`Uniform.reach`."""
        mean, sigma = moments(values)
        b = mean_of(values, lambda x, rows: (x - mean[rows]).abs_())
        alphas = {"gauss": sigma * gauss_threshold(bits), "laplace": b * laplace_threshold(bits)}
        outermost = extremes(values, self.affine)
        if self.prior != "best":
            return self._clipped(mean, alphas[self.prior], outermost)
        gauss, laplace = (self._clipped(mean, alphas[prior], outermost) for prior in ("gauss", "laplace"))
        better = self._error(values, laplace, bits) < self._error(values, gauss, bits)
        return torch.where(better, laplace[0], gauss[0]), torch.where(better, laplace[1], gauss[1])

    def _clipped(
        self, mean: Tensor, alpha: Tensor, outermost: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        centre = mean if self.affine else torch.zeros_like(mean)
        alpha = torch.where(alpha > 0, alpha, torch.inf)
        return (centre - alpha).maximum(outermost[0]), (centre + alpha).minimum(outermost[1])

    def _error(self, values: Tensor, reach: tuple[Tensor, Tensor], bits: int) -> Tensor:
        return self.between(*reach, bits).error(values)


@cache
def laplace_threshold(bits: int) -> float:
    """``alpha / b`` of least expected error under a Laplace prior: ``W(3 4^bits)``."""
    return float(lambertw(3.0 * 4.0**bits).real)


@cache
def gauss_threshold(bits: int) -> float:
    """``alpha / sigma`` of least expected error under a Gauss prior: the root of its derivative."""

    def derivative(a: float) -> float:
        # of the error above with sigma = 1, divided by four
        density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        return float(a * ndtr(-a) - density + a / (6 * 4.0**bits))

    return float(brentq(derivative, 1e-3, 20.0))
