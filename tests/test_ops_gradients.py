"""Gradients of levels, against plain autograd through a gather, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lexibit import CodebookWeight, ops
from lexibit.groups import matrix_shape
from lexibit.levels import LevelForm
from lexibit.ops import reference
from lexibit.ops.reference import Stored

Make = Callable[..., CodebookWeight]

LAYOUTS = [
    (bits, groups, form)
    for form in LevelForm
    for bits, groups in [
        (1, "matrix"),
        (2, "row"),
        (3, "columns:5"),
        (4, "rows:3"),
        (6, "blocks:2"),
        (8, "row"),
    ]
]
CORRECTIONS = [
    {},
    {"extra": (0, 2)},
    {"extra": (3, 0)},
    {"mask": True},
    {"extra": (0, 5), "mask": True},
    {"extra": (2, 0), "mask": True},
    {"outliers": 5},
    {"extra": (0, 2), "outliers": 3},
]


def stored(weight: CodebookWeight) -> tuple[Any, ...]:
    return tuple(weight.stored())


def gathered(weight: CodebookWeight, levels: Tensor) -> Tensor:
    """The weight as autograd sees it: an entry of a table each, written independently of the operators."""
    spec = weight.spec
    rows, columns = matrix_shape(spec.shape)
    codes = weight.unpacked_codes().reshape(rows + spec.extra[0], columns + spec.extra[1]).long()
    table = spec.form.expand(levels, spec.bits)
    height, length = spec.block
    runs = -(-codes.shape[1] // length)
    group = torch.tensor(
        [[r // height * runs + c // length for c in range(codes.shape[1])] for r in range(codes.shape[0])]
    )
    full = table[group, codes]
    whole = full[:rows, :columns]
    for extra in range(sum(spec.extra)):
        assert weight.origins is not None
        origin = int(weight.origins[extra])
        at = torch.zeros(rows, columns)
        if spec.extra[0]:
            at[origin] = 1
            whole = whole + at * full[rows + extra]
        else:
            at[:, origin] = 1
            whole = whole + at * full[:, columns + extra, None]
    if weight.mask is not None:
        whole = whole * (weight.decode() != 0).reshape(rows, columns)
    if weight.gaps is not None and weight.outliers is not None:
        place = -1
        for gap, added in zip(weight.gaps.tolist(), weight.outliers.tolist(), strict=True):
            place += gap + 1
            whole = whole + added * (torch.arange(rows * columns) == place).view(rows, columns)
    return whole.reshape(spec.shape)


def trained(weight: CodebookWeight) -> tuple[tuple[Any, ...], Tensor]:
    """What the operators take, with levels that want a gradient."""
    parts = list(stored(weight))
    parts[1] = weight.levels.clone().requires_grad_(True)
    return tuple(parts), parts[1]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize(("bits", "groups", "form"), LAYOUTS)
def test_every_operators_levels_have_the_gradient_that_autograd_finds(
    random_weight: Make, bits: int, groups: str, form: str, correction: dict[str, Any]
) -> None:
    weight = random_weight((7, 11), bits, groups, form, **correction)
    generator = torch.Generator().manual_seed(0)
    x, turned = torch.randn(2, 3, 11, generator=generator), torch.randn(4, 7, generator=generator)
    ids = torch.tensor([[0, 6, 2], [2, 2, 5]])
    parts, levels = trained(weight)
    plain = weight.levels.clone().requires_grad_(True)
    w = gathered(weight, plain)
    pairs = [
        (ops.decode(*parts), w),
        (ops.linear(x, None, *parts, False), F.linear(x, w)),
        (ops.linear(turned, torch.ones(11), *parts, True), turned @ w + 1),
        (ops.embedding(ids, *parts), F.embedding(ids, w)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        sent = torch.randn(ours.shape, generator=generator)
        (found,) = torch.autograd.grad(ours, levels, sent)
        (expected,) = torch.autograd.grad(theirs, plain, sent, retain_graph=True)
        assert found.shape == weight.levels.shape
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("form", list(LevelForm))
def test_gradients_of_levels_equal_finite_differences(
    random_weight: Make, form: str, correction: dict[str, Any]
) -> None:
    weight = random_weight((3, 5), 2, "row", form, dtype=torch.float64, **correction)
    parts, levels = trained(weight)

    def all_three(levels: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        given = (parts[0], levels, *parts[2:])
        ids = torch.tensor([2, 0, 2])
        return ops.linear(x, None, *given, False), ops.embedding(ids, *given), ops.decode(*given)

    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(all_three, (levels, x))


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_operators_with_trained_levels_are_well_formed(
    random_weight: Make, correction: dict[str, Any]
) -> None:
    parts, _ = trained(random_weight((7, 11), 3, "row", "binary", **correction))
    x = torch.randn(2, 11, requires_grad=True)
    for operator, inputs in (
        (torch.ops.lexibit.decode, parts),
        (torch.ops.lexibit.linear, (x, torch.randn(7, requires_grad=True), *parts, False)),
        (torch.ops.lexibit.embedding, (torch.tensor([1, 6]), *parts)),
    ):
        results = torch.library.opcheck(operator.default, inputs)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("groups", ["matrix", "row", "columns:4"])
def test_members_are_the_weights_with_each_code(
    random_weight: Make, groups: str, correction: dict[str, Any]
) -> None:
    weight = random_weight((7, 11), 2, groups, "table", **correction)
    plain = weight.levels.clone().requires_grad_(True)
    # each level's gradient under the sum of all weights is how often it is added
    (expected,) = torch.autograd.grad(gathered(weight, plain).sum(), plain)
    found = ops.members(*stored(weight))
    assert torch.equal(found, expected.double())


def test_a_weight_larger_than_a_chunk_sums_like_a_small_one(
    random_weight: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight((40, 33), 3, "row", "affine", extra=(0, 4))
    gradient = torch.randn(40, 33, generator=torch.Generator().manual_seed(1))
    whole = reference.levels_gradient(gradient, None, Stored(*stored(weight)))
    monkeypatch.setattr(reference, "_CHUNK", 256)
    torch.testing.assert_close(reference.levels_gradient(gradient, None, Stored(*stored(weight))), whole)


def test_the_number_of_threads_does_not_change_a_gradient(random_weight: Make) -> None:
    weight = random_weight((300, 200), 4, "matrix", "table")
    gradient = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(reference.levels_gradient(gradient, None, Stored(*stored(weight))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_levels_that_are_not_trained_keep_no_input(random_weight: Make) -> None:
    kept: list[Tensor] = []
    x = torch.randn(4, 11, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.linear(x, None, *stored(random_weight((7, 11))), False)
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept)
