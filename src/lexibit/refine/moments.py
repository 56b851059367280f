"""What is known of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lexibit.errors import LexibitError


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs ``x`` of a layer, summed over all that were seen.

    Attributes:
        second: float32 ``[channels, channels]``, of ``x x^T``.
        cross: float32 like it, of ``y x^T``, with y what the float model has in the place of x; None if they
            are the same.
        count: how many inputs were seen.
    """

    second: Tensor
    cross: Tensor | None
    count: int

    def checked(self, name: str, channels: int) -> Moments:
        """The same.

        Raises:
            LexibitError: they are not those of so many channels, not finite, or all zero.
        """
        for moments in (self.second, self.cross):
            if moments is None:
                continue
            if moments.shape != (channels, channels) or moments.dtype != torch.float32:
                raise LexibitError(
                    f"{name}: the moments of its inputs are {moments.dtype} {list(moments.shape)}, must be "
                    f"float32 {[channels, channels]}"
                )
            if not moments.isfinite().all():
                bad = int((~moments.isfinite()).sum())
                raise LexibitError(
                    f"{name}: the moments of its inputs are NaN or infinite in {bad} places: look at the "
                    "texts, and at what the model makes of them"
                )
        if not self.second.diagonal().any():
            raise LexibitError(
                f"{name}: its inputs are all zero, so that no error would count: leave moments out"
            )
        return self

    def damped(self, share: float) -> Tensor:
        """The second moments, with a share of the mean of their diagonal added to it: they can be inverted.

        Ten times as much, and again, where rounding left them such that they cannot.
        """
        found = self.second.clone()
        more = share * float(found.diagonal().double().mean())
        found.diagonal().add_(more)
        while int(torch.linalg.cholesky_ex(found.double()).info):
            found.diagonal().add_(9 * more)
            more *= 10
        return found

    def freedom(self, damping: float) -> Tensor:
        """How far an error in each channel can be made good by the others: the diagonal of ``H^-1``."""
        factor = self.damped(damping).double()
        torch.linalg.cholesky(factor, out=factor)
        return torch.cholesky_inverse(factor).diagonal().float()

    def corrected(self, matrix: Tensor, share: float, damping: float) -> Tensor:
        """What a matrix ``[rows, channels]`` should be for inputs that are not the float model's.

        The least-squares solution of ``matrix y ~ corrected x`` is ``matrix C H^-1``; a share of the way to
        it is gone.
        """
        if self.cross is None or not share:
            return matrix
        factor = self.damped(damping).double()
        torch.linalg.cholesky(factor, out=factor)
        moved = (matrix @ (self.cross - self.second)).double()
        return (matrix.double() + share * torch.cholesky_solve(moved.T, factor).T).float()

    def spread(self, origins: Tensor) -> Moments:
        """Those of inputs of which each is that of an origin: int64 ``[channels of the result]``."""
        second = self.second[origins][:, origins]
        cross = None if self.cross is None else self.cross[origins][:, origins]
        return Moments(second, cross, self.count)
