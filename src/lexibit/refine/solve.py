"""The solvers in turn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lexibit.errors import LexibitError
from lexibit.refine.descent import descend
from lexibit.refine.feedback import feedback
from lexibit.refine.moments import Moments
from lexibit.refine.problem import Problem, Solution
from lexibit.refine.refit import refit
from lexibit.refine.remainder import remainder


@dataclass(frozen=True)
class Effort:
    """How long the solvers go on. The defaults are our choice; docs/choosing.md has what they were chosen by.

    Attributes:
        correction: how much of the way to what makes good for changed inputs a weight goes first, 0 to 1.
        damping: what is added to the diagonal of the moments, as a share of its mean.
        feedbacks: how often codes are found anew by error feedback, for the levels that were fitted last.
        rounds: of coordinate descent and refitted levels.
        fits: whether levels are refitted; else they stay as the scheme chose them.
        ordered: whether columns with greater moments come first.
        passes: over all batches, in which the levels of a whole block are trained to give what the float
            model's block gives.
    """

    correction: float = 0.5
    damping: float = 0.01
    feedbacks: int = 2
    rounds: int = 2
    fits: bool = True
    ordered: bool = True
    passes: int = 1

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, low in (("feedbacks", 1), ("rounds", 0), ("passes", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise LexibitError(f"effort: {name} must be a whole number, {low} or more, not {value!r}")
        if not 0 <= self.correction <= 1:
            raise LexibitError(f"effort: correction must be from 0 to 1, not {self.correction!r}")
        if not 0 < self.damping <= 1:
            raise LexibitError(f"effort: damping must be above 0, and at most 1, not {self.damping!r}")


GPTQ = Effort(correction=0.0, feedbacks=1, rounds=0, fits=False, ordered=False, passes=0)
"""What Frantar et al. 2022 do to a uniform grid."""


@dataclass(frozen=True)
class Refined:
    """What came of a weight.

    Attributes:
        solution: levels and codes.
        before: the error of what the scheme chose, over that of a weight of zeros.
        after: the error now, in the same measure.
        added: what is added to the outliers, float32 like the problem's target; None if there are none.
    """

    solution: Solution
    before: float
    after: float
    added: Tensor | None = None


def refine(
    problem: Problem,
    chosen: Solution,
    effort: Effort,
    stored: torch.dtype = torch.float32,
    added: Tensor | None = None,
) -> Refined:
    """Better levels and codes than a scheme's, never worse.

    Args:
        problem: with undamped moments, its target with the outliers in it.
        chosen: by a scheme.
        effort: how long the solvers go on.
        stored: the dtype in which levels are stored: they are rounded to it, and the codes know.
        added: what is added to outliers at first: float32 like the target, zero where there is none.
    """
    problem = _damped(problem, effort.damping)
    order = torch.arange(len(problem.moments))
    if effort.ordered:
        order = problem.diagonal.argsort(descending=True, stable=True)
    whole = problem = problem.ordered(order)
    if added is not None:
        added = added[:, order].contiguous()
        problem, where = whole.without(added), added != 0
    before = Solution(_rounded(chosen.levels, stored), chosen.codes[:, order].contiguous())
    best, least = before, problem.error(before)
    first, levels = least, before.levels
    for _ in range(effort.feedbacks):
        found = feedback(problem, levels)
        found = _refitted(problem, found, effort, stored)
        levels = found.levels
        best, least = _better(problem, found, best, least)
    for turn in range(effort.rounds + 1):
        if added is not None:
            new = remainder(whole, best, where)
            if (error := whole.without(new).error(best)) < least:
                problem, added, least = whole.without(new), new, error
        if turn < effort.rounds:
            best, least = _better(problem, descend(problem, best), best, least)
            best, least = _better(problem, _refitted(problem, best, effort, stored), best, least)
    nothing = float((whole.target @ whole.moments).mul_(whole.target).double().sum()) or 1.0
    back = order.argsort()
    found = Solution(best.levels, best.codes[:, back])
    return Refined(found, first / nothing, least / nothing, None if added is None else added[:, back])


def _refitted(problem: Problem, found: Solution, effort: Effort, stored: torch.dtype) -> Solution:
    if not effort.fits:
        return found
    fitted = refit(problem, found)
    return Solution(_rounded(fitted.levels, stored), fitted.codes)


def _better(problem: Problem, new: Solution, best: Solution, least: float) -> tuple[Solution, float]:
    """The better of two, and its error: rounding may make a step a bad one."""
    error = problem.error(new)
    return (new, error) if error < least else (best, least)


def _rounded(levels: Tensor, stored: torch.dtype) -> Tensor:
    return levels.to(stored).float()


def _damped(problem: Problem, share: float) -> Problem:
    return replace(problem, moments=Moments(problem.moments, None, 0).damped(share))
