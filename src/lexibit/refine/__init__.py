"""Levels and codes that are right for a layer's inputs, whichever scheme found the first ones.

What is minimised is the error of what a layer gives, over inputs ``x`` with second moments ``H``, the sum of
``x x^T``:

    sum over rows of (w - w^)^T H (w - w^)

With H = 1, and with a diagonal H, its importances, a scheme does that by itself. With a full H a weight's
error can be made good by other weights of its row, and codes can no longer be chosen one by one: a few
solvers, each a file, take turns. They work on any form of levels and on any groups, and none asks for the
scheme.

===================================  ====================================================  ==================
solver                               what it does                                          can make it worse
===================================  ====================================================  ==================
:mod:`lexibit.refine.feedback`       codes, column by column, errors handed on to the      yes: it starts
                                     rest                                                  anew
:mod:`lexibit.refine.descent`        codes, one at a time, the best there is for each      no
:mod:`lexibit.refine.refit`          levels, by least squares                              no
:mod:`lexibit.refine.remainder`      what is added to outliers, by least squares           no
===================================  ====================================================  ==================
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lexibit import outliers
from lexibit.refine.moments import Moments
from lexibit.refine.problem import Problem, Solution
from lexibit.refine.solve import GPTQ, Effort, Refined, refine
from lexibit.schemes import Choice, Scheme
from lexibit.weight import WeightSpec

__all__ = ["GPTQ", "Effort", "Moments", "Problem", "Refined", "Solution", "choose", "refine"]


def choose(
    scheme: Scheme, matrix: Tensor, spec: WeightSpec, seed: int, axis: int, moments: Moments, effort: Effort
) -> tuple[Choice, Refined]:
    """Levels and codes by a scheme, then by the solvers, for a weight whose inputs are known.

    A scheme that weighs errors begins with the mean squares of the inputs for importances.

    Args:
        scheme: that begins.
        matrix: float32 ``[rows, columns]``.
        spec: what will be stored.
        seed: of any random choice.
        axis: of the input channels: 1 (columns), or 0.
        moments: of the inputs; not all zero.
        effort: how long the solvers go on.
    """
    matrix = moments.corrected(matrix if axis else matrix.T, effort.correction, effort.damping)
    matrix = (matrix if axis else matrix.T).contiguous()
    importance = None
    if scheme.weighs:
        weight = moments.second.diagonal() / moments.second.diagonal().max()
        importance = (weight if axis else weight[:, None]).expand_as(matrix).contiguous()
    counts = None
    if spec.outliers:
        # what an error costs that the other weights of its row make good for as well as they can
        counts = 1 / moments.freedom(effort.damping)
        counts = (counts if axis else counts[:, None]).expand_as(matrix)
    choice = outliers.choose(scheme, matrix, spec, importance, seed, axis, counts)
    shape, added = matrix.shape, None
    if choice.outliers is not None:
        added = outliers.beyond(torch.zeros(shape), *choice.outliers)
    if choice.origins is not None:
        # the channels that were split lie behind those of the weight; only the sum of their parts counts
        origins = torch.cat([torch.arange(matrix.shape[axis]), choice.origins.long()])
        share = 1 / origins.bincount()[origins]
        matrix = matrix.index_select(axis, origins) * (share if axis else share[:, None])
        moments = moments.spread(origins)
    problem = Problem.of(matrix, moments.second, spec.groups, spec.form, spec.bits, axis)
    codes = choice.codes if axis else choice.codes.T.contiguous()
    stored = getattr(torch, spec.levels_dtype)
    if added is not None:
        # those of a channel that was split are added to its first part
        added = F.pad(added if axis else added.T, (0, problem.target.shape[1] - shape[axis]))
    found = refine(problem, Solution(choice.levels, codes), effort, stored, added)
    codes = found.solution.codes if axis else found.solution.codes.T.contiguous()
    refined = Choice(found.solution.levels, codes, choice.origins)
    if choice.outliers is not None and found.added is not None:
        own, places = found.added[:, : shape[axis]], choice.outliers[0]
        refined = replace(refined, outliers=(places, (own if axis else own.T).reshape(-1)[places]))
    return refined, found
