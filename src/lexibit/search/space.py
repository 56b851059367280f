"""What is searched: how much a weight's error counts by its magnitude, (E, C, P)."""

from __future__ import annotations

from collections.abc import Mapping

from lexibit.importance import Magnitude

NONE = Magnitude(E=0.0)
"""Every weight counts alike, whatever C is."""

SETS = (
    Magnitude(1.0, 1.0),
    Magnitude(1.0, 0.99),
    Magnitude(1.0, 0.999),
    Magnitude(1.0, 0.9999),
    Magnitude(0.5, 1.0),
    Magnitude(0.2, 1.0),
    Magnitude(0.5, 0.999),
    Magnitude(0.5, 0.9999),
    *(Magnitude(E, 1.0, P) for E in (0.0, 1.0) for P in (0.02, 0.05, 0.1, 0.2)),
)
"""The sixteen sets that Kwon, Lee et al. 2020 tried by hand (Table 5, in our best reading of it)."""

STARTS = (NONE, *SETS)
"""Where every search begins, so that it can only gain."""

# The ranges are the paper's: E from 0 to 1, P from 0 to 0.2, and C from 0.99 to 1, evenly in the logarithm of
# 1 - C. We chose where that ends: at 1e-6, which stands for C = 1.
RANGES: Mapping[str, tuple[float, float, bool]] = {
    "E": (0.0, 1.0, False),
    "1-C": (1e-6, 1e-2, True),
    "P": (0.0, 0.2, False),
}
"""By parameter: the smallest and largest value, and whether it is drawn evenly in its logarithm."""


def parameters(importance: Magnitude) -> dict[str, float]:
    """An importance as the parameters of a search."""
    low, high, _ = RANGES["1-C"]
    return {"E": importance.E, "1-C": min(max(1 - importance.C, low), high), "P": importance.P}


def importance(parameters: Mapping[str, float]) -> Magnitude:
    """The importance that parameters stand for, in few digits, as it will be written."""
    low, high, _ = RANGES["1-C"]
    gap = parameters["1-C"]
    C = 1.0 if gap <= low else 1 - float(f"{min(gap, high):.3g}")
    return Magnitude(round(parameters["E"], 4), round(C, 9), round(parameters["P"], 4))


def spelling(importance: Magnitude) -> str | None:
    """An importance as a recipe says it; None if all weights count alike."""
    if importance.E == 0 and importance.P == 0:
        return None
    return f"E={importance.E:g},C={importance.C!r},P={importance.P:g}"
