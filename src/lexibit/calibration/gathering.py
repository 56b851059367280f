"""What the weights of a model meet in it, gathered from batches; and in files."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lexibit.calibration.reconstruction import reconstruct
from lexibit.calibration.route import Place, Route, Stage, find_route
from lexibit.calibration.runs import Batch, Runs, why_not
from lexibit.errors import LexibitError
from lexibit.files import replacing
from lexibit.nn.modes import evaluating
from lexibit.plan import Plan, PlannedWeight
from lexibit.progress import progress_bar
from lexibit.refine import Moments
from lexibit.threads import side_by_side, single
from lexibit.weight import CodebookWeight


@dataclass(frozen=True)
class Gathered:
    """What the weights of a stage meet.

    Attributes:
        moments: of the inputs, if it is multiplied with any.
        rows: int64, how often each row was looked up, if it is an embedding.
        count: how many inputs and rows there were.
    """

    moments: Moments | None
    rows: Tensor | None
    count: int


class Gathering:
    """Gathers what the weights of a stage meet, from the model and, ``beside`` it, from a float copy."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], way: Route, beside: bool) -> None:
        self._count = len(batches)
        self._ours = Runs(model, batches, way.chains)
        self._theirs: Runs | None = None
        if beside:
            # other modules, but the very same float weights, which the model's own modules will leave
            shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
            self._copy = copy.deepcopy(model, shared)
            names = {module: name for name, module in model.named_modules()}
            chains = [[self._copy.get_submodule(names[block]) for block in chain] for chain in way.chains]
            self._theirs = Runs(self._copy, batches, chains)
            self._names = names

    def of(self, stage: Stage) -> Gathered:
        """What they meet in the model as it is."""
        self._ours.advance(stage.point)
        theirs = self._theirs if any(use.kind != "embedding" for use in stage.uses) else None
        if theirs is None:
            with self._ours.watching(stage) as ours:
                work = side_by_side(lambda number: _part(stage, ours(number), None), range(self._count))
                with closing(work) as parts:
                    return _sum(parts)
        theirs.advance(stage.point)
        uses = [replace(use, module=self._copy.get_submodule(use.module_name)) for use in stage.uses]
        last = self._copy.get_submodule(self._names[stage.last[0]]), stage.last[1]
        twin = Stage(stage.weights, uses, stage.point, last)
        with self._ours.watching(stage) as ours, theirs.watching(twin) as other:
            work = side_by_side(lambda number: _part(stage, ours(number), other(number)), range(self._count))
            with closing(work) as parts:
                return _sum(parts)

    def reconstruct(
        self, place: Place, weights: Sequence[CodebookWeight], passes: int
    ) -> tuple[float, float] | None:
        """Train the levels of a block whose weights are in codes, as the module of that name says."""
        assert self._theirs is not None
        return reconstruct(self._ours, self._theirs, place, weights, passes)


def _part(stage: Stage, inputs: list[Tensor], others: list[Tensor] | None) -> Gathered:
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
        # experts that are chosen for other inputs in the float model have no counterpart there
        if others is not None and (number >= len(others) or len(others[number]) != len(x)):
            others, cross = None, None
        if others is not None:
            y = others[number]
            cross = y.T @ x if cross is None else cross.addmm_(y.T, x)
    if second is None:
        return Gathered(None, None if rows is None else rows.cpu(), count)
    moments = Moments(second.cpu(), None if cross is None else cross.cpu(), count)
    return Gathered(moments, None if rows is None else rows.cpu(), count)


def _sum(parts: Iterator[Gathered]) -> Gathered:
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
        first = second is None
        second = part.moments.second if second is None else second.add_(part.moments.second)
        if first:
            cross = part.moments.cross
        elif cross is not None:
            cross = None if part.moments.cross is None else cross.add_(part.moments.cross)
    return Gathered(None if second is None else Moments(second, cross, count), rows, count)


def route_of(model: nn.Module, weights: Sequence[PlannedWeight], batches: Sequence[Batch]) -> Route:
    """The way of these batches through a model, as far as it is needed to come to all weights.

    Raises:
        LexibitError: it comes to none.
    """
    way = find_route(model, weights, (partial(_call, model, batch) for batch in batches))
    if weights and not way.stages:
        raise LexibitError(
            f"{type(model).__name__} comes to none of the plan's weights, like {weights[0].name}: give the "
            "plan of this very model, and batches that it is called with"
        )
    return way


def _call(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        model(**batch)


def without_cache(model: nn.Module, batch: Batch) -> Batch:
    """A batch of which a decoder keeps nothing for tokens to come."""
    return (
        {**batch, "use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else batch
    )


def gather(
    model: nn.Module, plan: Plan, batches: Sequence[Batch], *, progress: bool = True
) -> dict[str, Gathered]:
    """What the weights of a plan meet in the float model: for any number of quantizations of it.

    All of it is in memory at once: four bytes for each pair of a layer's input channels.

    Args:
        model: a float model.
        plan: which weights.
        batches: what it is called with; see :class:`lexibit.Calibration`.
        progress: whether to draw a progress bar on the terminal.

    Returns:
        By the weights' names; of those that have the same inputs it is the same.
    """
    batches = [without_cache(model, batch) for batch in batches]
    known = [weight for weight in plan.weights if not any(why_not(use) for use in weight.uses)]
    found: dict[str, Gathered] = {}
    with single(), evaluating(model), progress_bar(progress) as bar:
        way = route_of(model, known, batches)
        gathering = Gathering(model, batches, way, beside=False)
        for stage in bar.track(way.stages, description="gathering"):
            gathered = gathering.of(stage)
            found |= {weight.name: gathered for weight in stage.weights}
    return found


def save_moments(gathered: Mapping[str, Gathered], path: Path) -> None:
    """Save what :func:`gather` found, to a safetensors file.

    Raises:
        LexibitError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[int, str] = {}
    told: dict[str, Any] = {}
    for name, one in gathered.items():
        key = keys.setdefault(id(one), name)
        parts = [part for part, there in (("second", one.moments), ("rows", one.rows)) if there is not None]
        told[name] = {"key": key, "count": one.count, "parts": parts}
        if one.moments is not None:
            tensors[f"{key}.second"] = one.moments.second
        if one.rows is not None:
            tensors[f"{key}.rows"] = one.rows
    with replacing(path) as staged:
        save_file(tensors, staged, {"lexibit.moments": json.dumps(told, sort_keys=True)})


def load_moments(path: Path) -> dict[str, Gathered]:
    """What was saved by :func:`save_moments`.

    Raises:
        LexibitError: it is no such file, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["lexibit.moments"])
            one: dict[str, Gathered] = {}
            for entry in told.values():
                key, count = str(entry["key"]), int(entry["count"])
                if key not in one:
                    parts = {part: file.get_tensor(f"{key}.{part}") for part in entry["parts"]}
                    second, rows = parts.get("second"), parts.get("rows")
                    moments = None if second is None else Moments(second, None, count)
                    one[key] = Gathered(moments, rows, count)
            return {name: one[str(entry["key"])] for name, entry in told.items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise LexibitError(f"{path}: no file of moments that lexibit moments wrote ({error!r})") from error
