"""Makes the files of this folder: what a stranger could send, each one change away from a sound file.

    python tests/attacks/make.py

The name of a file says what is wrong with it.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lexibit import Recipe, format, quantize_tensor

FOLDER = Path(__file__).parent
NAME = "layer.weight"
Header = dict[str, Any]


def sound() -> tuple[Header, bytes]:
    """The header and the data of a file with a weight that has every part, and a bias."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 11, generator=generator)
    tensors = {
        NAME: quantize_tensor(matrix, Recipe("ocs", 3, "row", {"ratio": 0.2})),
        "pruned.weight": quantize_tensor(
            matrix, Recipe("kmeans", 3, importance="E=1,C=1,P=0.1,mask", outliers=0.05)
        ),
        "layer.bias": torch.arange(6.0),
    }
    path = FOLDER / "sound.safetensors"
    format.write(path, tensors)
    data = path.read_bytes()
    path.unlink()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def framed(header: Header | bytes, data: bytes) -> bytes:
    """A file of a header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_index(change: Callable[[Any], Any]) -> Callable[[Header, bytes], bytes]:
    """A change of the index, in place, or to what it gives."""

    def work(header: Header, data: bytes) -> bytes:
        index = json.loads(header["__metadata__"]["lexibit"])
        given = change(index)
        text = given if isinstance(given, str) else json.dumps(index if given is None else given)
        header["__metadata__"]["lexibit"] = text
        return framed(header, data)

    return work


def field(name: str, value: Any, weight: str = NAME) -> Callable[[Header, bytes], bytes]:
    """Another value in one field of a weight's record."""
    return with_index(lambda index: index["weights"][weight].__setitem__(name, value))


def entry(name: str, **values: Any) -> Callable[[Header, bytes], bytes]:
    """Other values in a tensor's entry of the header."""

    def work(header: Header, data: bytes) -> bytes:
        header[name] |= values
        return framed(header, data)

    return work


def bytes_of(name: str, content: bytes, at: int = 0) -> Callable[[Header, bytes], bytes]:
    """Other bytes in a tensor, at a place of it; from its end if that is negative."""

    def work(header: Header, data: bytes) -> bytes:
        begin, end = header[name]["data_offsets"]
        place = (begin if at >= 0 else end) + at
        return framed(header, data[:place] + content + data[place + len(content) :])

    return work


def without(name: str) -> Callable[[Header, bytes], bytes]:
    """The header without a tensor, whose bytes another one gets."""

    def work(header: Header, data: bytes) -> bytes:
        begin, end = header.pop(name)["data_offsets"]
        header["other"] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        return framed(header, data)

    return work


def swapped(name: str, width: int) -> Callable[[Header, bytes], bytes]:
    """A tensor's numbers with their bytes the other way round."""

    def work(header: Header, data: bytes) -> bytes:
        begin, end = header[name]["data_offsets"]
        turned = b"".join(data[at : at + width][::-1] for at in range(begin, end, width))
        return framed(header, data[:begin] + turned + data[end:])

    return work


def twice(header: Header, data: bytes) -> bytes:
    """A header that lists a tensor twice."""
    text = json.dumps(header, separators=(",", ":"))
    bias = json.dumps(header["layer.bias"], separators=(",", ":"))
    return framed((text[:-1] + f',"layer.bias":{bias}}}').encode(), data)


def called(name: str) -> Callable[[Header, bytes], bytes]:
    """The bias under another name."""

    def work(header: Header, data: bytes) -> bytes:
        header[name] = header.pop("layer.bias")
        return framed(header, data)

    return work


def overlapping(header: Header, data: bytes) -> bytes:
    """The bias lies in the codes."""
    begin, _ = header[NAME]["data_offsets"]
    header["layer.bias"]["data_offsets"] = [begin, begin + 24]
    return framed(header, data)


def claimed_twice(index: Any) -> None:
    """A second weight whose codes would be the levels of the first."""
    index["weights"]["layer.weight_levels"] = copy.deepcopy(index["weights"][NAME])


def terabytes(index: Any) -> None:
    """A weight of a terabyte that the file does not hold."""
    index["weights"][NAME] |= {"shape": [1 << 20, 1 << 20], "extra": [0, 0], "block": [1, 1 << 20]}


TERA = 1 << 40
ATTACKS: dict[str, Callable[[Header, bytes], bytes]] = {
    "empty": lambda header, data: b"",
    "header-of-exabytes": lambda header, data: struct.pack("<Q", 1 << 62) + b"{}",
    "header-longer-than-the-file": lambda header, data: struct.pack("<Q", 5000) + b"{}",
    "header-not-json": lambda header, data: framed(b"{" * 50, data),
    "header-deep": lambda header, data: framed(b'{"a":' * 3000 + b"1" + b"}" * 3000, data),
    "header-not-utf8": lambda header, data: framed(b'{"\xff\xfe": 1}', data),
    "data-cut": lambda header, data: framed(header, data[:-1]),
    "data-too-long": lambda header, data: framed(header, data + b"\0"),
    "tensor-twice": twice,
    "tensors-overlap": overlapping,
    "name-with-commands-for-a-terminal": called("\x1b]0;mine\x07bias"),
    "name-of-kilobytes": called("b" * 2000),
    "offsets-behind-the-end": entry("layer.bias", data_offsets=[TERA, TERA + 24]),
    "offsets-backwards": entry("layer.bias", data_offsets=[24, 0]),
    "shape-of-exabytes": entry("layer.bias", shape=[TERA, TERA]),
    "shape-that-wraps-around": entry("layer.bias", shape=[1 << 63, 2]),
    "dtype-unknown": entry("layer.bias", dtype="F8_E9M9"),
    "codes-missing": without(NAME),
    "levels-missing": without(NAME + "_levels"),
    "origins-missing": without(NAME + "_origins"),
    "mask-missing": without("pruned.weight_mask"),
    "gaps-missing": without("pruned.weight_outlier_gaps"),
    "index-not-json": with_index(lambda index: "{"),
    "index-deep": with_index(lambda index: "[" * 20000),
    "index-a-list": with_index(lambda index: [index]),
    "index-null": with_index(lambda index: "null"),
    "index-not-a-number": with_index(lambda index: '{"format": NaN, "weights": {}, "checksums": {}}'),
    "index-name-twice": with_index(
        lambda index: json.dumps(index).replace('"bits": 3', '"bits": 3, "bits": 8')
    ),
    "version-99": with_index(lambda index: index.__setitem__("format", 99)),
    "version-true": with_index(lambda index: index.__setitem__("format", True)),
    "version-text": with_index(lambda index: index.__setitem__("format", "3")),
    "checksums-missing": with_index(lambda index: index.pop("checksums") and None),
    "checksums-a-list": with_index(lambda index: index.__setitem__("checksums", [])),
    "checksum-not-hexadecimal": with_index(
        lambda index: index["checksums"].__setitem__("layer.bias", "z" * 32)
    ),
    "tensor-listed-and-missing": with_index(lambda index: index["checksums"].__setitem__("other", "1" * 32)),
    "checksum-of-other-bytes": with_index(
        lambda index: index["checksums"].__setitem__("layer.bias", "0" * 32)
    ),
    "weight-of-a-terabyte": with_index(terabytes),
    "weight-claims-anothers-part": with_index(claimed_twice),
    "record-a-list": with_index(lambda index: index["weights"].__setitem__(NAME, [])),
    "field-missing": with_index(lambda index: index["weights"][NAME].pop("bits") and None),
    "field-unknown": field("color", "red"),
    "shape-one-axis": field("shape", [66]),
    "shape-nine-axes": field("shape", [1] * 8 + [66]),
    "shape-too-large": field("shape", [TERA, 2]),
    "shape-empty-and-too-large": field("shape", [0, 1 << 62]),
    "shape-negative": field("shape", [-6, 11]),
    "shape-not-whole": field("shape", [6.0, 11]),
    "shape-other": field("shape", [7, 11]),
    "bits-0": field("bits", 0),
    "bits-9": field("bits", 9),
    "bits-true": field("bits", True),
    "bits-other": field("bits", 4),
    "bits-huge": field("bits", 10**40),
    "block-0": field("block", [0, 13]),
    "block-beyond": field("block", [TERA, 13]),
    "block-neither-rows-nor-run": field("block", [2, 3]),
    "form-unknown": field("form", "spiral"),
    "levels-dtype-whole": field("levels_dtype", "int8"),
    "dtype-of-pickles": field("dtype", "object"),
    "scheme-no-text": field("scheme", {"__class__": "os.system"}),
    "scheme-with-commands-for-a-terminal": field("scheme", "\x1b[2Jkmeans"),
    "extra-both": field("extra", [1, 2]),
    "extra-huge": field("extra", [0, TERA]),
    "mask-no-switch": field("mask", "yes"),
    "outliers-negative": field("outliers", -1, "pruned.weight"),
    "outliers-more-than-weights": field("outliers", 67, "pruned.weight"),
    "levels-not-a-number": bytes_of(NAME + "_levels", struct.pack("<f", float("nan"))),
    "levels-infinite": bytes_of(NAME + "_levels", struct.pack("<f", float("-inf"))),
    "levels-big-endian": swapped(NAME + "_levels", 4),
    "origins-negative": bytes_of(NAME + "_origins", struct.pack("<i", -1)),
    "origins-beyond": bytes_of(NAME + "_origins", struct.pack("<i", 11)),
    "origins-big-endian": swapped(NAME + "_origins", 4),
    "gaps-beyond": bytes_of("pruned.weight_outlier_gaps", b"\xff\xff"),
    "outliers-infinite": bytes_of("pruned.weight_outliers", struct.pack("<e", float("inf"))),
    "bits-behind-the-last-code": bytes_of("pruned.weight", b"\xff", -1),
    "bits-behind-the-mask": bytes_of("pruned.weight_mask", b"\xff", -1),
    "code-flipped": bytes_of(NAME, b"\xa5", 3),
    "bias-flipped": bytes_of("layer.bias", b"\x01"),
}

UNSEEN = {"checksum-of-other-bytes", "code-flipped", "bias-flipped", "levels-big-endian"}
"""Sound in form: only the checksums tell."""

VALUES = {
    name
    for name in ATTACKS
    if name.startswith(("levels-not", "levels-inf", "origins-", "gaps-", "bits-behind"))
}
VALUES = VALUES - {"origins-missing", "gaps-missing"} | {"outliers-infinite"}
"""Sound in header and index: seen when the weight is read."""


def main() -> None:
    """Write all files anew."""
    for path in FOLDER.glob("*.safetensors"):
        path.unlink()
    for name, attack in ATTACKS.items():
        header, data = sound()
        (FOLDER / f"{name}.safetensors").write_bytes(attack(header, data))


if __name__ == "__main__":
    main()
