"""The forms of levels against their formulas, one level at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lexibit.levels import LevelForm

WIDTHS = range(1, 9)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def numbers(form: LevelForm, bits: int, groups: int = 3) -> torch.Tensor:
    return torch.randn(groups, form.width(bits), generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_form_stores_its_own_count_of_numbers(bits: int) -> None:
    assert LevelForm.TABLE.width(bits) == 2**bits
    assert LevelForm.SYMMETRIC.width(bits) == 1
    assert LevelForm.AFFINE.width(bits) == LevelForm.UNIFORM.width(bits) == 2
    assert LevelForm.BINARY.width(bits) == bits


@pytest.mark.parametrize("form", LevelForm)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_table_has_a_level_for_every_code_in_the_same_dtype(
    form: LevelForm, dtype: torch.dtype, bits: int
) -> None:
    table = form.expand(numbers(form, bits).to(dtype), bits)
    assert table.shape == (3, 2**bits)
    assert table.dtype == dtype


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_table_is_its_own_expansion(bits: int) -> None:
    levels = numbers(LevelForm.TABLE, bits)
    assert torch.equal(LevelForm.TABLE.expand(levels, bits), levels)


@pytest.mark.parametrize("bits", WIDTHS)
def test_uniform_levels_are_scale_times_code_plus_offset(bits: int) -> None:
    levels = numbers(LevelForm.UNIFORM, bits)
    table = LevelForm.UNIFORM.expand(levels, bits)
    for group, (scale, offset) in enumerate(levels.numpy()):
        for code in range(2**bits):
            assert table[group, code].item() == scale * (np.float32(code) + offset)


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_levels_are_uniform_ones_about_zero(bits: int) -> None:
    scale = numbers(LevelForm.SYMMETRIC, bits)
    table = LevelForm.SYMMETRIC.expand(scale, bits)
    offset = torch.full_like(scale, -(2 ** (bits - 1)))
    assert torch.equal(table, LevelForm.UNIFORM.expand(torch.cat([scale, offset], 1), bits))
    assert (table[:, 2 ** (bits - 1)] == 0).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_affine_levels_are_symmetric_ones_about_a_middle(bits: int) -> None:
    levels = numbers(LevelForm.AFFINE, bits)
    expected = LevelForm.SYMMETRIC.expand(levels[:, :1], bits) + levels[:, 1:]
    assert torch.equal(LevelForm.AFFINE.expand(levels, bits), expected)
    # far from zero and in half precision the steps do not drown: as many distinct levels as the dtype has
    low = torch.tensor([[2.0**-9, 1.0]], dtype=torch.bfloat16)
    table = LevelForm.AFFINE.expand(low, bits)[0].float()
    assert (table - (1 + 2.0**-9 * (torch.arange(2**bits) - 2 ** (bits - 1)))).abs().max() <= 2.0**-8


@pytest.mark.parametrize("bits", WIDTHS)
def test_uniform_levels_about_a_middle_are_a_special_case_of_binary_ones(bits: int) -> None:
    # the scales step/2, step, 2 step, ... give the levels step * (code - (2^k - 1) / 2)
    step = numbers(LevelForm.SYMMETRIC, bits).abs().double()
    uniform = torch.cat([step, torch.full_like(step, -(2**bits - 1) / 2)], 1)
    binary = step / 2 * 2.0 ** torch.arange(bits)
    torch.testing.assert_close(LevelForm.BINARY.expand(binary, bits), LevelForm.UNIFORM.expand(uniform, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_binary_levels_are_sums_of_signed_scales(bits: int) -> None:
    levels = numbers(LevelForm.BINARY, bits)
    table = LevelForm.BINARY.expand(levels, bits)
    for group, scales in enumerate(levels.double().tolist()):
        for code in range(2**bits):
            planes = [+1 if code >> j & 1 else -1 for j in range(bits)]
            level = sum(scale * sign for scale, sign in zip(scales, planes, strict=True))
            assert table[group, code].item() == pytest.approx(level, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_code_and_its_sign_planes_are_the_same_thing(bits: int) -> None:
    # with the scales 1, 2, 4, ... every set of planes has a level of its own: 2 code - (2^k - 1)
    scales = 2.0 ** torch.arange(bits)[None]
    table = LevelForm.BINARY.expand(scales, bits)[0]
    codes = torch.arange(2**bits)
    assert torch.equal(table, (2 * codes - (2**bits - 1)).float())

    planes = torch.where(codes[:, None] & (1 << torch.arange(bits)) != 0, 1.0, -1.0)
    assert torch.equal(planes @ scales[0], table)
    back = ((planes > 0) * (1 << torch.arange(bits))).sum(1)
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_complement_of_a_binary_code_has_the_negative_level(bits: int) -> None:
    table = LevelForm.BINARY.expand(numbers(LevelForm.BINARY, bits), bits)
    assert table.abs().min() > 0
    assert torch.equal(table.flip(1), -table)


@pytest.mark.parametrize("form", LevelForm)
def test_no_groups_expand_to_no_levels(form: LevelForm) -> None:
    assert form.expand(torch.zeros(0, form.width(3)), 3).shape == (0, 8)
