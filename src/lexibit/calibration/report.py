"""What calibration made of each weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Calibrated:
    """What calibration made of a weight.

    Attributes:
        name: of the weight.
        inputs: how many inputs, or rows looked up, it met.
        before: the error of its outputs with the levels and codes of its scheme alone, over their size. None
            if it was not calibrated.
        after: that with its levels and codes as they are.
        why_not: why it was not calibrated, or nothing.
    """

    name: str
    inputs: int = 0
    before: float | None = None
    after: float | None = None
    why_not: str = ""
