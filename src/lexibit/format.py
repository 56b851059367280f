"""The stored form on disk, read and written as docs/format.md specifies it.

A file is an ordinary safetensors file. The packed codes of a weight stand under the weight's own name,
its other parts beside them, and the header's metadata says under the key ``lexibit`` how to decode them.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lexibit.config import LEVELS_DTYPES
from lexibit.errors import FormatError
from lexibit.groups import matrix_shape
from lexibit.levels import LevelForm
from lexibit.packing import MAX_BITS, MIN_BITS, unpack_places
from lexibit.weight import COMPUTED, CodebookWeight, WeightSpec

KEY = "lexibit"
VERSION = 3

# Limits of the format, each far above any model and far below harm.
MAX_AXES = 8
MAX_WEIGHTS = 1 << 40  # in one tensor
MAX_INDEX = 1 << 26  # bytes of the index as JSON
MAX_OBJECTS = 1 << 21  # lists and objects in it: more than the records that fit into it have
MAX_HEADER = 100_000_000  # bytes; of safetensors itself
MAX_NAME = 1000  # characters
DTYPES = ("float64", *LEVELS_DTYPES)
_DAMAGED = "the file was changed or damaged, copy or download it again"
_FIELDS_1 = {"shape", "bits", "block", "form", "levels_dtype", "dtype", "scheme"}
_FORMS_1 = [LevelForm.TABLE, LevelForm.UNIFORM, LevelForm.BINARY]
_FIELDS_2 = _FIELDS_1 | {"extra", "mask"}
# what a record holds and what forms its levels may have, by version
_FIELDS = {1: _FIELDS_1, 2: _FIELDS_2, 3: _FIELDS_2 | {"outliers"}}
_KEYS = {1: {"format", "weights"}, 2: {"format", "weights"}, 3: {"format", "weights", "checksums"}}
_CHECKSUM = re.compile("[0-9a-f]{32}")
_FORMS = {1: _FORMS_1, 2: list(LevelForm), 3: list(LevelForm)}

# The floating-point dtypes of safetensors files that can be quantized.
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SAFETENSORS = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.int32: "I32",
}

Index = dict[str, WeightSpec]


def metadata(index: Mapping[str, WeightSpec], checksums: Mapping[str, str]) -> dict[str, str]:
    """What the header of a file says of its quantized weights, and of the bytes of all tensors."""
    document = {
        "format": VERSION,
        "weights": {name: spec.to_dict() for name, spec in index.items()},
        "checksums": dict(checksums),
    }
    return {KEY: json.dumps(document, sort_keys=True)}


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The checksum of each tensor."""
    return {name: checksum(tensor) for name, tensor in tensors.items()}


def checksum(tensor: Tensor) -> str:
    """BLAKE2b of a tensor's bytes as they stand in a file, 16 bytes in hexadecimal digits."""
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().data, digest_size=16).hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor | CodebookWeight]) -> None:
    """Write plain tensors and weights in codes to one safetensors file."""
    index: Index = {}
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        stored = value.tensors(name) if isinstance(value, CodebookWeight) else {name: value}
        if isinstance(value, CodebookWeight):
            index[name] = value.spec
        for key in stored.keys() & plain.keys():
            raise FormatError(f"{path}: two tensors would be stored as {key}: rename one")
        plain |= stored
    write_tensors(path, plain, index)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], index: Index) -> None:
    """Write tensors of which some are the parts of the weights that ``index`` tells of."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=metadata(index, checksums(contiguous)))


def read(paths: Iterable[Path]) -> dict[str, Tensor | CodebookWeight]:
    """All tensors of the files of one checkpoint, its quantized weights as such.

    Raises:
        FormatError: a file that is not what the format says.
    """
    paths = list(paths)
    index = read_index(paths)
    plain: dict[str, Tensor] = {}
    places: dict[str, Path] = {}
    for path in paths:
        with open_file(path) as file:
            plain |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            places |= dict.fromkeys(file.keys(), path)
    weights = {}
    for name, spec in index.items():
        parts = {part: plain.pop(key) for part, key in spec.keys(name).items()}
        weights[name] = _in_own_dtype(places[name], name, spec, parts)
    return plain | weights


def read_weight(name: str, spec: WeightSpec, places: Mapping[str, Path]) -> CodebookWeight:
    """One weight of a checkpoint whose headers were read, from the files that its tensors are in.

    Raises:
        FormatError: as :func:`assemble`.
    """
    parts = {}
    for part, key in spec.keys(name).items():
        with open_file(places[key]) as file:
            parts[part] = file.get_tensor(key)
    return _in_own_dtype(places[name], name, spec, parts)


def _in_own_dtype(where: Path, name: str, spec: WeightSpec, parts: dict[str, Tensor]) -> CodebookWeight:
    for part in COMPUTED & parts.keys():
        parts[part] = parts[part].to(getattr(torch, spec.dtype))
    return assemble(where, name, spec, parts)


def assemble(where: Path, name: str, spec: WeightSpec, parts: Mapping[str, Tensor]) -> CodebookWeight:
    """A weight from its parts, loaded from ``where``, checked for what a header cannot show.

    Raises:
        FormatError: levels or outliers that are not finite, bits set behind the last code or the end of the
            mask, or origins or outliers behind the end of the weight.
    """

    def refuse(fault: str) -> FormatError:
        return FormatError(f"{where}: {name}: {fault}: {_DAMAGED}")

    for part in COMPUTED & parts.keys():
        if not parts[part].isfinite().all():
            raise refuse(f"some of its {part} are NaN or infinite")
    groups = spec.groups
    if _bits_behind(parts["codes"], groups.rows * groups.columns * spec.bits):
        raise refuse("bits are set behind its last code")
    if spec.mask and _bits_behind(parts["mask"], prod(spec.shape)):
        raise refuse("bits are set behind the end of its mask")
    if any(spec.extra):
        own = matrix_shape(spec.shape)[0 if spec.extra[0] else 1]
        low, high = parts["origins"].aminmax()
        if not 0 <= int(low) <= int(high) < own:
            raise refuse(f"its origins, {int(low)} to {int(high)}, are not all from 0 to {own - 1}")
    if spec.outliers and (last := int(unpack_places(parts["gaps"])[-1])) >= prod(spec.shape):
        raise refuse(f"its last outlier is weight {last} of {prod(spec.shape)}")
    return CodebookWeight(spec, **parts)


def _bits_behind(packed: Tensor, count: int) -> bool:
    """Whether any bit behind the first ``count`` of a packed stream is set."""
    spare = -count % 8
    return bool(spare) and bool(int(packed[-1]) >> (8 - spare))


@contextmanager
def open_file(path: Path) -> Any:
    """A safetensors file, its faults told as ours.

    Raises:
        FormatError: it is no file, cannot be read, or is no whole safetensors file.
    """
    if not path.is_file():  # to open a pipe would wait for whoever writes to it
        raise FormatError(f"{path}: no such file, or something else than a file: {_DAMAGED}")
    try:
        opened = safe_open(path, framework="pt")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error}): see who may read it") from error
    except SafetensorError as error:
        raise _not_whole(path, error) from error
    with opened as file:
        try:
            yield file
        except SafetensorError as error:
            raise _not_whole(path, error) from error


def _not_whole(path: Path, error: SafetensorError) -> FormatError:
    return FormatError(f"{path}: not a whole safetensors file ({str(error)[:200]}): {_DAMAGED}")


def read_index(paths: Iterable[Path]) -> Index:
    """The quantized weights that the files of one checkpoint hold together; empty if none.

    The index is checked against the headers: every tensor it needs is there, in the dtype and shape that
    the format asks for, and so is every other tensor that was written. No tensor is read.

    Raises:
        FormatError: names the file, the tensor, the fault and the remedy.
    """
    return read_headers(paths)[0]


def read_checksums(paths: Iterable[Path]) -> dict[str, str]:
    """The checksums of all tensors of a checkpoint, by name; none in files of format version 1 or 2.

    Raises:
        FormatError: as :func:`read_index`.
    """
    return read_headers(paths)[1]


def read_headers(paths: Iterable[Path]) -> tuple[Index, dict[str, str]]:
    """What :func:`read_index` and :func:`read_checksums` give, in one go.

    Raises:
        FormatError: as :func:`read_index`.
    """
    index: Index = {}
    noted: dict[str, str] = {}
    source: dict[str, Path] = {}
    found: dict[str, tuple[Path, str, list[int]]] = {}
    for path in paths:
        with open_file(path) as file:
            _check_names(path)
            document = _document(path, file)
            for name, spec in _parse_index(path, document).items():
                source[name] = path
                if index.setdefault(name, spec) != spec:
                    raise _contradiction(path, name)
            for name, one in document.get("checksums", {}).items():
                source.setdefault(name, path)
                if noted.setdefault(name, one) != one:
                    raise _contradiction(path, name)
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if name in found:
                    raise FormatError(
                        f"{path}: the tensor {name} is also in {found[name][0]}: copy the files of one "
                        "checkpoint only"
                    )
                found[name] = (path, part.get_dtype(), part.get_shape())
    owners: dict[str, str] = {}
    for name, spec in index.items():
        for part, key in spec.keys(name).items():
            if owners.setdefault(key, name) != name:
                both = f"a part of {owners[key]} and of {name}"
                raise FormatError(f"{source[name]}: the tensor {key} would be {both}: {_DAMAGED}")
            dtype, shape = spec.parts[part]
            _check_tensor(source[name], found, key, _SAFETENSORS[dtype], shape)
    stored = {noted[name] for name in found.keys() & noted.keys()}
    for name, one in noted.items():
        # of tensors that are the same one is stored
        if name not in found and one not in stored:
            raise _missing(source[name], name)
    return index, noted


def _check_tensor(
    source: Path, found: dict[str, tuple[Path, str, list[int]]], name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    if name not in found:
        raise _missing(source, name)
    path, its_dtype, its_shape = found[name]
    if its_dtype != dtype or tuple(its_shape) != shape:
        raise FormatError(
            f"{path}: the tensor {name} is {its_dtype} {its_shape}, its index says {dtype} "
            f"{list(shape)}: {_DAMAGED}"
        )


def _missing(path: Path, name: str) -> FormatError:
    return FormatError(f"{path}: the tensor {name}, which its index lists, is missing: {_DAMAGED}")


def _contradiction(path: Path, name: str) -> FormatError:
    return FormatError(f"{path}: says of {name} something else than another file does: {_DAMAGED}")


def _document(path: Path, file: Any) -> dict[str, Any]:
    """What the header of an open file says, of a version that is known; nothing if it says nothing.

    Raises:
        FormatError: it is no document of such a version.
    """
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        return {}
    if (size := len(text.encode())) > MAX_INDEX:
        raise FormatError(f"{path}: its index has {size} bytes, the limit is {MAX_INDEX}: {_DAMAGED}")
    if text.count("{") + text.count("[") > MAX_OBJECTS:
        # which would take many times the memory that the text takes
        raise FormatError(f"{path}: its index has more than {MAX_OBJECTS} lists and objects: {_DAMAGED}")
    document = _parse(path, "index", text, dict)
    version = document.get("format") if isinstance(document, dict) else None
    if not _counts([version]) or version not in _FIELDS:
        raise FormatError(
            f"{path}: format version {reprlib.repr(version)}, this lexibit reads 1 to {VERSION}: "
            "install the lexibit that wrote it, or a later one"
        )
    if set(document) != _KEYS[version] or not isinstance(document["weights"], dict):
        raise FormatError(f"{path}: its index is no record of weights: {_DAMAGED}")
    listed = document.get("checksums", {})
    if not isinstance(listed, dict) or not all(
        isinstance(one, str) and _CHECKSUM.fullmatch(one) for one in listed.values()
    ):
        raise FormatError(f"{path}: its checksums are none: {_DAMAGED}")
    if (
        bad := next((name for name in (*document["weights"], *listed) if not _readable(name)), None)
    ) is not None:
        raise _unreadable(path, bad)
    known: dict[str, Any] = document
    return known


def _parse(path: Path, what: str, text: str | bytes, made: Callable[[list[tuple[str, Any]]], Any]) -> Any:
    """JSON, of each object what is ``made`` of its pairs; no object may say anything twice."""

    def once(pairs: list[tuple[str, Any]]) -> Any:
        names = set()
        for name, _ in pairs:
            if name in names:
                raise ValueError(f"{reprlib.repr(name)} stands twice in one object")
            names.add(name)
        return made(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: its {what} is not JSON ({str(error)[:200]}): {_DAMAGED}") from None


def _check_names(path: Path) -> None:
    """Check the names in the header of a file that was opened: safetensors takes the last of two."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, MAX_HEADER))

    def names(pairs: list[tuple[str, Any]]) -> None:
        for name, _ in pairs:
            if not _readable(name):
                raise _unreadable(path, name)

    _parse(path, "header", text, names)


def _readable(name: str) -> bool:
    """Whether a message can show a name: it has no line breaks, say, and no commands for a terminal."""
    return len(name) <= MAX_NAME and name.isprintable()


def _unreadable(path: Path, name: str) -> FormatError:
    return FormatError(
        f"{path}: the name {reprlib.repr(name)} is not {MAX_NAME} characters at most that can be shown: "
        f"{_DAMAGED}"
    )


def _parse_index(path: Path, document: dict[str, Any]) -> Index:
    items = document.get("weights", {}).items()
    return {name: _parse_spec(path, document["format"], name, item) for name, item in items}


def _parse_spec(path: Path, version: int, name: str, item: Any) -> WeightSpec:
    def refuse(fault: str) -> FormatError:
        return FormatError(f"{path}: index of {name}: {fault}: {_DAMAGED}")

    show = reprlib.repr  # of whatever may stand there

    known = _FIELDS[version]
    if not isinstance(item, dict) or (fields := set(item)) != known:
        fields = set(item) if isinstance(item, dict) else set()
        missing, surplus = sorted(known - fields), sorted(fields - known)
        raise refuse(f"fields missing: {missing}, not in format version {version}: {show(surplus)}")
    shape, bits, block = item["shape"], item["bits"], item["block"]
    extra, mask, outliers = item.get("extra", [0, 0]), item.get("mask", False), item.get("outliers", 0)
    if (
        not _counts(shape)
        or not 2 <= len(shape) <= MAX_AXES
        or prod(max(axis, 1) for axis in shape) > MAX_WEIGHTS
    ):
        raise refuse(f"shape {show(shape)} is not 2 to {MAX_AXES} axes of at most 2^40 weights")
    if not _counts([bits]) or not MIN_BITS <= bits <= MAX_BITS:
        raise refuse(f"bits {show(bits)} are not {MIN_BITS} to {MAX_BITS}")
    rows, columns = matrix_shape(tuple(shape))
    if not (
        _counts(extra)
        and len(extra) == 2
        and 0 in extra
        and (extra == [0, 0] or rows * columns)
        and (rows + extra[0]) * (columns + extra[1]) <= MAX_WEIGHTS
    ):
        raise refuse(f"extra {show(extra)} is no number of rows or columns behind those of {shape}")
    if not isinstance(mask, bool):
        raise refuse(f"mask {show(mask)} is neither true nor false")
    if not _counts([outliers]) or outliers > rows * columns:
        raise refuse(f"outliers {show(outliers)} are not 0 to {rows * columns}, the number of its weights")
    rows, columns = max(rows + extra[0], 1), max(columns + extra[1], 1)
    if not (
        _counts(block)
        and len(block) == 2
        and 1 <= block[0] <= rows
        and 1 <= block[1] <= columns
        and (block[0] == 1 or block[1] == columns)
    ):
        raise refuse(f"block {show(block)} is neither whole rows nor a run in a row of {shape}")
    if item["form"] not in _FORMS[version]:
        raise refuse(f"form {show(item['form'])} is not one of {[form.value for form in _FORMS[version]]}")
    if item["levels_dtype"] not in LEVELS_DTYPES:
        raise refuse(f"levels_dtype {show(item['levels_dtype'])} is not one of {list(LEVELS_DTYPES)}")
    if item["dtype"] not in DTYPES:
        raise refuse(f"dtype {show(item['dtype'])} is not one of {list(DTYPES)}")
    if not isinstance(item["scheme"], str) or not _readable(item["scheme"]):
        raise refuse(f"scheme {show(item['scheme'])} is not a name")
    return WeightSpec(
        tuple(shape),
        bits,
        (block[0], block[1]),
        LevelForm(item["form"]),
        item["levels_dtype"],
        item["dtype"],
        item["scheme"],
        (extra[0], extra[1]),
        mask,
        outliers,
    )


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )
