"""Bits of each layer under a budget, by what each layer does to the objective when it alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lexibit.errors import LexibitError
from lexibit.packing import MAX_BITS, MIN_BITS
from lexibit.progress import progress_bar
from lexibit.search.allocation import Option, allocate
from lexibit.search.layers import Layer
from lexibit.search.problem import Problem, Setting

WIDTHS = tuple(range(1, 7))


def sensitivities(
    problem: Problem, widths: Sequence[int] = WIDTHS, *, progress: bool = True
) -> dict[str, list[Option]]:
    """What every layer does to the objective at every width, when it alone is quantized.

    Args:
        problem: the model and its objective.
        widths: bits of a code; a layer goes without those that its scheme cannot work with, or with which the
            objective is no number.
        progress: whether to draw a progress bar on the terminal.

    Returns:
        By layer, for each width: all bytes that are stored, and the objective less that of the float model.

    Raises:
        LexibitError: a width that is none, or a layer that can work with none of them.
    """
    for bits in widths:
        if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
            raise LexibitError(f"bits must be whole numbers from {MIN_BITS} to {MAX_BITS}, not {bits!r}")
    found: dict[str, list[Option]] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task("one layer at a time", total=len(problem.layers) * len(widths))
        for layer in problem.layers:
            some = found[layer.name] = []
            for bits in widths:
                setting = Setting(bits=bits)
                if _possible(layer, bits):
                    value = problem.value({layer.name: setting}, changing=layer.name, only=True)
                    if math.isfinite(value):  # else it is as impossible
                        damage = value - problem.float_value
                        some.append(Option(bits, problem.nbytes(layer, setting), damage))
                bar.advance(task)
            if not some:
                raise LexibitError(
                    f"{layer.name}: none of {list(widths)} bits works: its scheme takes none of them, or the "
                    "objective is no number with any"
                )
    return found


def under(options: dict[str, list[Option]], budget: float, problem: Problem) -> dict[str, int]:
    """The bits of each layer that keep a budget of stored bits a weight, and do least damage together.

    We take the damages of several layers to add up, which they need not do.

    Args:
        options: of :func:`sensitivities`.
        budget: mean stored bits of the weights that are quantized, every byte counted.
        problem: the model.

    Raises:
        LexibitError: the fewest bits take more.
    """
    weights = sum(layer.size for layer in problem.layers)
    least = 8 * sum(min(one.nbytes for one in some) for some in options.values()) / weights
    if not least <= budget < math.inf:
        raise LexibitError(
            f"a budget of {budget} stored bits a weight cannot be kept: the fewest bits of all layers take "
            f"{least:.3f}; larger groups, or --levels-dtype float16, take less"
        )
    return allocate(options, int(budget * weights / 8))


def _possible(layer: Layer, bits: int) -> bool:
    """Whether the schemes of a layer's weights work with a width."""
    try:
        for weight in layer.weights:
            weight.recipe.fitting().check_bits(bits)
    except LexibitError:
        return False
    return True
