"""In which order a model comes to its weights, and what must run for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from lexibit.plan import PlannedWeight, Use
from lexibit.replay import chains

Point = tuple[int, ...]
"""How many blocks of each chain have ended."""

Place = tuple[int, int]
"""The number of a chain, and that of a block in it."""


@dataclass
class Stage:
    """Weights that meet the same inputs, whose moments one run gathers.

    Attributes:
        weights: of the plan.
        uses: the calls to look at: those of one of the weights, as the others have the same inputs.
        point: from where on the model must run.
        last: the module that is called last, and how often in a run; as often in every other.
    """

    weights: list[PlannedWeight]
    uses: list[Use]
    point: Point
    last: tuple[nn.Module, int]


@dataclass(frozen=True)
class Route:
    """The way through a model.

    Attributes:
        chains: lists of blocks that run one after another, each once in a run.
        stages: in the order in which the model comes to them.
        missed: weights that no call was seen of.
    """

    chains: list[list[nn.Module]]
    stages: list[Stage]
    missed: list[PlannedWeight]


@dataclass(frozen=True)
class Block:
    """A block of a chain, with the weights that only it uses.

    Attributes:
        name: of the module that it is.
        place: where it is.
        weights: of the plan.
    """

    name: str
    place: Place
    weights: list[PlannedWeight]


@dataclass(frozen=True)
class _Call:
    """A call of a module that uses a weight: its inputs, kept so that no other tensor is taken for them."""

    use: Use
    inputs: Any
    version: int
    point: Point
    number: int


def find_route(
    model: nn.Module, weights: Sequence[PlannedWeight], runs: Iterable[Callable[[], object]]
) -> Route:
    """Look at runs of a model, until all weights were seen.

    Args:
        model: that runs.
        weights: of its plan.
        runs: each calls it once.
    """
    rows = [[block for _, block in chain] for chain in chains(model)]
    calls: list[_Call] = []
    wanted = {weight.name for weight in weights}
    for run in runs:
        orderly, seen = _watched(model, rows, weights, run)
        while not all(orderly):
            rows = [row for row, good in zip(rows, orderly, strict=True) if good]
            orderly, seen = _watched(model, rows, weights, run)
        new = [call for call in seen if call.use.name not in {one.use.name for one in calls}]
        calls += new
        wanted -= {weight.name for weight in weights for use in weight.uses for c in new if c.use is use}
        if not wanted:
            break
    found: dict[object, Stage] = {}
    first: dict[int, int] = {}
    for weight in weights:
        mine = [call for call in calls if any(call.use is use for use in weight.uses)]
        if not mine:
            continue
        # a recurrent layer's two matrices meet different inputs in one call
        key = tuple((id(call.inputs), call.version, _side(call.use)) for call in mine)
        if key in found:
            found[key].weights.append(weight)
            continue
        uses = list({call.use.name: call.use for call in mine}.values())
        point = tuple(min(points) for points in zip(*(call.point for call in mine), strict=True))
        module = mine[-1].use.module
        times = sum(
            call.use.module is module and call.use.parameter == mine[-1].use.parameter for call in mine
        )
        found[key] = Stage([weight], uses, point, (module, times))
        first[id(found[key])] = mine[0].number
    stages = sorted(found.values(), key=lambda stage: (stage.point, first[id(stage)]))
    return Route(rows, stages, [weight for weight in weights if weight.name in wanted])


def whole_blocks(model: nn.Module, way: Route) -> dict[int, list[Block]]:
    """The blocks that have weights of their own, by the number of the stage that is the last of each."""
    found: dict[int, list[Block]] = {}
    names = {module: name for name, module in model.named_modules()}
    for row, chain in enumerate(way.chains):
        for number, module in enumerate(chain):
            inside = set(module.modules())
            last, weights = -1, list[PlannedWeight]()
            for at, stage in enumerate(way.stages):
                mine = [one for one in stage.weights if all(use.module in inside for use in one.uses)]
                weights += mine
                # weights that are shared with other blocks may come after its own
                last = at if mine or stage.point[row] <= number else last
            if weights:
                found.setdefault(last, []).append(Block(names[module], (row, number), weights))
    return found


def _side(use: Use) -> str:
    return use.parameter if use.kind == "recurrent" else ""


def _watched(
    model: nn.Module, rows: list[list[nn.Module]], weights: Sequence[PlannedWeight], run: Callable[[], object]
) -> tuple[list[bool], list[_Call]]:
    """Whether the blocks of each chain run in order, each once; and the calls of all weights."""
    ended = [0] * len(rows)
    orderly = [True] * len(rows)
    calls: list[_Call] = []

    def begins(row: int) -> Callable[..., None]:
        def hook(block: nn.Module, _: Any) -> None:
            orderly[row] &= ended[row] < len(rows[row]) and rows[row][ended[row]] is block

        return hook

    def ends(row: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            ended[row] += 1

        return hook

    def called(use: Use) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = given(args, kwargs)
            # what is written to in place is another input afterwards
            calls.append(_Call(use, inputs, getattr(inputs, "_version", 0), tuple(ended), len(calls)))

        return hook

    with ExitStack() as undo:
        for row, blocks in enumerate(rows):
            for block in blocks:
                undo.callback(block.register_forward_pre_hook(begins(row)).remove)
                undo.callback(block.register_forward_hook(ends(row)).remove)
        for weight in weights:
            for use in weight.uses:
                if use.kind != "parameter":
                    undo.callback(use.module.register_forward_pre_hook(called(use), with_kwargs=True).remove)
        run()
    return [good and end == len(row) for good, end, row in zip(orderly, ended, rows, strict=True)], calls


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module was called with first."""
    return args[0] if args else next(iter(kwargs.values()), None)
