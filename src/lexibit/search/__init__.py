"""Search for how much each weight's error should count, and for its bits, on training data or text.

Needs the packages of the extra ``search``.
"""

from lexibit.search.bits import REFINEMENT, refine, sensitivities, under
from lexibit.search.figures import draw
from lexibit.search.heldout import fingerprint, held_out
from lexibit.search.modes import MODES, Found, search
from lexibit.search.problem import Problem, Setting

__all__ = [
    "MODES",
    "REFINEMENT",
    "Found",
    "Problem",
    "Setting",
    "draw",
    "fingerprint",
    "held_out",
    "refine",
    "search",
    "sensitivities",
    "under",
]
