"""A weight in codes: what it decodes to, what it stores, and how it behaves as a module."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import nn

from lexibit import CodebookWeight, LexibitError, ops
from lexibit.levels import LevelForm
from lexibit.nn import install
from lexibit.ops import native
from lexibit.weight import WeightSpec

Make = Callable[..., CodebookWeight]

WIDTHS = range(1, 9)
SHAPES = [(1, 1), (5, 7), (8, 16), (3, 4, 5), (2, 1, 3, 4), (0, 4), (4, 0)]
GROUPS = ["matrix", "row", "rows:2", "blocks:3", "columns:3"]
FORMS = ["table", "symmetric", "affine", "uniform", "binary"]
CORRECTIONS = [
    {"extra": (0, 2)},
    {"extra": (3, 0)},
    {"mask": True},
    {"extra": (0, 9), "mask": True},
    {"extra": (1, 0), "mask": True},
    {"outliers": 4},
    {"extra": (0, 2), "mask": True, "outliers": 3},
]


def level(weight: CodebookWeight, group: int, code: int) -> float:
    """One level in float64, by the formula of its form."""
    stored = weight.levels[group].double().tolist()
    if weight.spec.form is LevelForm.TABLE:
        return stored[code]
    if weight.spec.form is LevelForm.SYMMETRIC:
        return stored[0] * (code - 2 ** (weight.spec.bits - 1))
    if weight.spec.form is LevelForm.AFFINE:
        return stored[0] * (code - 2 ** (weight.spec.bits - 1)) + stored[1]
    if weight.spec.form is LevelForm.UNIFORM:
        return stored[0] * (code + stored[1])
    return sum(s if code >> j & 1 else -s for j, s in enumerate(stored))


def outliers(weight: CodebookWeight) -> tuple[list[int], list[float]]:
    """What lies between a weight's outliers, and what they add."""
    if weight.gaps is None or weight.outliers is None:
        return [], []
    return weight.gaps.tolist(), weight.outliers.double().tolist()


def naive_decode(weight: CodebookWeight) -> torch.Tensor:
    """The weight one element at a time: bits from one big integer, groups by division."""
    shape, bits = weight.spec.shape, weight.spec.bits
    own_rows, own_columns = prod(shape[:-1]), shape[-1]
    rows, columns = own_rows + weight.spec.extra[0], own_columns + weight.spec.extra[1]
    height, width = weight.spec.block
    stream = int.from_bytes(bytes(weight.codes.tolist()), "little")
    zero = 0 if weight.mask is None else int.from_bytes(bytes(weight.mask.tolist()), "little")
    values = torch.zeros(own_rows, own_columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            code = (stream >> ((r * columns + c) * bits)) & (2**bits - 1)
            to_row = r if r < own_rows else weight.origins[r - own_rows]
            to_column = c if c < own_columns else weight.origins[c - own_columns]
            if not zero >> (int(to_row) * own_columns + int(to_column)) & 1:
                group = r // height * -(-columns // width) + c // width
                values[to_row, to_column] += level(weight, group, code)
    place = -1
    for gap, added in zip(*outliers(weight), strict=True):
        place += gap + 1
        values.view(-1)[place] += added
    return values.view(shape)


def host(weight: CodebookWeight) -> nn.Linear:
    """A linear layer that runs from the weight."""
    out, inside = weight.shape
    module = nn.Linear(inside, out)
    install(module, "weight", weight)
    return module


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back_as_they_went_in(random_weight: Make, bits: int, shape: tuple[int, ...]) -> None:
    for groups in GROUPS:
        other = random_weight(shape, bits, groups)
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        weight = CodebookWeight.from_codes(other.spec, codes, other.levels)
        assert weight.codes.shape == (-(-prod(shape) * bits // 8),)
        assert torch.equal(weight.unpacked_codes(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("form", FORMS)
def test_decoding_equals_decoding_one_weight_at_a_time(random_weight: Make, bits: int, form: str) -> None:
    for shape in SHAPES:
        for groups in GROUPS:
            weight = random_weight(shape, bits, groups, form)
            decoded = weight.decode()
            assert decoded.shape == weight.shape == shape
            assert decoded.dtype == weight.dtype == torch.float32
            torch.testing.assert_close(decoded.double(), naive_decode(weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("corrections", CORRECTIONS, ids=str)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("form", FORMS)
def test_extra_channels_are_added_to_their_origins_and_a_mask_makes_zeros(
    random_weight: Make, form: str, groups: str, corrections: dict[str, object]
) -> None:
    for bits, shape in ((1, (5, 7)), (3, (3, 4, 5)), (8, (1, 9))):
        weight = random_weight(shape, bits, groups, form, **corrections)
        decoded = weight.decode()
        assert decoded.shape == weight.shape == shape
        assert decoded.is_contiguous()
        torch.testing.assert_close(decoded.double(), naive_decode(weight), rtol=1e-5, atol=1e-5)
        if "mask" in corrections and "outliers" not in corrections:
            assert (decoded == 0).any()


@pytest.mark.parametrize("corrections", CORRECTIONS, ids=str)
def test_the_bytes_of_corrections_count(random_weight: Make, corrections: dict[str, object]) -> None:
    weight = random_weight((5, 7), 3, "row", "binary", **corrections)
    extra = corrections.get("extra", (0, 0))
    stored = weight.tensors("w")
    added = corrections.get("outliers", 0)
    beside = {"w_origins"} if any(extra) else set()
    beside |= {"w_mask"} if "mask" in corrections else set()
    beside |= {"w_outliers", "w_outlier_gaps"} if added else set()
    assert stored.keys() - {"w", "w_levels"} == beside
    codes = -(-(5 + extra[0]) * (7 + extra[1]) * 3 // 8)
    size = codes + 4 * 3 * (5 + extra[0]) + 4 * sum(extra) + (5 if "mask" in corrections else 0) + 4 * added
    assert weight.nbytes == size
    assert weight.bits_per_weight == pytest.approx(8 * size / 35)
    assert sum(t.numel() * t.element_size() for t in stored.values()) == size


def test_decoding_gives_a_new_tensor_at_every_call(random_weight: Make) -> None:
    weight = random_weight((5, 7))
    first = weight.decode()
    expected = first.clone()
    first.zero_()
    assert torch.equal(weight.decode(), expected)


@pytest.mark.parametrize("levels_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", GROUPS)
def test_the_bytes_are_those_of_the_stored_tensors(
    random_weight: Make, levels_dtype: str, form: str, groups: str
) -> None:
    for bits in WIDTHS:
        weight = random_weight((5, 7), bits, groups, form, levels_dtype=levels_dtype)
        stored = weight.tensors("w")
        assert list(stored) == ["w", "w_levels"]
        assert stored["w_levels"].dtype == getattr(torch, levels_dtype)
        size = sum(len(t.contiguous().view(-1).view(torch.uint8)) for t in stored.values())
        assert weight.nbytes == weight.spec.nbytes == size
        assert weight.bits_per_weight == pytest.approx(8 * size / 35)


def test_stored_levels_lose_nothing_when_the_weight_computes_in_a_wider_dtype(random_weight: Make) -> None:
    weight = random_weight((5, 7), levels_dtype="float16", dtype=torch.float32)
    stored = weight.tensors("w")["w_levels"]
    assert stored.dtype == torch.float16
    assert torch.equal(stored.float(), weight.levels)


def test_a_weight_without_elements_takes_no_bytes(random_weight: Make) -> None:
    weight = random_weight((0, 4))
    assert (weight.nbytes, weight.bits_per_weight) == (0, 0.0)
    assert weight.decode().shape == (0, 4)


def test_codes_or_levels_of_a_wrong_shape_or_dtype_are_refused(random_weight: Make) -> None:
    good = random_weight((5, 7))
    with pytest.raises(LexibitError, match=r"codes are torch\.uint8 \[13\], must be torch\.uint8 \[14\]"):
        CodebookWeight(good.spec, good.codes[:-1], good.levels)
    with pytest.raises(LexibitError, match=r"codes are torch\.int8"):
        CodebookWeight(good.spec, good.codes.view(torch.int8), good.levels)
    with pytest.raises(LexibitError, match=r"levels are .*\[1, 4\], must be .*\[1, 8\]"):
        CodebookWeight(good.spec, good.codes, good.levels[:, :4])


def test_a_correction_that_is_missing_or_has_no_place_is_refused(random_weight: Make) -> None:
    plain, corrected = random_weight((5, 7)), random_weight((5, 7), extra=(0, 2), mask=True)
    with pytest.raises(LexibitError, match="origins are missing"):
        CodebookWeight(corrected.spec, corrected.codes, corrected.levels, mask=corrected.mask)
    with pytest.raises(LexibitError, match="mask are missing"):
        CodebookWeight(corrected.spec, corrected.codes, corrected.levels, corrected.origins)
    with pytest.raises(LexibitError, match="origins have no place"):
        CodebookWeight(plain.spec, plain.codes, plain.levels, corrected.origins)
    with pytest.raises(LexibitError, match=r"origins are torch\.int64"):
        CodebookWeight(
            corrected.spec, corrected.codes, corrected.levels, corrected.origins.long(), corrected.mask
        )


def test_a_record_is_plain_json(random_weight: Make) -> None:
    spec = random_weight((5, 7), 3, "columns:3").spec
    record = json.loads(json.dumps(spec.to_dict()))
    assert record == {
        "shape": [5, 7],
        "bits": 3,
        "block": [1, 3],
        "form": "table",
        "levels_dtype": "float32",
        "dtype": "float32",
        "scheme": "random",
        "extra": [0, 0],
        "mask": False,
        "outliers": 0,
    }
    tuples = {field: tuple(record[field]) for field in ("shape", "block", "extra")}
    again = WeightSpec(**record | tuples | {"form": spec.form})
    assert again == spec


def test_it_tells_people_what_it_is(random_weight: Make) -> None:
    text = repr(random_weight((5, 7), 3))
    assert "[5, 7], random, 3 bits, blocks of 5 x 7" in text
    # 14 bytes of codes and 8 levels of 4 bytes for 35 weights
    assert f"{8 * 46 / 35:.3f} bits per weight" in text


# as a module -----------------------------------------------------------------------------------


def test_in_a_state_dict_the_codes_have_the_weights_own_key(random_weight: Make) -> None:
    weight = random_weight((5, 7))
    state = nn.Sequential(host(weight)).state_dict()
    assert set(state) == {"0.weight", "0.weight_levels", "0.bias"}
    assert torch.equal(state["0.weight"], weight.codes)
    assert state["0.weight"].dtype == torch.uint8
    assert torch.equal(state["0.weight_levels"], weight.levels)


@pytest.mark.parametrize("corrections", [{}, *CORRECTIONS], ids=str)
def test_a_state_dict_is_loaded_into_a_model_quantized_the_same_way(
    random_weight: Make, corrections: dict[str, object]
) -> None:
    source = nn.Sequential(host(random_weight((5, 7), seed=1, **corrections)), nn.ReLU())
    target = nn.Sequential(host(random_weight((5, 7), seed=2, **corrections)), nn.ReLU())
    assert not torch.equal(source[0].weight, target[0].weight)
    result = target.load_state_dict(source.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(source[0].weight, target[0].weight)
    assert torch.equal(source[0].bias, target[0].bias)
    x = torch.randn(3, 7)
    assert torch.equal(source(x), target(x))


def test_a_quantized_layer_loads_its_own_state_dict(random_weight: Make) -> None:
    source, target = host(random_weight((5, 7), seed=1)), host(random_weight((5, 7), seed=2))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.weight, target.weight)


def test_loading_converts_levels_to_the_dtype_of_the_model(random_weight: Make) -> None:
    source = nn.Sequential(host(random_weight((5, 7), seed=1)))
    target = nn.Sequential(host(random_weight((5, 7), seed=2))).to(torch.bfloat16)
    target.load_state_dict(source.state_dict())
    assert target[0].weight_codebook.levels.dtype == torch.bfloat16
    assert torch.equal(target[0].weight, source[0].weight.bfloat16())


def test_the_state_of_a_float_model_is_refused_with_the_shapes(random_weight: Make) -> None:
    target = nn.Sequential(host(random_weight((5, 7))))
    before = target[0].weight
    with pytest.raises(RuntimeError, match=r"0\.weight: torch\.float32 \[5, 7\] given.*uint8 \[14\]"):
        target.load_state_dict(nn.Sequential(nn.Linear(7, 5)).state_dict(), strict=False)
    assert torch.equal(target[0].weight, before)


def test_the_state_of_another_width_is_refused_with_the_shapes(random_weight: Make) -> None:
    target = nn.Sequential(host(random_weight((5, 7), bits=3)))
    other = nn.Sequential(host(random_weight((5, 7), bits=4)))
    with pytest.raises(RuntimeError, match=r"0\.weight: .*\[18\] given.*\[14\].*quantized the same way"):
        target.load_state_dict(other.state_dict(), strict=False)


def test_missing_codes_and_levels_are_named(random_weight: Make) -> None:
    target = nn.Sequential(host(random_weight((5, 7))))
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight", "0\.weight_levels"'):
        target.load_state_dict({"0.bias": torch.zeros(5)})


def test_a_key_that_no_module_has_is_still_unexpected(random_weight: Make) -> None:
    target = nn.Sequential(host(random_weight((5, 7))))
    state = target.state_dict() | {"0.weigth": torch.zeros(5)}
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0\.weigth"\.'):
        target.load_state_dict(state)


def test_a_deep_copy_is_independent(random_weight: Make) -> None:
    weight = random_weight((5, 7))
    expected = weight.decode()
    other = copy.deepcopy(weight)
    assert torch.equal(other.decode(), expected)
    assert other.spec == weight.spec
    other.codes.zero_()
    other.levels.zero_()
    assert torch.equal(weight.decode(), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_changing_the_dtype_changes_the_levels_and_not_the_codes(
    random_weight: Make, form: str, dtype: torch.dtype
) -> None:
    weight = random_weight((5, 7), 3, "columns:3", form)
    codes, levels = weight.codes.clone(), weight.levels.clone()
    weight.to(dtype)
    assert weight.dtype == weight.decode().dtype == dtype
    assert torch.equal(weight.codes, codes)
    assert torch.equal(weight.levels, levels.to(dtype))
    tolerance = 4 * max(torch.finfo(dtype).eps, 1e-7)
    torch.testing.assert_close(weight.decode().double(), naive_decode(weight), rtol=tolerance, atol=tolerance)
    assert weight.tensors("w")["w_levels"].dtype == torch.float32


def test_a_weight_has_buffers_and_no_parameters(random_weight: Make) -> None:
    weight = random_weight((5, 7))
    assert list(weight.parameters()) == []
    assert {name: b.dtype for name, b in weight.named_buffers()} == {
        "codes": torch.uint8,
        "levels": torch.float32,
    }


CHANGES: dict[str, Callable[[CodebookWeight], object]] = {
    "other levels": lambda weight: setattr(weight, "levels", weight.levels * 2),
    "levels elsewhere": lambda weight: setattr(weight.levels, "data", weight.levels * 2),
    "levels in place": lambda weight: weight.levels.mul_(2),
    "levels with gaps": lambda weight: setattr(
        weight, "levels", torch.stack([weight.levels, weight.levels], -1)[..., 0]
    ),
    "other codes": lambda weight: setattr(weight, "codes", weight.codes.flip(0)),
    "codes in place": lambda weight: weight.codes.bitwise_not_(),
    "another dtype": lambda weight: weight.to(torch.float64),
    "trained levels": lambda weight: weight.train_levels().data.mul_(2),
    "compute": lambda weight: setattr(weight, "compute", "int8"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_products_counts(random_weight: Make, change: str) -> None:
    weight, x = random_weight((40, 64), 3, "row"), torch.randn(3, 64)
    with torch.no_grad():
        before = weight.linear(x)
        CHANGES[change](weight)
        found = weight.linear(x)
        expected = copy.deepcopy(weight).linear(x)
        assert torch.equal(found, expected)
        same = change in ("levels with gaps", "another dtype")
        assert torch.allclose(before, expected, atol=1e-4) == same
        weight.levels.add_(0.5)  # with gaps: no copy of them was kept
        found = weight.linear(x)
        assert torch.equal(found, copy.deepcopy(weight).linear(x))
        assert not torch.allclose(found, expected)
    if change != "compute":
        torch.testing.assert_close(found, x @ weight.decode().to(x.dtype).t())


def test_kept_products_are_of_one_weight_alone(random_weight: Make) -> None:
    weight, x = random_weight((40, 64), 3, "row"), torch.randn(3, 64)
    with torch.no_grad():
        expected = weight.linear(x)
        copies = [copy.copy(weight), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))]
        weight.levels.zero_()
        assert not weight.linear(x).any()
        assert not copies[0].linear(x).any()  # the same tensors
        for one in copies[1:]:
            assert torch.equal(one.linear(x), expected)
        with ops.kernels("reference"):
            torch.testing.assert_close(copies[1].linear(x), expected)
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
        copies[1].linear(torch.randn(3, 65))


def test_a_product_is_looked_through_once(random_weight: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.chosen().name == native.REFERENCE:
        pytest.skip("no kernels here")
    weight, x = random_weight((40, 64), 3, "row"), torch.randn(3, 64)
    with torch.no_grad():
        expected = weight.linear(x)
        monkeypatch.setattr(native, "_weight", lambda *_: pytest.fail("looked through again"))
        assert torch.equal(weight.linear(x), expected)
        assert torch.equal(weight.linear(x[:2], torch.zeros(40)), expected[:2])
