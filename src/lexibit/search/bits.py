"""Bits of each layer under a budget, by what each layer does to the objective when it alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.storages import BaseStorage

from lexibit.errors import LexibitError
from lexibit.packing import MAX_BITS, MIN_BITS
from lexibit.search.allocation import Option, allocate
from lexibit.search.layers import Layer
from lexibit.search.problem import Problem, Setting
from lexibit.search.trials import Parameters, Trial, Trials

WIDTHS = tuple(range(1, 7))
ALONE = "each layer alone"
"""The stage in which each layer alone is quantized at each width; no module is called so."""
REFINEMENT = "all bits"
"""The stage in which allocations are tried on the whole model; no module is called so."""

# how much more, or less, a layer's damage may count than it did alone
_FACTORS = (1 / 16, 16.0, True)


def sizes(problem: Problem, widths: Sequence[int] = WIDTHS) -> dict[str, dict[int, int]]:
    """All bytes that are stored of every layer, by the bits of a code.

    Args:
        problem: the model.
        widths: bits of a code; a layer goes without those that its scheme cannot work with.

    Raises:
        LexibitError: a width that is none, or a layer that can work with none of them.
    """
    for bits in widths:
        if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
            raise LexibitError(f"bits must be whole numbers from {MIN_BITS} to {MAX_BITS}, not {bits!r}")
    found = {}
    for layer in problem.layers:
        possible = [bits for bits in widths if _possible(layer, bits)]
        if not possible:
            raise LexibitError(f"{layer.name}: its scheme works with none of {list(widths)} bits")
        found[layer.name] = {bits: problem.nbytes(layer, Setting(bits=bits)) for bits in possible}
    return found


def check_budget(budget: float, problem: Problem, widths: Sequence[int] = WIDTHS) -> None:
    """See that a budget leaves something to choose, before anything is measured.

    Args:
        budget: mean stored bits of the weights that are quantized, every byte counted.
        problem: the model.
        widths: bits of a code.

    Raises:
        LexibitError: the fewest bits take more, or the most do not take as much; or as of :func:`sizes`.
    """
    possible = sizes(problem, widths)
    weights = sum(layer.size for layer in problem.layers)
    least, most = (sum(pick(one.values()) for one in possible.values()) for pick in (min, max))
    if not least <= _allowed(budget, problem):
        codes = sum(layer.size * min(possible[layer.name]) for layer in problem.layers) / weights
        remedy = (
            "larger groups, or --levels-dtype float16, take less"
            if budget >= codes
            else f"codes alone take {codes:g}: give more"
        )
        raise LexibitError(
            f"a budget of {budget:g} stored bits a weight cannot be kept: the fewest bits of all layers take "
            f"{8 * least / weights:.3f}; {remedy}"
        )
    if most <= _allowed(budget, problem):
        raise LexibitError(
            f"a budget of {budget:g} stored bits a weight leaves nothing to choose: the most bits of all "
            f"layers, {max(widths)} at most, take {8 * most / weights:.3f}; give less, or take --bits"
        )


def _allowed(budget: float, problem: Problem) -> float:
    """The bytes that a budget of stored bits a weight allows."""
    nbytes = budget * sum(layer.size for layer in problem.layers) / 8
    return math.floor(nbytes) if math.isfinite(nbytes) else nbytes


def sensitivities(
    problem: Problem,
    widths: Sequence[int] = WIDTHS,
    *,
    study: str,
    where: BaseStorage,
    seed: int = 0,
    sampler: str = "gp",
    settings: Mapping[str, Any] | None = None,
    seen: Callable[[str, Trial], None] = lambda stage, trial: None,
) -> tuple[dict[str, list[Option]], list[Trial]]:
    """What every layer does to the objective at every width, when it alone is quantized.

    Each measurement is a trial of the study's stage ``ALONE``: so a search that was killed does not make them
    anew, and processes share them.

    Args:
        problem: the model and its objective.
        widths: bits of a code; a layer goes without those that its scheme cannot work with, or with which the
            objective is no number.
        study: the name of the study in the storage, behind which stands the stage's.
        where: the storage; what stands there is not measured again.
        seed: as of the other stages; nothing is drawn here.
        sampler: as of the other stages; nothing is proposed here.
        settings: what else the objective depends on, to be the same as in the study that is there.
        seen: is told of every trial that this process makes, and its stage.

    Returns:
        By layer, for each width: all bytes that are stored, and the objective less that of the float model;
        and the trials.

    Raises:
        LexibitError: a layer whose objective is no number with any width; or as of :func:`sizes` and
            :class:`~lexibit.search.trials.Trials`.
    """
    possible = sizes(problem, widths)
    names = list(possible)
    places = [(name, bits) for name, some in possible.items() for bits in some]
    alone = Trials(
        study,
        ALONE,
        where,
        {"layer": (0, len(names) - 1, False), "bits": (min(widths), max(widths), False)},
        [{"layer": names.index(name), "bits": bits} for name, bits in places],
        seed=seed,
        sampler=sampler,
        settings=dict(settings or {}) | {"widths": list(widths)},
    )

    def value(parameters: Parameters) -> float:
        name = names[round(parameters["layer"])]
        return problem.value({name: Setting(bits=round(parameters["bits"]))}, changing=name, only=True)

    alone.run(value, len(places), seen=lambda trial: seen(ALONE, trial))
    done = alone.done(len(places))
    found: dict[str, list[Option]] = {name: [] for name in names}
    for (name, bits), trial in zip(places, done, strict=True):
        if trial.fault is None:  # else the width is as impossible
            option = Option(bits, possible[name][bits], trial.value - problem.float_value)
            found[name].append(option)
    for name, some in found.items():
        if not some:
            fault = next(trial.fault for place, trial in zip(places, done, strict=True) if place[0] == name)
            raise LexibitError(f"{name}: no width could be measured: {fault}")
    return found, done


def under(options: Mapping[str, Sequence[Option]], budget: float, problem: Problem) -> dict[str, int]:
    """The bits of each layer that keep a budget of stored bits a weight, and do least damage together.

    We take the damages of several layers to add up, which they need not do.

    Args:
        options: of :func:`sensitivities`.
        budget: mean stored bits of the weights that are quantized, every byte counted.
        problem: the model.

    Raises:
        LexibitError: the fewest bits take more, or the budget is no finite number.
    """
    if not math.isfinite(budget):
        raise LexibitError(f"a budget is a number of stored bits a weight, not {budget}")
    return allocate(options, int(_allowed(budget, problem)))


def uniform(options: Mapping[str, Sequence[Option]], budget: float, problem: Problem) -> dict[str, int]:
    """The most bits, the same for all layers, that keep a budget: what a choice by layer has to better.

    A layer that cannot work with so many gets the most below that, or its fewest.

    Args:
        options: of :func:`sensitivities`.
        budget: as for :func:`under`, which must be able to keep it.
        problem: the model.
    """
    found: dict[str, int] = {}
    for width in sorted({one.bits for some in options.values() for one in some}):
        bits = {
            name: max((one.bits for one in some if one.bits <= width), default=some[0].bits)
            for name, some in options.items()
        }
        settings = {name: Setting(bits=one) for name, one in bits.items()}
        if not found or problem.bits_per_weight(settings) <= budget:
            found = bits
    return found


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
        study,
        REFINEMENT,
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
