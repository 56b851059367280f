"""Outliers: the few weights that codes serve worst, to which a number of their own is added, in float16.

The codes go on saying what they say, and an outlier adds what is missing: so that levels need not reach for a
few large weights, and every scheme can have them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

import torch
from torch import Tensor

from lexibit.packing import MAX_GAP
from lexibit.schemes import Choice, Scheme
from lexibit.weight import CodebookWeight, WeightSpec

LEAST, MOST = 1e-4, 0.1
"""What share of a weight may be outliers, if any: fewer could lie too far apart for the stored form."""


def choose(
    scheme: Scheme,
    matrix: Tensor,
    spec: WeightSpec,
    importance: Tensor | None,
    seed: int,
    axis: int,
    counts: Tensor | None = None,
    zero: Tensor | None = None,
) -> Choice:
    """Levels and codes by a scheme, and the outliers of a weight.

    Outliers are where the scheme's errors count most; or the largest weights, which a grid from the least to
    the greatest hits without an error while all others pay for it. Either way the scheme begins anew without
    them. What loses least is taken.

    Args:
        scheme: that chooses.
        matrix: float32 ``[rows, columns]``.
        spec: what will be stored.
        importance: of the weights, for the scheme: like the matrix, or None.
        seed: of any random choice.
        axis: of the input channels: 1 (columns), or 0.
        counts: how much a weight's squared error counts, like the matrix; the importance if not given.
        zero: bool, like the matrix: weights that a mask makes zero, to which nothing is added; or None.
    """
    choice = scheme.choose(matrix, spec.groups, spec.bits, importance, seed, axis)
    if not spec.outliers:
        return choice
    if counts is None:
        counts = torch.ones_like(matrix) if importance is None else importance
    lost = matrix - decoded(spec, choice)
    found = []
    for size in (lost, matrix):
        places = largest(size.square().mul_(counts), spec.outliers)
        rest = beyond(matrix, places, -size.reshape(-1)[places])
        anew = scheme.choose(rest, spec.groups, spec.bits, importance, seed, axis)
        for one in (choice, anew):
            off = matrix - decoded(spec, one)
            if zero is not None:
                off.masked_fill_(zero, 0.0)
            values = as_stored(off.view(-1)[places])
            off = beyond(off, places, -values)
            error = float(off.square_().mul_(counts).double().sum())
            found.append((error, replace(one, outliers=(places, values))))
    return min(found, key=lambda one: one[0])[1]


def decoded(spec: WeightSpec, choice: Choice) -> Tensor:
    """The matrix that levels and codes stand for: float32 ``[rows, columns]``."""
    bare = replace(spec, mask=False, outliers=0)
    weight = CodebookWeight.from_codes(bare, choice.codes, choice.levels, choice.origins).decode()
    return weight.view(-1, spec.shape[-1])


def beyond(matrix: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A matrix with values added in some places: a new one."""
    return matrix.reshape(-1).index_add(0, places, values).view(matrix.shape)


def as_stored(values: Tensor) -> Tensor:
    """Numbers rounded to float16; those beyond it are cut, so that bfloat16 too can say what is stored."""
    most = 65280.0  # the largest that both have
    return values.clamp(-most, most).to(torch.float16).to(values.dtype)


def largest(effect: Tensor, count: int) -> Tensor:
    """The places of the greatest numbers, as many as asked for: int64 ``[count]``, ascending.

    Where two are further apart than the stored form can say, some lie between them instead of the least.
    """
    order = effect.flatten().argsort(descending=True, stable=True)

    def taking(number: int) -> Tensor:
        found = order[:number].sort().values
        return torch.cat([found, _between(found)])

    # one more never needs fewer
    most = bisect_right(range(1, count + 1), count, key=lambda number: len(taking(number)))
    places = taking(most)
    last = int(places.max()) if most else -1
    spare = order[most:]
    spare = spare[(spare < last) & ~torch.isin(spare, places)][: count - len(places)]
    behind = last + 1 + torch.arange(count - len(places) - len(spare))
    return torch.cat([places, spare, behind]).sort().values


def _between(places: Tensor) -> Tensor:
    """Places such that no gap is too wide."""
    step = MAX_GAP + 1
    before = torch.cat([places.new_full((1,), -1), places])[:-1]
    missing = (places - before - 1) // step
    first = before.repeat_interleave(missing)
    number = torch.arange(len(first)) - (missing.cumsum(0) - missing).repeat_interleave(missing)
    return first + step * (number + 1)
