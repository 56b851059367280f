"""The three ways of searching: by hand, for the whole model, and layer after layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from optuna.storages import BaseStorage

from lexibit.errors import unknown
from lexibit.importance import Magnitude
from lexibit.schemes import does_not_weigh
from lexibit.search.problem import Problem, Setting
from lexibit.search.space import NONE, RANGES, STARTS, importance, parameters, spelling
from lexibit.search.trials import Trial, Trials

MODES = ("manual", "model-wise", "layer-wise")
MODEL = "all layers"  # the stage in which they have one importance; no module is called so

Seen = Callable[[str, Trial], None]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        settings: of the layers.
        before: the settings it is compared with: no importance, and the same bits for all layers.
        start: the objective with these.
        value: the objective with what was found; with the bits as configured never more than at the start.
        stages: by stage, the model's or a layer's, its trials.
    """

    settings: dict[str, Setting]
    before: dict[str, Setting]
    start: float
    value: float
    stages: dict[str, list[Trial]] = field(default_factory=dict)


def search(
    problem: Problem,
    mode: str | None,
    trials: int,
    *,
    bits: Mapping[str, int] | None = None,
    before: Mapping[str, int] | None = None,
    study: str,
    where: BaseStorage | None,
    seed: int = 0,
    sampler: str = "gp",
    settings: Mapping[str, Any] | None = None,
    seen: Seen = lambda stage, trial: None,
) -> Found:
    """Search importances by magnitude (Kwon, Lee et al. 2020).

    The paper says: by hand, sixteen sets of (E, C, P); model-wise, one for the model, by Bayesian
    optimisation; layer-wise, one a layer, layer after layer. We chose: all three begin with no importance and
    with the sixteen, each for the whole model, so that they can only gain; layer-wise then goes on from the
    best of these, through the layers as they run, and keeps for each what made the objective smallest,
    beginning with what the layer has.

    Args:
        problem: the model and its objective.
        mode: one of ``MODES``; without, only the bits are looked at.
        trials: model-wise, of the whole search, of which the first are these 17; layer-wise, of each layer
            whose scheme weighs errors, beyond the 17. Has no meaning by hand.
        bits: of each layer's codes, as of :func:`lexibit.search.bits.under`; as configured if not given.
        before: bits of each layer to compare with, as of :func:`lexibit.search.bits.uniform`; as configured
            if not given.
        study: the name of the study in the storage; layer-wise, each layer has one of its own behind it.
        where: the storage; what stands there is gone on from. None without a mode.
        seed: of the sampler.
        sampler: ``gp`` or ``tpe``.
        settings: what else the objective depends on, to be the same as in the study that is there.
        seen: is told of every trial that this process makes, and its stage.

    Raises:
        LexibitError: no such mode or sampler, a study with other settings, a storage that cannot be used, or
            a stage in which every trial failed.
    """
    check_mode(mode, problem)
    names = [layer.name for layer in problem.layers]
    plain = {name: Setting(bits=(bits or {}).get(name)) for name in names}
    compared = {name: Setting(bits=(before or {}).get(name)) for name in names}
    start = problem.value(compared) if compared != plain or mode is None else math.nan
    if mode is None or where is None:
        return Found(plain, compared, start, problem.value(plain))
    weighing = [layer.name for layer in problem.layers if layer.weighs]
    given = dict(settings or {}) | {"bits": dict(bits or {})}

    def stage(name: str, starts: list[Magnitude], more: Mapping[str, Any]) -> Trials:
        return Trials(
            study,
            name,
            where,
            RANGES,
            [parameters(one) for one in starts],
            seed=seed,
            sampler=sampler,
            settings=given | dict(more),
        )

    first_count = trials if mode == "model-wise" else len(STARTS)
    first = stage(MODEL, list(STARTS), {})
    first.run(
        lambda found: problem.value(_all(plain, weighing, importance(found))),
        first_count,
        seen=partial(seen, MODEL),
    )
    best, done = first.best(first_count), {MODEL: first.done(first_count)}
    if compared == plain:
        start = next((one.value for one in done[MODEL] if importance(one.parameters) == NONE), math.nan)
    chosen, value = _all(plain, weighing, importance(best.parameters)), best.value
    for name in weighing if mode == "layer-wise" else []:
        importances = {layer: spelling(one.importance) for layer, one in chosen.items()}
        starts = list(dict.fromkeys([chosen[name].importance, *STARTS]))
        one = stage(name, starts, {"importances": importances})
        one.run(partial(_value, problem, chosen, name), trials, seen=partial(seen, name))
        done[name] = one.done(trials)
        if (found := one.best(trials)).value < value:
            chosen, value = _with(chosen, name, importance(found.parameters)), found.value
    return Found(chosen, compared, start, value, done)


def check_mode(mode: str | None, problem: Problem) -> None:
    """See that importances can be searched so.

    Raises:
        LexibitError: no such mode, or no layer's scheme has a use for importances.
    """
    if mode is not None and mode not in MODES:
        raise unknown("mode", mode, MODES)
    if mode is not None and not any(layer.weighs for layer in problem.layers):
        raise does_not_weigh(problem.layers[0].weights[0].recipe.scheme)


def _all(
    settings: Mapping[str, Setting], weighing: Collection[str], importance: Magnitude
) -> dict[str, Setting]:
    """Settings with one importance for all layers that have a use for one."""
    return {
        name: replace(one, importance=importance) if name in weighing else one
        for name, one in settings.items()
    }


def _with(settings: Mapping[str, Setting], layer: str, importance: Magnitude) -> dict[str, Setting]:
    """Settings with another importance in one layer."""
    return {**settings, layer: replace(settings[layer], importance=importance)}


def _value(
    problem: Problem, settings: Mapping[str, Setting], layer: str, parameters: Mapping[str, float]
) -> float:
    return problem.value(_with(settings, layer, importance(parameters)), changing=layer)
