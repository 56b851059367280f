"""Least squares: what is best added to the outliers, for given levels and codes."""

from __future__ import annotations

import torch
from torch import Tensor

from lexibit.outliers import as_stored
from lexibit.refine.problem import Problem, Solution

_TOGETHER = 64  # outliers of a row, up to which rows are solved for together


def remainder(problem: Problem, solution: Solution, where: Tensor) -> Tensor:
    """What is added to some weights so that the error is least, before it is rounded to float16.

    For the outliers S of a row it solves ``H_SS a = (H (w - w^))_S``.

    Args:
        problem: whose target has the outliers in it.
        solution: levels and codes.
        where: bool, like the target: which weights are outliers.

    Returns:
        float32 like the target, as it will be stored; zero elsewhere.
    """
    added = torch.zeros_like(problem.target)

    def work(rows: slice) -> None:
        slope = (problem.target[rows] - problem.decoded(solution, rows)) @ problem.moments
        here = where[rows]
        counts = here.sum(1)
        for row in (counts > _TOGETHER).nonzero()[:, 0].tolist():
            columns = here[row].nonzero()[:, 0]
            bent = problem.moments[columns][:, columns].double()
            found = torch.linalg.solve(bent, slope[row, columns].double())
            added[rows][row, columns] = as_stored(found.float())
        few = ((counts > 0) & (counts <= _TOGETHER)).nonzero()[:, 0]
        if not len(few):
            return
        # rows with fewer outliers than others have ones in their place that change nothing
        width = int(counts[few].max())
        columns = here[few].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        real = torch.arange(width) < counts[few, None]
        bent = problem.moments[columns[:, :, None], columns[:, None, :]].double()
        bent = torch.where(real[:, :, None] & real[:, None, :], bent, torch.eye(width, dtype=torch.float64))
        right = torch.where(real, slope[few].gather(1, columns), 0.0).double()
        found = torch.linalg.solve(bent, right).float()
        added[rows].view(-1).index_add_(
            0, (few[:, None] * here.shape[1] + columns)[real], as_stored(found)[real]
        )

    problem.pieces(work)
    return added
