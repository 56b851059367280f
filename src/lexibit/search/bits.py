"""Bits of each layer under a budget, by what each layer does to the objective when it alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.storages import BaseStorage

from lexibit.errors import LexibitError
from lexibit.packing import MAX_BITS, MIN_BITS
from lexibit.progress import progress_bar
from lexibit.search.allocation import Option, allocate
from lexibit.search.layers import Layer
from lexibit.search.problem import Problem, Setting
from lexibit.search.trials import Parameters, Trial, Trials

WIDTHS = tuple(range(1, 7))
REFINEMENT = "bits"
"""The stage in which allocations are tried on the whole model."""

# how much more, or less, a layer's damage may count than it did alone
_FACTORS = (1 / 16, 16.0, True)


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


def under(options: Mapping[str, Sequence[Option]], budget: float, problem: Problem) -> dict[str, int]:
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


def refine(
    options: Mapping[str, Sequence[Option]],
    budget: float,
    problem: Problem,
    trials: int,
    *,
    study: str,
    where: BaseStorage,
    seed: int = 0,
    sampler: str = "gp",
    settings: Mapping[str, Any] | None = None,
    seen: Callable[[str, Trial], None] = lambda stage, trial: None,
) -> tuple[dict[str, int], list[Trial]]:
    """Search allocations within a budget by what the whole model comes to with them.

    Damages of layers need not add up. So we try how much each layer's should count: with a factor of 1/16 to
    16 a layer :func:`under` chooses bits anew, and the objective of the model quantized so is measured. It
    begins with factors of one, so it can only gain, and every trial keeps the budget.

    Args:
        options: of :func:`sensitivities`.
        budget: as for :func:`under`.
        problem: the model and its objective.
        trials: how many, the first included.
        study: the name of the study in the storage, behind which stands the stage's.
        where: the storage; what stands there is gone on from.
        seed: of the sampler.
        sampler: ``gp`` or ``tpe``.
        settings: what else the objective depends on, to be the same as in the study that is there.
        seen: is told of every trial that this process makes, and its stage.

    Returns:
        The bits of each layer, and the trials.

    Raises:
        LexibitError: as of :func:`under` and :class:`~lexibit.search.trials.Trials`.
    """

    def chosen(factors: Parameters) -> dict[str, int]:
        weighed = {
            name: [one._replace(damage=one.damage * factors[name]) for one in some]
            for name, some in options.items()
        }
        return under(weighed, budget, problem)

    measured: dict[tuple[int, ...], float] = {}

    def value(factors: Parameters) -> float:
        bits = chosen(factors)
        key = tuple(bits.values())
        if key not in measured:  # many factors give one allocation
            measured[key] = problem.value({name: Setting(bits=width) for name, width in bits.items()})
        return measured[key]

    some = Trials(
        f"{study}/{REFINEMENT}",
        where,
        dict.fromkeys(options, _FACTORS),
        [dict.fromkeys(options, 1.0)],
        seed=seed,
        sampler=sampler,
        settings=dict(settings or {}) | {"budget": budget},
    )
    some.run(value, trials, seen=lambda trial: seen(REFINEMENT, trial))
    return chosen(some.best(trials).parameters), some.done(trials)


def _possible(layer: Layer, bits: int) -> bool:
    """Whether the schemes of a layer's weights work with a width."""
    try:
        for weight in layer.weights:
            weight.recipe.fitting().check_bits(bits)
    except LexibitError:
        return False
    return True
