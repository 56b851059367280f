"""The stored form on disk, against a decoder written from its specification with numpy and json."""

import hashlib
import json
import re
import struct
import tempfile
from contextlib import contextmanager
from math import ceil, prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

from lexibit import CodebookWeight, FormatError, LexibitError, Recipe, format, quantize_tensor
from lexibit.groups import Groups
from lexibit.levels import LevelForm
from lexibit.weight import WeightSpec

SCHEMA = Path(__file__).parents[1] / "docs" / "format.schema.json"
GOLDEN = Path(__file__).parent / "golden"
WIDTH = {
    "table": lambda bits: 2**bits,
    "symmetric": lambda bits: 1,
    "affine": lambda bits: 2,
    "uniform": lambda bits: 2,
    "binary": lambda bits: bits,
}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
FIELDS = ["shape", "bits", "block", "form", "levels_dtype", "dtype", "scheme", "extra", "mask"]


# a decoder of its own --------------------------------------------------------------------------------


def read_raw(path):
    """The header of a safetensors file and the bytes behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def raw_levels(kind, data, shape):
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[kind]).astype("<f4").reshape(shape)


def raw_codes(data, bits, shape):
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: prod(shape) * bits]
    return (stream.reshape(-1, bits) << np.arange(bits)).sum(1).reshape(shape)


def decode_by_hand(path, name):
    """One weight as numpy, every value looked up on its own."""
    header, body = read_raw(path)
    record = json.loads(header["__metadata__"]["lexibit"])["weights"][name]
    part = {key: body[slice(*header[key]["data_offsets"])] for key in header if key.startswith(name)}
    shape, bits, block, extra = record["shape"], record["bits"], record["block"], record["extra"]
    rows, columns = prod(shape[:-1]), shape[-1]
    codes = raw_codes(part[name], bits, (rows + extra[0], columns + extra[1]))
    levels = raw_levels(
        header[name + "_levels"]["dtype"], part[name + "_levels"], header[name + "_levels"]["shape"]
    ).astype(record["dtype"])
    out = np.empty(codes.shape, record["dtype"])
    runs = ceil(codes.shape[1] / block[1])
    for (row, column), code in np.ndenumerate(codes):
        mine = levels[row // block[0] * runs + column // block[1]]
        if record["form"] == "table":
            out[row, column] = mine[code]
        elif record["form"] == "symmetric":
            out[row, column] = mine[0] * mine.dtype.type(int(code) - 2 ** (bits - 1))
        elif record["form"] == "affine":
            out[row, column] = mine[0] * mine.dtype.type(int(code) - 2 ** (bits - 1)) + mine[1]
        elif record["form"] == "uniform":
            out[row, column] = mine[0] * (mine.dtype.type(code) + mine[1])
        else:
            value = mine.dtype.type(0)
            for plane in range(bits):
                value = value + (mine[plane] if code >> plane & 1 else -mine[plane])
            out[row, column] = value
    if any(extra):
        for number, origin in enumerate(np.frombuffer(part[name + "_origins"], "<i4")):
            if extra[0]:
                out[origin] += out[rows + number]
            else:
                out[:, origin] += out[:, columns + number]
        out = out[:rows, :columns]
    if record["mask"]:
        bits_set = np.unpackbits(np.frombuffer(part[name + "_mask"], np.uint8), bitorder="little")
        out = np.where(bits_set[: rows * columns].reshape(rows, columns), 0, out)
    if record["outliers"]:
        place, out = -1, out.copy()
        values = np.frombuffer(part[name + "_outliers"], "<f2")
        for gap, value in zip(np.frombuffer(part[name + "_outlier_gaps"], "<u2"), values, strict=True):
            place += int(gap) + 1
            out.reshape(-1)[place] += out.dtype.type(value)
    return out.reshape(shape)


# making weights --------------------------------------------------------------------------------------

GROUPS = st.one_of(
    st.sampled_from(["matrix", "row"]),
    st.builds("{}:{}".format, st.sampled_from(["rows", "blocks", "columns"]), st.integers(1, 11)),
)


@st.composite
def weights(draw, dtypes=("float32", "float64")):
    """A weight of any form with random parts, and its codes one a byte."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=2, max_size=4)))
    rows, columns = prod(shape[:-1]), shape[-1]
    bits = draw(st.integers(1, 8))
    extra = draw(st.sampled_from([(0, 0), (2, 0), (0, 1), (0, 3)])) if rows * columns else (0, 0)
    spec = WeightSpec(
        shape,
        bits,
        Groups.parse(draw(GROUPS), (rows + extra[0], columns + extra[1])).block,
        draw(st.sampled_from(list(LevelForm))),
        draw(st.sampled_from(sorted(ITEMSIZE))),
        draw(st.sampled_from(dtypes)),
        "toy",
        extra,
        draw(st.booleans()),
        draw(st.integers(0, min(rows * columns, 4))),
    )
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    stored = (spec.groups.rows, spec.groups.columns) if any(extra) else shape
    codes = torch.from_numpy(rng.integers(0, 2**bits, stored, dtype=np.uint8))
    levels = torch.from_numpy(rng.normal(size=spec.levels_shape))
    levels = levels.to(getattr(torch, spec.levels_dtype)).to(getattr(torch, spec.dtype))
    origins = zero = None
    if any(extra):
        own = rows if extra[0] else columns
        origins = torch.from_numpy(rng.integers(0, own, sum(extra), dtype=np.int32))
    if spec.mask:
        zero = torch.from_numpy(rng.integers(0, 2, shape, dtype=np.uint8)).bool()
    added = None
    if spec.outliers:
        places = np.sort(rng.permutation(rows * columns)[: spec.outliers])
        values = torch.from_numpy(rng.normal(size=spec.outliers)).half().to(levels.dtype)
        added = torch.from_numpy(places), values
    return CodebookWeight.from_codes(spec, codes, levels, origins, zero, added), codes


@contextmanager
def scratch_file():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "weights.safetensors"


def example_tensors():
    """Three weights in codes, the first with seven spare bits, the third with corrections, and a bias."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(5, 7, generator=generator)
    second = torch.randn(4, 6, generator=generator)
    options = {"ratio": 0.5, "clip": "mse", "affine": True}
    third = Recipe("ocs", 2, "row", options, importance="E=1,P=0.2,mask", outliers=0.1)
    return {
        "third.weight": quantize_tensor(first, third),
        "first.weight": quantize_tensor(first, Recipe(scheme="linear", bits=3, groups="rows:2")),
        "second.weight": quantize_tensor(
            second, Recipe(scheme="lq", bits=4, groups="columns:4", levels_dtype="float16")
        ),
        "first.bias": torch.randn(5, generator=generator),
    }


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "model.safetensors"
    format.write(path, example_tensors())
    return path


def read_one(path):
    return format.read([path])


# the round trip --------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(weights())
def test_what_is_written_is_read_back_bit_for_bit_and_decodes_as_specified(made):
    weight, codes = made
    with scratch_file() as path:
        format.write(path, {"m.weight": weight, "m.bias": torch.arange(3.0)})
        back = format.read([path])
        by_hand = decode_by_hand(path, "m.weight")
    assert set(back) == {"m.weight", "m.bias"}
    assert isinstance(back["m.weight"], CodebookWeight)
    assert back["m.weight"].spec == weight.spec
    assert torch.equal(back["m.weight"].unpacked_codes(), codes)
    for part in weight.spec.parts:
        assert torch.equal(getattr(back["m.weight"], part), getattr(weight, part))
    assert torch.equal(back["m.bias"], torch.arange(3.0))
    np.testing.assert_array_equal(back["m.weight"].decode().numpy(), by_hand)


@settings(max_examples=60, deadline=None)
@given(weights(dtypes=("float16", "bfloat16")))
def test_half_precision_weights_come_back_in_their_own_dtype_with_equal_values(made):
    weight, codes = made
    with scratch_file() as path:
        format.write(path, {"w": weight})
        back = format.read([path])["w"]
    assert str(back.decode().dtype) == f"torch.{weight.spec.dtype}"
    assert torch.equal(back.unpacked_codes(), codes)
    assert torch.equal(back.decode(), weight.decode())


@settings(max_examples=80, deadline=None)
@given(weights())
def test_the_file_holds_what_the_formula_says_and_nothing_more(made):
    weight, _ = made
    spec = weight.spec
    with scratch_file() as path:
        format.write(path, {"w": weight})
        header, body = read_raw(path)
    rows, columns = prod(spec.shape[:-1]) + spec.extra[0], spec.shape[-1] + spec.extra[1]
    groups = ceil(rows / spec.block[0]) * ceil(columns / spec.block[1]) if rows * columns else 0
    expected = ceil(rows * columns * spec.bits / 8)
    assert header["w"] == {"dtype": "U8", "shape": [expected]} | {"data_offsets": header["w"]["data_offsets"]}
    expected += groups * WIDTH[spec.form](spec.bits) * ITEMSIZE[spec.levels_dtype] + 4 * sum(spec.extra)
    expected += ceil(prod(spec.shape) / 8) if spec.mask else 0
    expected += 4 * spec.outliers
    assert len(body) == expected == spec.nbytes == weight.nbytes


def test_plain_safetensors_reads_the_file_with_the_documented_keys_and_dtypes(packed):
    arrays = load_file(packed)
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "first.weight": ("uint8", (14,)),
        "first.weight_levels": ("float32", (3, 8)),
        "second.weight": ("uint8", (12,)),
        "second.weight_levels": ("float16", (8, 1)),
        "third.weight": ("uint8", (14,)),
        "third.weight_levels": ("float32", (5, 2)),
        "third.weight_origins": ("int32", (4,)),
        "third.weight_mask": ("uint8", (5,)),
        "third.weight_outliers": ("float16", (4,)),
        "third.weight_outlier_gaps": ("uint16", (4,)),
        "first.bias": ("float32", (5,)),
    }
    with safe_open(packed, "np") as file:
        metadata = file.metadata()
    assert set(metadata) == {"lexibit"}
    document = json.loads(metadata["lexibit"])
    assert set(document) == {"format", "weights", "checksums"}
    assert document["format"] == 3
    assert document["checksums"] == {
        name: hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest() for name, array in arrays.items()
    }
    assert document["weights"]["first.weight"] == {
        "shape": [5, 7],
        "bits": 3,
        "block": [2, 7],
        "form": "table",
        "levels_dtype": "float32",
        "dtype": "float32",
        "scheme": "linear",
        "extra": [0, 0],
        "mask": False,
        "outliers": 0,
    }
    assert document["weights"]["third.weight"]["extra"] == [0, 4]
    assert document["weights"]["third.weight"]["mask"] is True
    assert document["weights"]["third.weight"]["outliers"] == 4
    assert document["weights"]["second.weight"]["form"] == "symmetric"
    assert document["weights"]["second.weight"]["block"] == [1, 4]


def test_the_same_tensors_give_the_same_bytes_in_whatever_order_they_come(tmp_path, packed):
    again = tmp_path / "again.safetensors"
    format.write(again, dict(reversed(example_tensors().items())))
    assert again.read_bytes() == packed.read_bytes()


def test_a_file_without_weights_in_codes_is_read_as_plain_tensors(tmp_path):
    path = tmp_path / "float.safetensors"
    save_file({"w": torch.eye(3)}, path)
    assert format.read_index([path]) == {}
    assert torch.equal(format.read([path])["w"], torch.eye(3))


def test_the_shards_of_one_checkpoint_are_read_together(tmp_path):
    tensors = example_tensors()
    index = {name: value.spec for name, value in tensors.items() if isinstance(value, CodebookWeight)}
    stored = {"first.bias": tensors["first.bias"]}
    for name in index:
        stored |= tensors[name].tensors(name)
    names = sorted(stored)
    shards = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    # codes in one shard, levels in the other
    format.write_tensors(shards[0], {name: stored[name] for name in names[::2]}, index)
    format.write_tensors(shards[1], {name: stored[name] for name in names[1::2]}, index)
    back = format.read(shards)
    assert set(back) == set(tensors)
    for name in index:
        assert torch.equal(back[name].decode(), tensors[name].decode())


def test_a_plain_tensor_that_is_called_like_the_levels_is_refused_not_overwritten(tmp_path):
    weight = example_tensors()["first.weight"]
    for tensors in (
        {"w": weight, "w_levels": torch.ones(2)},
        {"w_levels": torch.ones(2), "w": weight},
    ):
        with pytest.raises(LexibitError, match="w_levels"):
            format.write(tmp_path / "clash.safetensors", tensors)


# older versions --------------------------------------------------------------------------------------


def golden(shape, bits, groups, form, levels_dtype, dtype, extra=(0, 0), mask=False, outliers=0):
    """The weights in the golden files: codes and levels that count through their values."""
    stored = (shape[0] + extra[0], shape[1] + extra[1]) if any(extra) else shape
    block = Groups.parse(groups, stored).block
    spec = WeightSpec(
        shape, bits, block, LevelForm(form), levels_dtype, dtype, "golden", extra, mask, outliers
    )
    codes = (torch.arange(prod(stored)) * 7 % 2**bits).to(torch.uint8).view(stored)
    levels = ((torch.arange(prod(spec.levels_shape)) * 5 % 11 - 5) / 8).view(spec.levels_shape)
    levels = levels.to(getattr(torch, dtype))
    origins = (torch.arange(sum(extra)) * 3 % shape[0 if extra[0] else 1]).int() if any(extra) else None
    zero = torch.arange(prod(shape)).view(shape) % 3 == 0 if mask else None
    added = (torch.arange(outliers) * 5 + 1, (torch.arange(outliers) - 2.5) / 4) if outliers else None
    return CodebookWeight.from_codes(spec, codes, levels, origins, zero, added)


GOLDEN_WEIGHTS = {
    1: {
        "table.weight": golden((5, 7), 3, "rows:2", "table", "float32", "float32"),
        "uniform.weight": golden((4, 6), 4, "columns:4", "uniform", "float16", "float32"),
        "binary.weight": golden((3, 4, 5), 2, "row", "binary", "bfloat16", "bfloat16"),
    },
    2: {
        "table.weight": golden((5, 7), 3, "rows:2", "table", "float32", "float32"),
        "symmetric.weight": golden((4, 6), 4, "columns:4", "symmetric", "float16", "float32"),
        "affine.weight": golden((3, 4, 5), 2, "row", "affine", "bfloat16", "bfloat16"),
        "split.weight": golden((4, 5), 3, "row", "affine", "float16", "float32", (0, 2)),
        "stretched.weight": golden((4, 5), 2, "matrix", "table", "float32", "float32", (3, 0)),
        "masked.weight": golden((3, 7), 1, "row", "binary", "float32", "float32", mask=True),
    },
    3: {
        "table.weight": golden((5, 7), 3, "rows:2", "table", "float32", "float32"),
        "split.weight": golden((4, 5), 3, "row", "affine", "float16", "float32", (0, 2), outliers=3),
        "masked.weight": golden((3, 7), 1, "row", "binary", "bfloat16", "bfloat16", mask=True, outliers=4),
    },
}


@pytest.mark.parametrize("version", GOLDEN_WEIGHTS)
def test_a_file_of_every_version_is_read_as_it_was_written(version):
    found = read_one(GOLDEN / f"format-{version}.safetensors")
    expected = GOLDEN_WEIGHTS[version]
    assert set(found) == {*expected, "bias"}
    assert torch.equal(found["bias"], torch.arange(5) / 4)
    for name, weight in expected.items():
        assert found[name].spec == weight.spec
        for part in weight.spec.parts:
            assert torch.equal(getattr(found[name], part), getattr(weight, part))
        assert torch.equal(found[name].decode(), weight.decode())


def test_the_newest_golden_file_is_what_is_written(tmp_path):
    path = tmp_path / "new.safetensors"
    format.write(path, GOLDEN_WEIGHTS[format.VERSION] | {"bias": torch.arange(5) / 4})
    assert path.read_bytes() == (GOLDEN / f"format-{format.VERSION}.safetensors").read_bytes()


def test_a_record_of_version_1_has_nothing_of_version_2(tmp_path):
    path = tmp_path / "old.safetensors"
    for changes, said in (
        ({"extra": [0, 0]}, "extra"),
        ({"mask": False}, "mask"),
        ({"outliers": 0}, "outliers"),
        ({"form": "symmetric"}, "form"),
        ({"form": "affine"}, "form"),
    ):
        path.write_bytes((GOLDEN / "format-1.safetensors").read_bytes())
        change_index(path, lambda document, new=changes: document["weights"]["table.weight"].update(new))
        refused(path, "table.weight", said)


# the schema ------------------------------------------------------------------------------------------


@pytest.fixture
def schema():
    if not SCHEMA.is_file():
        pytest.skip("docs/format.schema.json is not there")
    document = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


def document_of(path):
    return json.loads(read_raw(path)[0]["__metadata__"]["lexibit"])


def test_the_index_follows_the_published_schema(schema, packed):
    document = document_of(packed)
    assert len(document["weights"]) == 3
    schema.validate(document)


# Records that are wrong by themselves: (changes, what the message must say). None removes a field.
BAD_RECORDS = [
    *[({field: None}, field) for field in FIELDS],
    ({"colour": "red"}, "colour"),
    *[({"bits": bits}, "bits") for bits in (0, 9, -1, True, "3", 3.0, [3])],
    *[({"shape": shape}, "shape") for shape in ([], [35], [-5, 7], [1] * 9, "5x7", [5.0, 7], [True, 7], {})],
    *[({"block": block}, "block") for block in ([2], [2, 7, 1], [0, 7], [2, 0], [-2, 7], "row", 2)],
    *[({"form": form}, "form") for form in ("Table", "", 1, ["table"], {})],
    *[({"levels_dtype": dtype}, "levels_dtype") for dtype in ("float64", "int8", 4, ["float32"])],
    *[({"dtype": dtype}, "dtype") for dtype in ("complex64", "int8", 4, ["float32"])],
    ({"scheme": 1}, "scheme"),
    *[({"extra": extra}, "extra") for extra in ([1, 1], [0], [0, -1], [0, 1.5], [True, 0], 0, "none", {})],
    *[({"mask": mask}, "mask") for mask in (0, 1, "yes", [], {})],
]
# Records that are wrong only when one does the sums.
UNFIT_RECORDS = [
    ({"shape": [2**21, 2**20]}, "shape"),
    ({"shape": [2**63, 2**63]}, "shape"),
    ({"block": [6, 7]}, "block"),
    ({"block": [2, 8]}, "block"),
    ({"block": [2, 3]}, "block"),
    ({"extra": [2**40, 0]}, "extra"),
    ({"extra": [0, 2**70]}, "extra"),
]


# to JSON schema 3.0 is a whole number
NOT_IN_SCHEMA = ({"bits": 3.0}, {"shape": [5.0, 7]})


@pytest.mark.parametrize(
    "changes", [changes for changes, _ in BAD_RECORDS if changes not in NOT_IN_SCHEMA], ids=str
)
def test_the_schema_refuses_every_record_that_is_wrong_by_itself(schema, packed, changes):
    document = document_of(packed)
    change_record(document, changes)
    assert not schema.is_valid(document)


def change_record(document, changes):
    record = document["weights"]["first.weight"]
    record.update(changes)
    for field in [field for field, value in changes.items() if value is None]:
        del record[field]


# tampering -------------------------------------------------------------------------------------------


def change_index(path, change):
    """Apply ``change`` to the index in a file's header."""
    header, body = read_raw(path)
    document = json.loads(header["__metadata__"]["lexibit"])
    document = change(document) or document
    header["__metadata__"]["lexibit"] = document if isinstance(document, str) else json.dumps(document)
    write_raw(path, header, body)


def change_tensors(path, change):
    """Apply ``change`` to a file's tensors and keep its metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def refused(paths, *said):
    """Reading must fail with a FormatError that says all of ``said``, and a remedy."""
    paths = [paths] if isinstance(paths, Path) else paths
    with pytest.raises(FormatError) as caught:
        format.read(paths)
    message = str(caught.value)
    for text in said:
        assert text in message
    assert re.search(r"copy|download|install|restore|write .* again|quantize .* again", message), (
        f"no remedy: {message}"
    )
    return message


@settings(max_examples=80, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(share):
    with scratch_file() as path:
        format.write(path, example_tensors())
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        refused(path, str(path))
        with pytest.raises(FormatError):
            format.read_index([path])


def test_a_file_with_bytes_behind_its_end_is_refused(packed):
    packed.write_bytes(packed.read_bytes() + b"\0")
    refused(packed, str(packed))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_byte_in_the_header_is_refused_or_harmless(data):
    original = example_tensors()
    with scratch_file() as path:
        format.write(path, original)
        content = bytearray(path.read_bytes())
        end = 8 + struct.unpack("<Q", content[:8])[0]
        content[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            back = format.read([path])
        except FormatError:
            return
    for name, weight in original.items():
        found = back.get(name)
        if isinstance(weight, CodebookWeight) and isinstance(found, CodebookWeight):
            assert torch.equal(found.unpacked_codes().view(-1), weight.unpacked_codes().view(-1))
            assert torch.equal(found.levels, weight.levels)


def test_missing_codes_are_refused(packed):
    change_tensors(packed, lambda tensors: tensors.pop("first.weight"))
    refused(packed, "first.weight", "missing", str(packed.parent))


def test_missing_levels_are_refused(packed):
    change_tensors(packed, lambda tensors: tensors.pop("second.weight_levels"))
    refused(packed, "second.weight_levels", "missing", str(packed.parent))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_codes_of_another_dtype_are_refused(packed, dtype):
    change_tensors(packed, lambda tensors: tensors.update({"first.weight": torch.zeros(14, dtype=dtype)}))
    refused(packed, "first.weight", str(packed), "U8")


@pytest.mark.parametrize("shape", [(13,), (15,), (2, 7), (0,)])
def test_codes_of_another_shape_are_refused(packed, shape):
    codes = torch.zeros(shape, dtype=torch.uint8)
    change_tensors(packed, lambda tensors: tensors.update({"first.weight": codes}))
    refused(packed, "first.weight", str(packed), str(list(shape)))


@pytest.mark.parametrize(
    "levels", [torch.ones(3, 7), torch.ones(24), torch.ones(8, 3), torch.ones(3, 8, dtype=torch.float64)]
)
def test_levels_of_another_shape_or_dtype_are_refused(packed, levels):
    change_tensors(packed, lambda tensors: tensors.update({"first.weight_levels": levels}))
    refused(packed, "first.weight_levels", str(packed), str(list(levels.shape)))


@pytest.mark.parametrize("version", [0, 4, 1.5, "1", None, True, [1]])
def test_another_format_version_is_refused(packed, version):
    change_index(packed, lambda document: document.update(format=version))
    assert "install" in refused(packed, str(packed), "version", repr(version))


def test_an_index_without_a_version_is_refused(packed):
    change_index(packed, lambda document: document.pop("format") and None)
    refused(packed, str(packed), "version")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "1", '{"format": 1}', '{"format": 1, "weights": []}', "[" * 100_000, "\ud800"],
    ids=lambda text: repr(text[:30]),
)
def test_an_index_that_is_no_record_of_weights_is_refused(packed, text):
    change_index(packed, lambda document: json.dumps(text)[1:-1] if "\ud800" in text else text or " ")
    refused(packed, str(packed), "index")


@pytest.mark.parametrize("record", [None, 3, [], "linear"])
def test_a_record_that_is_no_object_is_refused(packed, record):
    change_index(packed, lambda document: document["weights"].update({"first.weight": record}))
    refused(packed, str(packed), "first.weight", "missing")


@pytest.mark.parametrize(("changes", "said"), [*BAD_RECORDS, *UNFIT_RECORDS], ids=str)
def test_a_wrong_record_is_refused(packed, changes, said):
    change_index(packed, lambda document: change_record(document, changes))
    refused(packed, str(packed), "first.weight", said)


def test_an_axis_that_no_tensor_can_have_is_refused_in_an_empty_weight_too(tmp_path):
    path = tmp_path / "empty.safetensors"
    format.write(path, {"first.weight": quantize_tensor(torch.empty(0, 7), Recipe(scheme="linear"))})
    assert read_one(path)["first.weight"].decode().shape == (0, 7)
    change_index(path, lambda document: change_record(document, {"shape": [0, 2**70]}))
    refused(path, str(path), "first.weight", "shape")


def test_an_index_with_weights_that_are_not_in_the_file_is_refused(packed):
    def add(document):
        document["weights"]["fourth.weight"] = document["weights"]["first.weight"]

    change_index(packed, add)
    refused(packed, "fourth.weight", "missing", str(packed.parent))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_levels_that_are_not_finite_are_refused(packed, value):
    change_tensors(packed, lambda tensors: tensors["second.weight_levels"][3, 0].fill_(value))
    refused(packed, "second.weight", "levels")


@pytest.mark.parametrize("bit", range(1, 8))
def test_bits_set_behind_the_last_code_are_refused(packed, bit):
    def change(tensors):
        tensors["first.weight"][-1] |= 1 << bit  # of 8 bits of the last byte, the codes use one

    change_tensors(packed, change)
    refused(packed, "first.weight", "last code")


@pytest.mark.parametrize("bit", range(3, 8))
def test_bits_set_behind_the_end_of_a_mask_are_refused(packed, bit):
    def change(tensors):
        tensors["third.weight_mask"][-1] |= 1 << bit  # of 8 bits of the last byte, the mask uses three

    change_tensors(packed, change)
    refused(packed, "third.weight", "mask")


@pytest.mark.parametrize("origin", [-1, 7, 2**31 - 1])
def test_an_origin_that_the_weight_does_not_have_is_refused(packed, origin):
    change_tensors(packed, lambda tensors: tensors["third.weight_origins"][2].fill_(origin))
    refused(packed, "third.weight", "origins", "0 to 6")


@pytest.mark.parametrize("part", ["origins", "mask"])
def test_a_missing_correction_is_refused(packed, part):
    change_tensors(packed, lambda tensors: tensors.pop(f"third.weight_{part}"))
    refused(packed, f"third.weight_{part}", "missing")


def test_a_tensor_that_two_weights_claim_is_refused(tmp_path):
    # the mask of an 8 x 8 weight, and the codes of another in one bit, are both 8 bytes
    w, path = torch.randn(8, 8), tmp_path / "model.safetensors"
    format.write(path, {"x": quantize_tensor(w, Recipe("kmeans", 1, importance="P=0.1,mask"))})

    def claim(document):
        document["weights"]["x_mask"] = document["weights"]["x"] | {"mask": False}

    change_tensors(path, lambda tensors: tensors.update({"x_mask_levels": tensors["x_levels"].clone()}))
    change_index(path, claim)
    refused(path, "x_mask", "a part of x and of x_mask")


def two_shards(tmp_path):
    tensors = example_tensors()
    shards = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    format.write(shards[0], {"first.weight": tensors["first.weight"]})
    format.write(shards[1], {name: tensors[name] for name in ("second.weight", "first.bias")})
    return shards


def test_shards_whose_indexes_disagree_are_refused(tmp_path):
    shards = two_shards(tmp_path)
    assert set(format.read(shards)) == {"first.weight", "second.weight", "first.bias"}
    record = document_of(shards[0])["weights"]["first.weight"] | {"bits": 2}
    change_index(shards[1], lambda document: document["weights"].update({"first.weight": record}))
    refused(shards, "first.weight", str(shards[1]))


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path):
    shards = two_shards(tmp_path)
    save_file({"first.bias": torch.zeros(5)}, tmp_path / "3.safetensors")
    refused([*shards, tmp_path / "3.safetensors"], "first.bias", str(shards[1]), "3.safetensors")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FIELDS),
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 10) | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    ),
)
def test_any_json_in_any_field_is_read_or_refused_as_a_fault_of_the_file(field, value):
    original = example_tensors()["first.weight"]
    with scratch_file() as path:
        format.write(path, {"first.weight": original})
        change_index(path, lambda document: document["weights"]["first.weight"].update({field: value}))
        try:
            found = format.read([path])["first.weight"]
        except FormatError:
            return
    # what is read is what the file says: any scheme's name, or another dtype that exists
    assert getattr(found.spec, field) == (tuple(value) if isinstance(value, list) else value)
    assert found.codes.shape == original.codes.shape
    assert found.levels.shape == original.levels.shape
