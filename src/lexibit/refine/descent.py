"""Coordinate descent: one code at a time becomes the best there is while all others stay."""

from __future__ import annotations

from lexibit.ops.assign import assign
from lexibit.refine.problem import COLUMNS, Problem, Solution


def descend(problem: Problem, solution: Solution, sweeps: int = 1) -> Solution:
    """Codes that are no worse, for the same levels.

    With the gradient ``g = H (w^ - w)``, the best level for weight j is the one nearest to
    ``w^_j - g_j / H_jj``. Sweeps go over the columns from the first to the last.
    """
    moments, diagonal = problem.moments, problem.diagonal
    ladders = problem.ladders(solution.levels)
    columns = problem.target.shape[1]
    codes = solution.codes.clone()

    def work(rows: slice) -> None:
        values = problem.decoded(solution, rows)
        gradient = (values - problem.target[rows]) @ moments
        for _ in range(sweeps):
            for first in range(0, columns, COLUMNS):
                block = slice(first, min(first + COLUMNS, columns))
                groups = problem.of_row[rows], problem.of_column[block]
                now = values[:, block].contiguous()
                target = now - gradient[:, block] / diagonal[block]
                inside = moments[block, block] / diagonal[block]
                codes[rows, block], change = assign(target, ladders, groups, inside, now)
                values[:, block] = now + change
                gradient.addmm_(change, moments[block])

    problem.pieces(work)
    return Solution(solution.levels, codes)
