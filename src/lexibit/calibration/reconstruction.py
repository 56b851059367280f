"""The levels of a block, trained without labels to give what the float model's block gives; codes stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lexibit.calibration.route import Place
from lexibit.calibration.runs import Runs, hidden
from lexibit.threads import side_by_side
from lexibit.weight import CodebookWeight

_AT_ONCE = 2  # batches in a step, side by side
_RATE = 8e-3  # of Adam, as a share of the mean size of a weight's levels
_BETAS = (0.9, 0.99)


def reconstruct(
    ours: Runs, theirs: Runs, place: Place, weights: Sequence[CodebookWeight], passes: int
) -> tuple[float, float] | None:
    """Train the levels of a block whose weights are in codes, in place.

    What is minimised is the mean square of what its outputs differ by from the float block's, which has the
    float model's inputs; padding left out. Li et al. 2021 (BRECQ) say that a block is the right unit to
    reconstruct, and train how its weights are rounded. We chose to train levels, by Adam with a rate that
    falls to zero along a cosine, through the stored form: that serves every scheme.

    Args:
        ours: runs of the model, which go on at the block.
        theirs: runs of its float copy, which will go on behind it.
        place: of the block.
        weights: whose levels are trained.
        passes: how often all batches are gone through.

    Returns:
        The error before and after, over the mean square of the float block's outputs. It is never more:
        levels that are worse are not kept. None if the block gives no tensor to compare, or one that is all
        padding, or its levels are not in float32.
    """
    chain, number = place
    if any(weight.levels.dtype != torch.float32 for weight in weights):
        return None
    ours.advance(tuple(max(number, at) if row == chain else at for row, at in enumerate(ours.point)))
    assert ours.point[chain] == number >= theirs.point[chain]
    theirs.advance(tuple(number + 1 if row == chain else at for row, at in enumerate(theirs.point)))
    block, count = ours.block(place), range(ours.count)
    if not isinstance(theirs.hands_on(place, 0), Tensor):
        return None
    targets = [ours.unpadded(block, batch, theirs.hands_on(place, batch)) for batch in count]
    # of a batch that is all padding nothing can be learnt
    seen = [batch for batch in count if targets[batch].numel()]
    if not seen:
        return None
    with ours.reaching(block) as inputs:

        def lost(batch: int) -> Tensor:
            args, kwargs = inputs(batch)
            return (
                (ours.unpadded(block, batch, hidden(block(*args, **kwargs))) - targets[batch]).square().mean()
            )

        def off(batch: int) -> float:
            with torch.no_grad():
                return float(lost(batch))

        size = sum(float(target.square().mean()) for target in targets if target.numel()) or 1.0
        before = sum(side_by_side(off, seen))
        levels = [weight.levels.clone() for weight in weights]
        _train(weights, lost, seen, passes)
        after = sum(side_by_side(off, seen))
        if not after < before:
            after = before
            for weight, one in zip(weights, levels, strict=True):
                weight.levels.copy_(one)
    return before / size, after / size


def _train(
    weights: Sequence[CodebookWeight], lost: Callable[[int], Tensor], batches: Sequence[int], passes: int
) -> None:
    """Adam, some batches a step: their gradients are found side by side, and added in the batches' order."""
    levels = [weight.train_levels() for weight in weights]
    rates = [_RATE * float(one.detach().abs().mean()) for one in levels]
    groups = [{"params": [one], "lr": rate} for one, rate in zip(levels, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=_BETAS, eps=1e-20)
    draw = torch.Generator().manual_seed(0)
    steps = -(-len(batches) // _AT_ONCE)

    def gradients(batch: int) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            error = lost(batch)
            if not error.requires_grad:  # nothing of it runs on this batch
                return tuple(map(torch.zeros_like, levels))
            return torch.autograd.grad(error, levels, materialize_grads=True)

    try:
        for number in range(passes):
            order = [batches[at] for at in torch.randperm(len(batches), generator=draw).tolist()]
            for step in range(steps):
                gone = (number * steps + step) / (passes * steps)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 + math.cos(math.pi * gone)) / 2
                parts = side_by_side(gradients, order[step * _AT_ONCE : (step + 1) * _AT_ONCE])
                for one, of_batches in zip(levels, zip(*parts, strict=True), strict=True):
                    one.grad = torch.stack(of_batches).sum(0)
                optimizer.step()
    finally:
        for weight in weights:
            weight.fix_levels()
