"""Error feedback: the error of a column's codes is handed on to the columns that have none yet."""

from __future__ import annotations

import torch
from torch import Tensor

from lexibit.ops.assign import assign
from lexibit.refine.problem import COLUMNS, Problem, Solution


def feedback(problem: Problem, levels: Tensor) -> Solution:
    """Codes for given levels, column by column.

    Frantar et al. 2022 (GPTQ) say: with ``H^-1 = U^T U``, U upper triangular, the columns take their nearest
    levels from the first to the last, and the error of column i, over ``U_ii``, times ``U_ij`` is taken from
    every later column j, which is what these should be to make good for it best. Their levels are a uniform
    grid. Any levels will do.

    We chose: U is found from a Cholesky factor of H with its columns in reverse, not by way of H^-1.
    """
    pull = _pull(problem.moments)
    ladders = problem.ladders(levels)
    columns = problem.target.shape[1]
    codes = torch.empty(problem.target.shape, dtype=torch.uint8)

    def work(rows: slice) -> None:
        target = problem.target[rows].clone()
        for first in range(0, columns, COLUMNS):
            block = slice(first, min(first + COLUMNS, columns))
            groups = problem.of_row[rows], problem.of_column[block]
            inside = pull[block, block].contiguous()
            codes[rows, block], lost = assign(target[:, block].contiguous(), ladders, groups, inside, None)
            target[:, block.stop :].addmm_(lost, pull[block, block.stop :], alpha=-1)

    problem.pieces(work)
    return Solution(levels, codes)


def _pull(moments: Tensor) -> Tensor:
    """``U_ij / U_ii``."""
    factor = moments.flip(0, 1).double()
    torch.linalg.cholesky(factor, out=factor)
    factor = factor.flip(0, 1)
    upper: Tensor = torch.linalg.solve_triangular(
        factor, torch.eye(len(factor), dtype=factor.dtype), upper=True
    )
    return upper.div_(upper.diagonal()[:, None].clone()).float()
