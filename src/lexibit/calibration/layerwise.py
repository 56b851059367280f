"""Layer after layer, each for the inputs that the quantized layers in front of it give."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lexibit.calibration.kept import Done, Kept, digest
from lexibit.calibration.report import Calibrated
from lexibit.calibration.route import Route, Stage, find_route
from lexibit.calibration.runs import Batch, Runs, why_not
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.fitting import check_finite, install_everywhere, quantize_calibrated, quantize_planned, restored
from lexibit.groups import matrix_shape
from lexibit.nn.modes import evaluating
from lexibit.plan import Plan, PlannedWeight
from lexibit.progress import progress_bar
from lexibit.refine import Effort, Moments
from lexibit.threads import side_by_side, single
from lexibit.weight import CodebookWeight

_logger = logging.getLogger("lexibit")


@dataclass
class Calibration:
    """What a model's layers are calibrated on, and how.

    Attributes:
        batches: what the model is called with, by name. ``attention_mask`` and ``decoder_attention_mask`` say
            what is padding, which does not count.
        effort: how long levels and codes are made better.
        folder: where finished weights are kept, so that a run that was killed goes on; nowhere if not given.
        weights: what became of each weight; filled in by :func:`lexibit.quantize`.
    """

    batches: Sequence[Batch]
    effort: Effort = field(default_factory=Effort)
    folder: Path | None = None
    weights: list[Calibrated] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what nothing can be learnt from."""
        if not len(self.batches):
            raise LexibitError("nothing to calibrate on: there is no text")


def calibrate(
    model: nn.Module, plan: Plan, config: LexibitConfig, calibration: Calibration, *, progress: bool
) -> Done:
    """The weights of a plan in codes, each chosen for the inputs that it meets in the quantized model.

    The inputs of a weight are gathered when all that comes in front of it is quantized. Beside the model runs
    a copy of it that stays float, so that a weight also makes good for what its inputs have lost
    (:meth:`lexibit.refine.Moments.corrected`). The model is as it was afterwards.

    Embeddings are quantized by their scheme alone; where rows share levels they count by how often they are
    looked up, once more than in the text. A weight that is both embedding and output layer is calibrated for
    the outputs, and the rows looked up count as much as those. A weight that several layers share is
    calibrated for the inputs of all of them. A weight with an importance of its own keeps to that.

    Args:
        model: a float model.
        plan: of it.
        config: that the plan was made from.
        calibration: on what, and how; is told what became of each weight.
        progress: whether to draw a progress bar on the terminal.

    Raises:
        LexibitError: a weight that cannot be quantized, or inputs that are not finite.
    """
    batches = [_without_cache(model, batch) for batch in calibration.batches]
    told = calibration.weights
    told.clear()
    for planned in plan.weights:
        value = _value(planned)
        check_finite(planned.name, value, value.float().reshape(matrix_shape(planned.spec.shape)))
    done: Done = []
    kept = Kept(calibration.folder, "" if calibration.folder is None else _key(model, config, calibration))
    with single(), evaluating(model), restored(plan.weights), progress_bar(progress) as bar:
        task = bar.add_task("calibrating", total=len(plan.weights))
        reasons = {weight.name: _why_not(weight) for weight in plan.weights}
        known = [weight for weight in plan.weights if not reasons[weight.name]]
        way = find_route(model, known, (partial(_call, model, batch) for batch in batches))
        gathering = _Gathering(model, batches, way, calibration.effort)
        for stage in way.stages:
            found = kept.read(stage)
            if found is None:
                gathered = gathering.of(stage)
                fitted = [
                    _fitted(weight, gathered, calibration.effort, config.seed) for weight in stage.weights
                ]
                found = [(weight, codes) for weight, codes, _ in fitted], [one for _, _, one in fitted]
                kept.write(stage, *found)
            for planned, weight in found[0]:
                install_everywhere(planned, weight)
            done += found[0]
            told += found[1]
            bar.advance(task, len(stage.weights))
        for planned in plan.weights:
            if (reason := reasons[planned.name]) or planned in way.missed:
                done.append((planned, quantize_planned(planned, _value(planned), seed=config.seed)))
                told.append(Calibrated(planned.name, why_not=reason or "no text came to it"))
                bar.advance(task)
    for one in told:
        if one.why_not:
            _logger.warning("%s is quantized without calibration: %s", one.name, one.why_not)
    return done


@dataclass(frozen=True)
class _Gathered:
    """Moments of inputs, how often each row was looked up, and how many of both there were."""

    moments: Moments | None
    rows: Tensor | None
    count: int


class _Gathering:
    """Gathers what the weights of a stage meet, from the model and from a float copy of it."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], way: Route, effort: Effort) -> None:
        self._count = len(batches)
        self._ours = Runs(model, batches, way.chains)
        self._theirs: Runs | None = None
        if effort.correction:
            self._copy = copy.deepcopy(model)
            names = {module: name for name, module in model.named_modules()}
            chains = [[self._copy.get_submodule(names[block]) for block in chain] for chain in way.chains]
            self._theirs = Runs(self._copy, batches, chains)
            self._names = names

    def of(self, stage: Stage) -> _Gathered:
        """What they meet in the model as it is."""
        self._ours.advance(stage.point)
        theirs = self._theirs if any(use.kind != "embedding" for use in stage.uses) else None
        if theirs is None:
            with self._ours.watching(stage) as ours:
                return _sum(side_by_side(lambda number: _part(stage, ours(number), None), range(self._count)))
        theirs.advance(stage.point)
        uses = [replace(use, module=self._copy.get_submodule(use.module_name)) for use in stage.uses]
        last = self._copy.get_submodule(self._names[stage.last[0]]), stage.last[1]
        twin = Stage(stage.weights, uses, stage.point, last)
        with self._ours.watching(stage) as ours, theirs.watching(twin) as other:
            return _sum(
                side_by_side(lambda number: _part(stage, ours(number), other(number)), range(self._count))
            )


def _part(stage: Stage, inputs: list[Tensor], others: list[Tensor] | None) -> _Gathered:
    """Of one batch."""
    second: Tensor | None = None
    cross: Tensor | None = None
    rows: Tensor | None = None
    count = 0
    for number, x in enumerate(inputs):
        count += len(x)
        if not x.is_floating_point():
            size = max(weight.spec.shape[0] for weight in stage.weights)
            found = torch.bincount(x.reshape(-1), minlength=size)
            rows = found if rows is None else rows + found
            continue
        second = x.T @ x if second is None else second.addmm_(x.T, x)
        if others is not None:
            y = others[number]
            cross = y.T @ x if cross is None else cross.addmm_(y.T, x)
    return _Gathered(None if second is None else Moments(second, cross, count), rows, count)


def _sum(parts: Iterator[_Gathered]) -> _Gathered:
    """Of all batches, added up in their order."""
    second: Tensor | None = None
    cross: Tensor | None = None
    rows: Tensor | None = None
    count = 0
    for part in parts:
        count += part.count
        if part.rows is not None:
            rows = part.rows if rows is None else rows + part.rows
        if part.moments is None:
            continue
        second = part.moments.second if second is None else second.add_(part.moments.second)
        if part.moments.cross is not None:
            cross = part.moments.cross if cross is None else cross.add_(part.moments.cross)
    return _Gathered(None if second is None else Moments(second, cross, count), rows, count)


def _fitted(
    planned: PlannedWeight, gathered: _Gathered, effort: Effort, seed: int
) -> tuple[PlannedWeight, CodebookWeight, Calibrated]:
    """A weight in codes for what was gathered."""
    value, moments = _value(planned), gathered.moments
    if moments is None or not moments.second.diagonal().any():
        given = None
        if gathered.rows is not None and planned.spec.block[0] > 1 and planned.recipe.fitting().weighs:
            seen = (gathered.rows[: value.shape[0]] + 1).float()
            given = {planned.name: seen.view(-1, *[1] * (value.dim() - 1)).expand(value.shape)}
        why = "" if moments is None else "all of its inputs are zero"
        told = Calibrated(planned.name, gathered.count, why_not=why)
        return planned, quantize_planned(planned, value, seed=seed, given=given), told
    if gathered.rows is not None:
        # looked up, a row's error counts as it is: as if for inputs of equal size and without correlation
        own = float(moments.second.diagonal().double().mean()) * torch.eye(len(moments.second))
        cross = None if moments.cross is None else moments.cross + own
        moments = Moments(moments.second + own, cross, moments.count)
    weight, refined = quantize_calibrated(planned, value, moments, effort, seed=seed)
    return planned, weight, Calibrated(planned.name, gathered.count, refined.before, refined.after)


def _why_not(planned: PlannedWeight) -> str:
    """Why a weight is not calibrated, or nothing."""
    if planned.recipe.importance is not None:
        return "its importance says how its errors count"
    return next(filter(None, map(why_not, planned.uses)), "")


def _value(planned: PlannedWeight) -> Tensor:
    return planned.uses[0].module.get_parameter(planned.uses[0].parameter).detach()


def _call(model: nn.Module, batch: Batch) -> None:
    with torch.inference_mode():
        model(**batch)


def _without_cache(model: nn.Module, batch: Batch) -> Batch:
    """A batch of which a decoder keeps nothing for tokens to come."""
    return (
        {**batch, "use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else batch
    )


def _key(model: nn.Module, config: LexibitConfig, calibration: Calibration) -> str:
    from lexibit import __version__

    tensors = [item for batch in calibration.batches for item in sorted(batch.items())]
    inputs = [part for pair in tensors for part in pair]
    state = [part for pair in model.state_dict().items() for part in pair]
    settings = sorted(config.to_dict().items())
    return digest(__version__, settings, calibration.effort, *inputs, *state)
