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
        after: that with its levels and codes as they were found for it, in front of the pass over its block.
        why_not: why it was not calibrated, or nothing.
        block: the block of layers whose outputs its levels were trained for at last, or nothing.
        block_before: the error of the block's outputs in front of that, over their size.
        block_after: that afterwards.
    """

    name: str
    inputs: int = 0
    before: float | None = None
    after: float | None = None
    why_not: str = ""
    block: str = ""
    block_before: float | None = None
    block_after: float | None = None
