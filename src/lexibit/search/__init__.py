"""Search for how much each weight's error should count, on training data or text.

Needs the packages of the extra ``search``.
"""

from lexibit.search.modes import MODES, Found, search
from lexibit.search.problem import Problem

__all__ = ["MODES", "Found", "Problem", "search"]
