"""Products in int8 and bfloat16: the reference against its definition, the kernels against exact sums."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lexibit import CodebookWeight, LexibitError, ops
from lexibit.groups import Groups
from lexibit.levels import LevelForm
from lexibit.ops import native, reference
from lexibit.ops.reference import ACTIVATIONS, Stored
from lexibit.packing import pack, pack_places

Make = Callable[..., CodebookWeight]
ROUNDED = ("int8", "bfloat16")
KERNELS = [(name, one) for name in native.available() for one in ROUNDED if native.supports(one, name)]
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no kernels for int8 or bfloat16 on this CPU")


@pytest.fixture(params=KERNELS or [("reference", one) for one in ROUNDED], ids="-".join)
def compute(request: pytest.FixtureRequest) -> Iterator[str]:
    """What is computed with, by the kernels that do so."""
    name, found = request.param
    with ops.kernels(name):
        yield found


@pytest.fixture
def rounding(random_weight: Make, compute: str) -> Make:
    """A function that makes a random weight that computes so."""

    def make(*given: Any, **more: Any) -> CodebookWeight:
        weight = random_weight(*given, **more)
        weight.compute = compute
        return weight

    return make


def exact(x: Tensor, weight: Stored, bias: Tensor | None, compute: str) -> tuple[Tensor, Tensor]:
    """The product of the rounded numbers in float64, and the sum of the magnitudes that went into it."""
    if compute == "int8":
        rounded, scale = reference.rounded_tokens(x)
        table = reference.rounded_levels(weight.table())
    else:
        rounded, scale, table = x.bfloat16().float(), torch.ones(1), weight.table().bfloat16().float()
    levels = weight._replace(levels=table, form=LevelForm.TABLE.value, outliers=None, gaps=None)
    decoded, whole = reference.decode(levels).double(), rounded.double()
    added = torch.zeros(1) if bias is None else bias.double()
    size = (whole.abs().sum(-1, keepdim=True) * table.double().abs().max()) * scale + added.abs()
    if weight.outliers is not None:  # as they are
        exactly = weight._replace(outliers=weight.outliers.double())
        beside = reference.add_outliers(torch.zeros_like(decoded), exactly)
        added = added + x.double() @ beside.t()
        size = size + x.abs().double() @ beside.abs().t()
    return whole @ decoded.t() * scale.double() + added, size


# of the size: whole numbers are added up exactly, others rounded at each addition
TOLERANCE = {"int8": 1e-6, "bfloat16": 1e-5}


def test_tokens_become_multiples_of_a_127th_of_their_greatest_magnitude() -> None:
    x = torch.tensor([[0.5, -1.0, 0.26], [0.0, 0.0, 0.0], [1e-38, 0.0, -1e-38], [3e38, -1e38, 0.0]])
    rounded, scale = reference.rounded_tokens(x)
    np.testing.assert_array_equal(rounded[0], np.round(x[0].numpy() * 127))
    assert rounded[1:3].abs().sum() == 0
    assert rounded[3].tolist() == [127.0, -42.0, 0.0]
    assert ((rounded * scale - x).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize(
    ("bits", "steps"), [(1, 255), (2, 255), (3, 252), (4, 255), (5, 248), (6, 252), (7, 254), (8, 255)]
)
def test_an_even_grid_is_as_it_was(bits: int, steps: int) -> None:
    scale, offset = torch.tensor([0.37, 1e-3, 5.0]), torch.tensor([-4.0, 0.0, 0.3])
    table = scale[:, None] * (torch.arange(2**bits) + offset[:, None])
    torch.testing.assert_close(reference.rounded_levels(table), table, rtol=1e-6, atol=1e-6)
    uneven = torch.randn(5, 2**bits, generator=torch.Generator().manual_seed(0))
    step = (uneven.amax(1) - uneven.amin(1)) / steps
    whole = (reference.rounded_levels(uneven) - uneven.amin(1, keepdim=True)) / step[:, None]
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["symmetric", "affine", "uniform"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_a_grid_lose_nothing_in_int8(random_weight: Make, bits: int, form: str) -> None:
    weight = random_weight((40, 128), bits, "row", form)
    x = torch.randint(-127, 128, (3, 128)).float()
    x[:, 0] = 127.0  # tokens lose nothing either
    exactly = x.double() @ weight.decode().double().t()
    size = x.double().abs() @ weight.decode().double().abs().t()
    weight.compute = "int8"
    for name in native.available():
        with ops.kernels(name):
            assert ((weight.linear(x) - exactly).abs() <= 1e-5 * size).all()


def test_levels_go_in_255_steps_from_the_least_to_the_greatest() -> None:
    table = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    rounded = reference.rounded_levels(table)
    step = (table.amax(1) - table.amin(1)) / 255
    assert ((rounded - table).abs() <= 0.5001 * step[:, None]).all()
    assert not torch.equal(rounded, table)
    torch.testing.assert_close(rounded.aminmax(dim=1), table.aminmax(dim=1))
    assert torch.equal(reference.rounded_levels(torch.full((1, 4), 0.3)), torch.full((1, 4), 0.3))


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Stored, Tensor | None]:
    """Any product that the kernels take."""
    rows = draw(st.integers(1, 140))
    # whole bytes of one, two and four bits are 512, 256 and 128 columns at a time; 2048 may be 1024 bytes
    columns = draw(st.integers(1, 200) | st.sampled_from([64, 72, 128, 256, 520, 600, 1088, 2048]))
    bits, form = draw(st.integers(1, 8)), draw(st.sampled_from(list(LevelForm)))
    spelling = draw(st.sampled_from(["matrix", "row", "rows:3", "blocks:4", "columns:64", "columns:128"]))
    groups = Groups.parse(spelling, (rows, columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    codes = torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    levels = torch.randn(groups.count, form.width(bits), generator=generator)
    layout = [rows, columns], bits, list(groups.block), form.value, [0, 0]
    count = draw(st.sampled_from([0, 0, min(3, rows * columns)]))
    places = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    added = (torch.randn(count, generator=generator), pack_places(places)) if count else (None, None)
    weight = Stored(pack(codes, bits), levels, None, None, *added, *layout)
    tokens = draw(st.sampled_from([0, *range(1, 20), 31, 48, 49]))
    x = torch.randn(tokens, columns, generator=generator)
    return x, weight, torch.randn(rows, generator=generator) if draw(st.booleans()) else None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=products(), activation=st.sampled_from(list(ACTIVATIONS)))
def test_a_product_is_the_exact_sum_of_the_rounded_numbers(
    compute: str, given: tuple[Tensor, Stored, Tensor | None], activation: str
) -> None:
    x, weight, bias = given
    assert native.takes_rounded(compute, weight, x, bias) == bool(KERNELS)
    found = ops.linear_rounded(x, bias, *weight, "none", compute)
    assert found.shape == (len(x), weight.shape[0])
    expected, size = exact(x, weight, bias, compute)
    assert ((found - expected).abs() <= TOLERANCE[compute] * size + 1e-30).all()
    followed = ops.linear_rounded(x, bias, *weight, activation, compute)
    exactly = ACTIVATIONS[activation](found.double())
    assert ((followed - exactly).abs() <= (4e-7 if KERNELS else 2e-6) * found.abs() + 1e-30).all()
    by_reference = reference.linear_rounded(x, weight, bias, activation, compute)
    # two sums that are rounded at each addition may be twice as far apart
    tolerance = {"int8": 1e-5, "bfloat16": 2e-5}[compute]
    assert ((by_reference - followed).abs() <= tolerance * size + 1e-6).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [8, 72, 250])
@pytest.mark.parametrize("rows", [1, 31, 33, 65, 130])
def test_a_token_is_the_same_by_every_way_to_multiply(
    rounding: Make, bits: int, columns: int, rows: int
) -> None:
    if not KERNELS:
        pytest.skip("the reference has one way")
    weight = rounding((rows, columns), bits, "row")
    x = torch.randn(70, columns)
    one_by_one = torch.cat([weight.linear(token) for token in x.split(1)])
    for count in (5, 12, 13, 16, 17, 25, 48, 49, 70):
        assert torch.equal(weight.linear(x[-count:]), one_by_one[-count:])


def at_the_end(part: Tensor) -> Tensor:
    """A copy, behind which a page begins that nobody may read."""
    page = mmap.PAGESIZE
    size = -(-part.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + size), ctypes.c_size_t(page), 0) == 0
    copied = whole[size - part.nbytes : size].view(part.dtype).view(part.shape)
    return copied.copy_(part)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="protects memory as POSIX does")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("groups", ["row", "columns:64", "matrix"])
def test_nothing_is_read_behind_a_weight(compute: str, bits: int, groups: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    for rows, columns in ((1, 64), (2, 768), (8, 72), (40, 72), (72, 64), (17, 33)):
        grouped = Groups.parse(groups, (rows, columns))
        codes = pack(torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8), bits)
        levels = torch.randn(grouped.count, 1 << bits, generator=generator)
        layout = [rows, columns], bits, list(grouped.block), "table", [0, 0]
        plain = Stored(codes, levels, *[None] * 4, *layout)
        guarded = Stored(at_the_end(codes), at_the_end(levels), *[None] * 4, *layout)
        for tokens in (1, 8, 13, 48, 49):
            x = torch.randn(tokens, columns, generator=generator)
            found = ops.linear_rounded(at_the_end(x), None, *guarded, "none", compute)
            assert torch.equal(found, ops.linear_rounded(x, None, *plain, "none", compute))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_are_right_everywhere(activation: str, compute: str) -> None:
    weight = Stored(
        torch.tensor([0b01], dtype=torch.uint8),
        torch.tensor([[0.0, 1.0]]),
        *[None] * 4,
        [1, 1],
        1,
        [1, 1],
        "table",
        [0, 0],
    )
    points = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e30, 1e30, 1e-30, 0.0])])[:, None]
    found = ops.linear_rounded(points, None, *weight, activation, compute)
    if compute == "bfloat16":
        points = points.bfloat16()
    # in int8 the token's only number is its greatest, and so exact but for the rounding of a float
    expected = ACTIVATIONS[activation](points.double())
    assert ((found - expected).abs() <= 3e-7 * points.abs() + 1e-30).all()
    if compute == "bfloat16":  # in int8 what is not finite is NaN
        infinite = torch.tensor([[float("inf")]])
        assert ops.linear_rounded(infinite, None, *weight, activation, compute).item() == float("inf")


@pytest.mark.parametrize("columns", [200, 256])
@pytest.mark.parametrize("groups", ["matrix", "row", "columns:64"])
def test_a_token_is_the_same_in_every_batch_and_on_any_number_of_threads(
    rounding: Make, groups: str, columns: int
) -> None:
    weight = rounding((3000, columns), 3, groups, "table")
    x = torch.randn(29, columns)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(weight.linear(x))
            if KERNELS:
                for count in (1, 2, 3, 4, 7, 8, 9, 12, 13, 16, 17):
                    assert torch.equal(weight.linear(x[5 : 5 + count]), results[0][5 : 5 + count])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, results[0]) for one in results)


def test_inputs_of_any_shape_memory_and_dtype(rounding: Make, compute: str) -> None:
    weight = rounding((70, 110), 3, "row")
    for x in (
        torch.randn(110),
        torch.randn(0, 110),
        torch.randn(2, 0, 110),
        torch.randn(110, 3).t(),
        torch.randn(3, 12, 110).transpose(0, 1),
        torch.randn(3, 220)[:, ::2],
        torch.randn(2, 110, dtype=torch.bfloat16),
    ):
        bias = torch.randn(140)[::2]
        found = weight.linear(x, bias)
        assert found.shape == (*x.shape[:-1], 70)
        assert found.dtype == x.dtype
        expected, size = exact(x.float(), weight.stored(), bias, compute)
        tolerance = TOLERANCE[compute] if x.dtype == torch.float32 else 1e-2
        assert ((found - expected).abs() <= tolerance * size).all()


@pytest.mark.parametrize("tokens", [2, 12, 19])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_spoils_its_token_and_no_other(
    rounding: Make, compute: str, tokens: int, bad: float
) -> None:
    weight = rounding((70, 110), 3, "row")
    x = torch.randn(tokens, 110)
    good = weight.linear(x)
    x[1, 105] = bad
    found = weight.linear(x)
    assert not found[1].isfinite().any()
    assert compute == "bfloat16" or found[1].isnan().all()
    assert torch.equal(found[::2], good[::2])


@pytest.mark.parametrize("tokens", [2, 12, 19])
def test_a_bad_level_spoils_its_row_and_no_other(rounding: Make, compute: str, tokens: int) -> None:
    weight = rounding((70, 110), 5, "row")
    x = torch.randn(tokens, 110)
    good = weight.linear(x)
    weight.levels[3, 20], weight.levels[65, 0] = float("nan"), float("inf")
    found = weight.linear(x)
    rows = torch.tensor([3, 65])
    assert not found[:, rows].isfinite().any()
    assert compute == "bfloat16" or found[:, rows].isnan().all()
    found[:, rows] = good[:, rows]
    assert torch.equal(found, good)


def test_very_long_rows_do_not_overflow(compute: str) -> None:
    columns = 70_000
    codes = pack(torch.ones(1, columns, dtype=torch.uint8), 1)
    weight = Stored(
        codes, torch.tensor([[-1.0, 1.0]]), *[None] * 4, [1, columns], 1, [1, columns], "table", [0, 0]
    )
    for tokens in (1, 9, 19):
        found = ops.linear_rounded(torch.ones(tokens, columns), None, *weight, "none", compute)
        torch.testing.assert_close(found, torch.full((tokens, 1), float(columns)))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_weights_without_a_row_or_a_column(rounding: Make, shape: tuple[int, int]) -> None:
    weight = rounding(shape, 3, "row")
    bias = torch.randn(shape[0])
    assert torch.equal(weight.linear(torch.randn(2, shape[1]), bias), bias.expand(2, -1))


@needs_kernels
@pytest.mark.parametrize(
    ("groups", "corrections", "why"),
    [
        ("row", {"extra": (0, 5)}, "extra rows or columns"),
        ("row", {"extra": (5, 0)}, "extra rows or columns"),
        ("row", {"mask": True}, "a mask"),
        ("columns:20", {}, "runs of 20 columns, no multiple of 64"),
    ],
    ids=str,
)
def test_what_no_kernel_takes_the_reference_does(
    rounding: Make, compute: str, groups: str, corrections: dict[str, object], why: str
) -> None:
    weight = rounding((30, 100), 3, groups, "table", **corrections)
    spec = weight.spec
    assert why in native.why_not_rounded(100, spec.block[1], spec.extra, spec.mask)
    x = torch.randn(3, 100)
    assert not native.takes_rounded(compute, weight.stored(), x)
    float_product = x @ weight.decode().t()
    found = weight.linear(x)
    assert not torch.equal(found, float_product)
    assert torch.nn.functional.cosine_similarity(found, float_product).min() > 0.999


def test_wrong_inputs_are_told(rounding: Make) -> None:
    weight = rounding((7, 11), 3, "row")
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
        weight.linear(torch.randn(2, 12))
    with pytest.raises(RuntimeError):
        weight.linear(torch.randn(2, 11), torch.randn(8))


def test_there_is_no_gradient_and_it_is_said(rounding: Make) -> None:
    weight = rounding((7, 11), 3, "row")
    x = torch.randn(2, 11, requires_grad=True)
    with pytest.raises(LexibitError, match=r"no gradient.*compute='float32'"):
        weight.linear(x).sum().backward()


def test_a_compiler_may_follow(rounding: Make) -> None:
    weight = rounding((7, 11), 3, "row")
    compiled = torch.compile(lambda x: weight.linear(x).relu(), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 11)
    assert torch.equal(compiled(x), weight.linear(x).relu())


@needs_kernels
def test_what_no_kernels_of_a_name_compute_is_told() -> None:
    for name in native.available():
        for one in ROUNDED:
            with ops.kernels(name):
                assert native.supports(one) == ((name, one) in KERNELS)
    assert not native.supports("int8", "reference")
    from lexibit import _kernels

    without = [name for name in native.available()[:-1] if not native.supports("bfloat16", name)]
    for name in without:
        with pytest.raises(ValueError, match=f"{name} has no kernels for bfloat16"):
            _kernels.linear_rounded(
                name, "bfloat16", 1, (0, 0, 0, 0, 3, 1, 1, 1, 1, 0, 0, 0, 0), 0, 0, 0, 0, 0
            )


def test_groups_too_long_for_exact_sums_are_left_to_the_reference() -> None:
    why = native.why_not_rounded(1 << 18, (1 << 16) + 64, (0, 0), False)
    assert why == "its groups are runs of 65600 columns, more than 65536 and no multiple of that"
    assert not native.why_not_rounded(1 << 18, 1 << 17, (0, 0), False)
    assert not native.why_not_rounded(1 << 18, 1 << 18, (0, 0), False)
