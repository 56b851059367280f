"""Packed codes against one big integer, written bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lexibit.packing import pack, packed_bytes, unpack, unpack_rows

WIDTHS = range(1, 9)


def stream(codes: list[int], bits: int) -> list[int]:
    """The bytes by the definition: code i takes the bits i*k .. i*k + k - 1, lowest first."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@st.composite
def some_codes(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 8))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


@given(some_codes())
def test_the_layout_is_one_stream_of_bits_lowest_first(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == stream(codes, bits)


@given(some_codes())
def test_unpacking_undoes_packing(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = torch.tensor(stream(codes, bits), dtype=torch.uint8)
    unpacked = unpack(packed, bits, len(codes))
    assert unpacked.dtype == torch.uint8
    assert unpacked.tolist() == codes


@given(st.integers(0, 10**12), st.integers(1, 8))
def test_the_bytes_are_the_bits_rounded_up(count: int, bits: int) -> None:
    assert 8 * packed_bytes(count, bits) - count * bits in range(8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", range(18))
def test_every_count_takes_its_bits_and_spare_bits_are_zero(bits: int, count: int) -> None:
    packed = pack(torch.full((count,), 2**bits - 1, dtype=torch.uint8), bits)
    assert len(packed) == packed_bytes(count, bits) == -(-count * bits // 8)
    # all codes are ones: as a number the stream is 2^(n k) - 1, so that every spare bit is zero
    assert int.from_bytes(bytes(packed.tolist()), "little") == 2 ** (count * bits) - 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_stream_can_be_cut_short(bits: int) -> None:
    codes = random_codes(bits, 29)
    packed = pack(codes, bits)
    for count in range(30):
        assert torch.equal(unpack(packed, bits, count), codes[:count])


@pytest.mark.parametrize("bits", WIDTHS)
def test_memory_that_is_not_contiguous_is_read_in_row_major_order(bits: int) -> None:
    codes = random_codes(bits, 7, 6)
    turned = codes.t()
    assert not turned.is_contiguous()
    packed = pack(turned, bits)
    assert packed.tolist() == stream(turned.flatten().tolist(), bits)

    spaced = torch.stack([packed, packed], dim=1)[:, 0]
    assert not spaced.is_contiguous()
    assert torch.equal(unpack(spaced, bits, 42), turned.flatten())


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_leaves_its_input_alone_and_owns_its_output(bits: int) -> None:
    codes = random_codes(bits, 16)
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.untyped_storage().nbytes() == 2 * bits
    packed.zero_()
    assert torch.equal(codes, before)


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 21), st.data())
def test_rows_are_unpacked_as_the_whole_matrix_has_them(
    bits: int, rows: int, columns: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    wanted = data.draw(st.lists(st.integers(0, rows - 1), max_size=12))
    packed = torch.tensor(stream(codes.flatten().tolist(), bits), dtype=torch.uint8)

    picked = unpack_rows(packed, bits, columns, torch.tensor(wanted, dtype=torch.int64))

    assert picked.dtype == torch.uint8
    assert picked.shape == (len(wanted), columns)
    assert picked.tolist() == [codes[row].tolist() for row in wanted]
