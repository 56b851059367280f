"""Layer after layer, each for the inputs that the quantized layers in front of it give."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lexibit.calibration.gathering import Gathered, Gathering, route_of, without_cache
from lexibit.calibration.kept import Kept, Weights, digest
from lexibit.calibration.report import Calibrated
from lexibit.calibration.route import Block, whole_blocks
from lexibit.calibration.runs import Batch, why_not
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

LOOKED_UP = "its rows are looked up, so that no input is multiplied with it"
"""Why an embedding is left to its scheme."""


@dataclass
class Calibration:
    """What a model's layers are calibrated on, and how.

    Attributes:
        batches: what the model is called with, by name. ``attention_mask`` and ``decoder_attention_mask`` say
            what is padding, which does not count.
        effort: how long levels and codes are made better.
        folder: where finished weights are kept, so that a run that was killed goes on; nowhere if not given.
        gathered: instead of batches, what was gathered from the float model before, by
            :func:`lexibit.calibration.gather`: the model need not run, and each layer is quantized as if all
            others stayed float, which keeps less.
        weights: what became of each weight; filled in by :func:`lexibit.quantize`.
    """

    batches: Sequence[Batch] = ()
    effort: Effort = field(default_factory=Effort)
    folder: Path | None = None
    gathered: Mapping[str, Gathered] | None = None
    weights: list[Calibrated] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what nothing can be learnt from."""
        if self.gathered is None and not len(self.batches):
            raise LexibitError("nothing to calibrate on: there is no text")
        if self.gathered is not None and (len(self.batches) or self.folder is not None):
            raise LexibitError(
                "moments that were gathered before take the place of batches, and need no folder"
            )


def calibrate(
    model: nn.Module, plan: Plan, config: LexibitConfig, calibration: Calibration, *, progress: bool
) -> Weights:
    """The weights of a plan in codes, each chosen for the inputs that it meets in the quantized model.

    The inputs of a weight are gathered when all that comes in front of it is quantized. Beside the model runs
    a copy of it that stays float, so that a weight also makes good for what its inputs have lost
    (:meth:`lexibit.refine.Moments.corrected`). The model is as it was afterwards.

    Embeddings are quantized by their scheme alone; where rows share levels they count by how often they are
    looked up, once more than in the text. A weight that is both embedding and output layer is calibrated for
    the outputs, and the rows looked up count as much as those. A weight that several layers share is
    calibrated for the inputs of all of them. When all weights of a block are done, its levels are trained
    (:mod:`lexibit.calibration.reconstruction`); not those of weights that are shared with other blocks. A
    weight with an importance of its own keeps to that.

    Args:
        model: a float model.
        plan: of it.
        config: that the plan was made from.
        calibration: on what, and how; is told what became of each weight.
        progress: whether to draw a progress bar on the terminal.

    Raises:
        LexibitError: a weight that cannot be quantized, or inputs that are not finite.
    """
    told = calibration.weights
    told.clear()
    for planned in plan.weights:
        value = _value(planned)
        check_finite(planned.name, value, value.float().reshape(matrix_shape(planned.spec.shape)))
    if calibration.gathered is not None:
        return _each_alone(plan, calibration.gathered, calibration, config.seed, progress)
    batches = [without_cache(model, batch) for batch in calibration.batches]
    done: Weights = []
    kept = Kept(calibration.folder, "" if calibration.folder is None else _key(model, config, calibration))
    with single(), evaluating(model), restored(plan.weights), progress_bar(progress) as bar:
        task = bar.add_task("calibrating", total=len(plan.weights))
        reasons = {weight.name: _why_not(weight) for weight in plan.weights}
        known = [weight for weight in plan.weights if not reasons[weight.name]]
        way = route_of(model, known, batches)
        effort = calibration.effort
        gathering = Gathering(model, batches, way, beside=bool(effort.correction or effort.passes))
        blocks = whole_blocks(model, way) if effort.passes else {}
        for number, stage in enumerate(way.stages):
            found = kept.read(stage.weights[0].name, stage.weights)
            if found is None:
                gathered = gathering.of(stage)
                fitted = [_fitted(weight, gathered, effort, config.seed) for weight in stage.weights]
                found = [(weight, codes) for weight, codes, _ in fitted], [one for _, _, one in fitted]
                kept.write(stage.weights[0].name, *found)
            for planned, weight in found[0]:
                install_everywhere(planned, weight.to(_value(planned).device))
            done += found[0]
            told += found[1]
            bar.advance(task, len(stage.weights))
            for block in blocks.get(number, ()):
                _reconstruct(block, done, told, gathering, effort, kept)
        for planned in plan.weights:
            if (reason := reasons[planned.name]) or planned in way.missed:
                done.append((planned, quantize_planned(planned, _value(planned), seed=config.seed)))
                told.append(Calibrated(planned.name, why_not=reason or "no text came to it"))
                bar.advance(task)
    _warn(told)
    return done


def _reconstruct(
    block: Block, done: Weights, told: list[Calibrated], gathering: Gathering, effort: Effort, kept: Kept
) -> None:
    """Train the levels of a block, or take those that were kept of it."""
    unit = f"block {block.name}"
    number = {planned.name: at for at, (planned, _) in enumerate(done)}
    mine = [done[number[planned.name]] for planned in block.weights]
    found = kept.read(unit, block.weights)
    if found is not None and not all(
        torch.equal(weight.codes.cpu(), trained.codes)
        for (_, weight), (_, trained) in zip(mine, found[0], strict=True)
    ):
        _logger.warning("what is kept of %s is of other codes: done anew", unit)
        found = None
    if found is None:
        lost = gathering.reconstruct(block.place, [weight for _, weight in mine], effort.passes)
        if lost is None:
            _logger.warning(
                "the levels of %s are not trained: they, or what it gives, are no float32 tensors",
                block.name,
            )
            return
        found = (
            mine,
            [
                replace(told[number[one.name]], block=block.name, block_before=lost[0], block_after=lost[1])
                for one in block.weights
            ],
        )
        kept.write(unit, *found)
    for (planned, weight), (_, trained), one in zip(mine, *found, strict=True):
        weight.levels.copy_(trained.levels)
        told[number[planned.name]] = one


def _each_alone(
    plan: Plan, gathered: Mapping[str, Gathered], calibration: Calibration, seed: int, progress: bool
) -> Weights:
    """The weights of a plan in codes, for inputs that were gathered before."""
    if gathered and not any(weight.name in gathered for weight in plan.weights):
        raise LexibitError(
            f"the moments are of another model: they name {min(gathered)}, and this one has "
            f"{plan.weights[0].name}"
        )

    def one(planned: PlannedWeight) -> tuple[PlannedWeight, CodebookWeight, Calibrated]:
        reason = _why_not(planned)
        if reason or planned.name not in gathered:
            told = Calibrated(planned.name, why_not=reason or "the moments have none of its inputs")
            return planned, quantize_planned(planned, _value(planned), seed=seed), told
        return _fitted(planned, gathered[planned.name], calibration.effort, seed)

    done: Weights = []
    with progress_bar(progress) as bar, closing(side_by_side(one, plan.weights)) as work:
        for planned, weight, told in bar.track(work, total=len(plan.weights), description="calibrating"):
            done.append((planned, weight))
            calibration.weights.append(told)
    _warn(calibration.weights)
    return done


def _warn(told: Sequence[Calibrated]) -> None:
    for one in told:
        if one.why_not not in ("", LOOKED_UP):
            _logger.warning("%s is quantized without calibration: %s", one.name, one.why_not)


def _fitted(
    planned: PlannedWeight, gathered: Gathered, effort: Effort, seed: int
) -> tuple[PlannedWeight, CodebookWeight, Calibrated]:
    """A weight in codes for what was gathered."""
    value, moments = _value(planned), gathered.moments
    if gathered.rows is not None and len(gathered.rows) < value.shape[0]:
        raise LexibitError(
            f"{planned.name}: the moments tell of {len(gathered.rows)} rows, it has {value.shape[0]}: gather "
            "them from this very model"
        )
    if moments is None or not moments.second.diagonal().any():
        given = None
        if gathered.rows is not None and planned.spec.block[0] > 1 and planned.recipe.fitting().weighs:
            seen = (gathered.rows[: value.shape[0]] + 1).float()
            given = {planned.name: seen.view(-1, *[1] * (value.dim() - 1)).expand(value.shape)}
        why = LOOKED_UP if moments is None else "all of its inputs are zero"
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


def _key(model: nn.Module, config: LexibitConfig, calibration: Calibration) -> str:
    from lexibit import __version__

    tensors = [item for batch in calibration.batches for item in sorted(batch.items())]
    inputs = [part for pair in tensors for part in pair]
    state = [part for pair in model.state_dict().items() for part in pair]
    settings = sorted(config.to_dict().items())
    return digest(__version__, settings, calibration.effort, *inputs, *state)
