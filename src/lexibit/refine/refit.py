"""Least squares: the levels that are best for given codes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lexibit.refine.problem import Problem, Solution

_SMALL = 1e-6  # of the largest curvature: a level that matters less stays where it is


def refit(problem: Problem, solution: Solution) -> Solution:
    """Levels that are no worse, for the same codes.

    Every form of levels is linear in its numbers, so that the error is a quadratic in them. All groups of a
    run of columns are solved for at once, one run after the other; a change of one is known to the next.
    """
    levels = solution.levels.double()
    expand = problem.form.expand(torch.eye(levels.shape[1], dtype=torch.float64), problem.bits).T
    for run in sorted(set(problem.of_column.tolist())):
        inside = (problem.of_column == run).nonzero()[:, 0]
        now = Solution(levels.float(), solution.codes)
        parts = problem.pieces(partial(_normal, problem, now, inside))
        group = problem.of_row.long() + run
        number, place = group.unique(return_inverse=True)
        width = expand.shape[1]
        curvature = torch.zeros(len(number), width, width, dtype=torch.float64)
        slope = torch.zeros(len(number), width, dtype=torch.float64)
        curvature.index_add_(0, place, expand.T @ torch.cat([part[0] for part in parts]) @ expand)
        slope.index_add_(0, place, torch.cat([part[1] for part in parts]) @ expand)
        levels[number] += _step(curvature, slope)
    return Solution(levels.float(), solution.codes)


def _normal(problem: Problem, solution: Solution, inside: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Of every row, the quadratic in the levels of a run.

    Returns:
        its curvature, float64 ``[rows, levels, levels]``, and its slope, ``[rows, levels]``.
    """
    lost = problem.target[rows] - problem.decoded(solution, rows)
    codes = solution.codes[rows][:, inside]
    count = 1 << problem.bits
    taken = torch.zeros(len(codes), count, len(inside))
    taken.scatter_(1, codes[:, None].long(), 1.0)
    moments = problem.moments[:, inside]
    slope = taken @ (lost @ moments)[:, :, None]
    seen = (taken.view(-1, len(inside)) @ moments[inside]).view(taken.shape)
    return (seen @ taken.transpose(1, 2)).double(), slope[:, :, 0].double()


def _step(curvature: Tensor, slope: Tensor) -> Tensor:
    """What is added to the levels; nothing in directions in which nothing is known."""
    scale = curvature.diagonal(dim1=1, dim2=2).amax(1).clamp(min=torch.finfo(torch.float64).tiny)
    least = torch.eye(curvature.shape[1], dtype=torch.float64) * (_SMALL * scale)[:, None, None]
    found: Tensor = torch.linalg.solve(curvature + least, slope)
    return found
