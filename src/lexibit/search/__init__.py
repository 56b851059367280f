"""Search for how much each weight's error should count, and for its bits, on training data or text.

Needs the packages of the extra ``search``.
"""

from lexibit.search.bits import ALONE, REFINEMENT, check_budget, refine, sensitivities, under, uniform
from lexibit.search.figures import draw
from lexibit.search.heldout import fingerprint, held_out
from lexibit.search.modes import MODES, Found, check_mode, search
from lexibit.search.problem import Problem, Setting

__all__ = [
    "ALONE",
    "MODES",
    "REFINEMENT",
    "Found",
    "Problem",
    "Setting",
    "check_budget",
    "check_mode",
    "draw",
    "fingerprint",
    "held_out",
    "refine",
    "search",
    "sensitivities",
    "under",
    "uniform",
]
