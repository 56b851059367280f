"""Least squares: the levels that are best for given codes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lexibit.levels import LevelForm
from lexibit.refine.problem import Problem, Solution

_MOST_BITS = 5  # of a table that is fitted
_SMALL = 1e-6  # of the largest curvature: a level that matters less stays where it is


def refit(problem: Problem, solution: Solution) -> Solution:
    """Levels that are no worse, for the same codes.

    Every form of levels is linear in its numbers, so that the error is a quadratic in them. All groups of a
    run of columns are solved for at once, one run after the other; a change of one is known to the next.
    Tables of more than 32 levels stay as they are: they lie so close that there is nothing to gain.
    """
    if problem.form is LevelForm.TABLE and problem.bits > _MOST_BITS:
        return solution
    levels = solution.levels.double()
    expand = problem.form.expand(torch.eye(levels.shape[1], dtype=torch.float64), problem.bits).T
    for run in sorted(set(problem.of_column.tolist())):
        inside = (problem.of_column == run).nonzero()[:, 0]
        now = Solution(levels.float(), solution.codes)
        number, place = torch.unique(problem.of_row.long() + run, return_inverse=True)
        width = expand.shape[1]
        curvature = torch.zeros(len(number), width, width, dtype=torch.float64)
        slope = torch.zeros(len(number), width, dtype=torch.float64)
        for some, bent, inclined in problem.pieces(partial(_normal, problem, now, inside, place, expand)):
            curvature[some] += bent
            slope[some] += inclined
        levels[number] += _step(curvature, slope)
    return Solution(levels.float(), solution.codes)


def _normal(
    problem: Problem, solution: Solution, inside: Tensor, place: Tensor, expand: Tensor, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """The quadratic in the levels of a run, of the groups that some rows are in.

    Returns:
        which groups, by their places; its curvature, float64 ``[groups, width, width]``, and its slope,
        ``[groups, width]``, summed over the rows of each.
    """
    lost = problem.target[rows] - problem.decoded(solution, rows)
    codes = solution.codes[rows][:, inside]
    taken = torch.zeros(len(codes), 1 << problem.bits, len(inside))
    taken.scatter_(1, codes[:, None].long(), 1.0)
    moments = problem.moments[:, inside]
    slope = (taken @ (lost @ moments)[:, :, None])[:, :, 0].double() @ expand
    seen = (taken.view(-1, len(inside)) @ moments[inside]).view(taken.shape)
    curvature = expand.T @ (seen @ taken.transpose(1, 2)).double() @ expand
    some, mine = torch.unique(place[rows], return_inverse=True)
    curvatures = torch.zeros(len(some), *curvature.shape[1:], dtype=torch.float64)
    slopes = torch.zeros(len(some), *slope.shape[1:], dtype=torch.float64)
    return some, curvatures.index_add_(0, mine, curvature), slopes.index_add_(0, mine, slope)


def _step(curvature: Tensor, slope: Tensor) -> Tensor:
    """What is added to the levels; nothing in directions in which nothing is known."""
    scale = curvature.diagonal(dim1=1, dim2=2).amax(1).clamp(min=torch.finfo(torch.float64).tiny)
    least = torch.eye(curvature.shape[1], dtype=torch.float64) * (_SMALL * scale)[:, None, None]
    found: Tensor = torch.linalg.solve(curvature + least, slope)
    return found
