"""Groups against a function that says for each single weight which group it is in."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lexibit.errors import LexibitError
from lexibit.groups import Groups, matrix_shape

SPELLINGS = st.one_of(
    st.sampled_from(["matrix", "row"]),
    st.builds("{}:{}".format, st.sampled_from(["rows", "blocks", "columns"]), st.integers(1, 14)),
)
SIZES = st.integers(1, 11)


def group_of(spec: str, rows: int, columns: int, r: int, c: int) -> int:
    """The number of the group of the weight in row r and column c."""
    kind, _, n = spec.partition(":")
    if kind == "matrix":
        return 0
    if kind == "row":
        return r
    if kind == "rows":
        return r // int(n)
    if kind == "blocks":
        return r // ceil(rows / int(n))
    return r * ceil(columns / int(n)) + c // int(n)


def numbers(spec: str, rows: int, columns: int) -> torch.Tensor:
    table = [[group_of(spec, rows, columns, r, c) for c in range(columns)] for r in range(rows)]
    return torch.tensor(table)


@pytest.mark.parametrize(
    ("spec", "shape", "block", "count"),
    [
        ("matrix", (6, 10), (6, 10), 1),
        ("row", (6, 10), (1, 10), 6),
        ("rows:4", (6, 10), (4, 10), 2),
        ("rows:99", (6, 10), (6, 10), 1),
        ("blocks:4", (6, 10), (2, 10), 3),
        ("blocks:128", (768, 4), (6, 4), 128),
        ("blocks:128", (3072, 4), (24, 4), 128),
        ("blocks:128", (6, 10), (1, 10), 6),
        ("columns:4", (6, 10), (1, 4), 18),
        ("columns:99", (6, 10), (1, 10), 6),
        ("row", (2, 3, 10), (1, 10), 6),
    ],
)
def test_a_spelling_makes_these_blocks(
    spec: str, shape: tuple[int, ...], block: tuple[int, int], count: int
) -> None:
    groups = Groups.parse(spec, shape)
    assert (groups.block, groups.count) == (block, count)
    assert groups.size == block[0] * block[1]


@given(SPELLINGS, SIZES, SIZES)
def test_every_weight_is_in_exactly_the_group_that_is_documented(spec: str, rows: int, columns: int) -> None:
    groups = Groups.parse(spec, (rows, columns))
    expected = numbers(spec, rows, columns).flatten()
    assert groups.count == int(expected.max()) + 1

    place = torch.arange(rows * columns).view(rows, columns)
    batches = groups.split(place)

    assert len(batches) <= 2
    found = torch.full((rows * columns,), -1)
    for index, places in batches:
        assert len(index) == len(places)
        for number, members in zip(index, places, strict=True):
            assert (found[members] == -1).all()
            found[members] = number
    assert torch.equal(found, expected)


@given(SPELLINGS, SIZES, SIZES)
def test_all_but_the_last_groups_are_full(spec: str, rows: int, columns: int) -> None:
    groups = Groups.parse(spec, (rows, columns))
    first, *rest = groups.split(torch.zeros(rows, columns))
    assert first[1].shape[1] == groups.size
    for _, values in rest:
        assert 0 < values.shape[1] < groups.size


@given(SPELLINGS, SIZES, SIZES)
def test_joining_undoes_splitting(spec: str, rows: int, columns: int) -> None:
    groups = Groups.parse(spec, (rows, columns))
    matrix = torch.arange(rows * columns, dtype=torch.uint8).view(rows, columns)
    assert torch.equal(groups.join([values for _, values in groups.split(matrix)]), matrix)


@given(SPELLINGS, SIZES, SIZES, st.integers(1, 4), st.data())
def test_looking_up_equals_a_double_loop(
    spec: str, rows: int, columns: int, bits: int, data: st.DataObject
) -> None:
    groups = Groups.parse(spec, (rows, columns))
    picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = torch.randint(0, 2**bits, (len(picked), columns), generator=generator, dtype=torch.uint8)
    table = torch.arange(groups.count * 2**bits, dtype=torch.float64).view(groups.count, -1)

    found = groups.lookup(codes, table, torch.tensor(picked))

    assert found.dtype == torch.float64
    for i, r in enumerate(picked):
        for c in range(columns):
            assert found[i, c] == table[group_of(spec, rows, columns, r, c), codes[i, c].long()]


@pytest.mark.parametrize("spec", ["matrix", "row", "rows:2", "blocks:2", "columns:2"])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3)])
def test_a_weight_without_elements_has_no_groups(spec: str, shape: tuple[int, ...]) -> None:
    groups = Groups.parse(spec, shape)
    matrix = torch.zeros(matrix_shape(shape), dtype=torch.uint8)
    assert groups.count == 0
    assert groups.split(matrix) == []
    assert groups.join([]).shape == matrix.shape


def test_the_last_axis_are_the_columns() -> None:
    assert matrix_shape((2, 3, 5)) == (6, 5)
    assert matrix_shape((7, 5)) == (7, 5)


@pytest.mark.parametrize(
    "spec",
    ["rows", "rows:", "rows:0", "rows:-2", "rows:1.5", "blocks:x", "blocks:²", "columns:0", "columns: 4"],
)
def test_a_number_that_is_missing_or_not_positive_is_refused(spec: str) -> None:
    with pytest.raises(LexibitError, match=r"positive whole number|unknown groups") as caught:
        Groups.parse(spec, (4, 4))
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize("spec", ["", "Matrix", "tensor", "matrix:3", "row:2", "matrix:", "row:", ":4"])
def test_another_spelling_is_refused(spec: str) -> None:
    with pytest.raises(LexibitError, match="unknown groups"):
        Groups.parse(spec, (4, 4))


def test_a_misspelling_is_answered_with_the_right_one() -> None:
    with pytest.raises(LexibitError, match="did you mean 'columns:N'"):
        Groups.parse("column:4", (4, 4))


@pytest.mark.parametrize(
    ("shape", "height"), [((10, 100), 10), ((384, 384), 2), ((3072, 768), 1), ((5, 100), 5)]
)
def test_within_takes_the_fewest_rows_whose_levels_cost_no_more(shape, height):
    groups = Groups.parse("within:0.2", shape, level_bits=128)
    assert groups.block == (height, shape[1])
    if groups.count > 1:
        assert groups.count * 128 <= 0.2 * shape[0] * shape[1]


@pytest.mark.parametrize("spec", ["within:", "within:0", "within:-1", "within:x", "within:inf", "within:nan"])
def test_within_needs_bits(spec):
    with pytest.raises(LexibitError, match="write bits a weight"):
        Groups.parse(spec, (4, 4))


def test_within_next_to_nothing_is_one_set():
    assert Groups.parse("within:1e-320", (40, 4), level_bits=64).count == 1
