"""Safetensors files without safetensors: tensors read from where they stand, and written in any order.

A mapped file that is cut short, or on a disk that fails, ends the program without a word; a read tells.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lexibit import format
from lexibit.errors import FormatError

_CHUNK = 1 << 24  # bytes read at a time

DTYPES = format.TORCH_DTYPES | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands in a file: its bytes begin at ``start``."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def meta(self) -> Tensor:
        """The tensor without its values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """Its values.

        Raises:
            FormatError: the file cannot be read, or ends inside of it.
        """
        raw = torch.empty(self._size, dtype=torch.uint8)
        with self._reading() as read:
            read(raw)
        return (
            raw.view(self.dtype).view(self.shape) if len(raw) else torch.empty(self.shape, dtype=self.dtype)
        )

    def chunks(self) -> Iterator[Tensor]:
        """Its values in order, some at a time, ``[n]``."""
        with self._reading() as read:
            for at in range(0, self._size, _CHUNK):
                part = torch.empty(min(_CHUNK, self._size - at), dtype=torch.uint8)
                read(part)
                yield part.view(self.dtype)

    @property
    def _size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @contextmanager
    def _reading(self) -> Iterator[Callable[[Tensor], None]]:
        """Gives what fills a tensor with the bytes that follow."""
        try:
            with self.file.open("rb", buffering=0) as opened:
                opened.seek(self.start)

                def read(part: Tensor) -> None:
                    view = part.numpy().data
                    while len(view):
                        count = opened.readinto(view)
                        if not count:
                            raise FormatError(
                                f"{self.file}: ends inside of {self.name}: copy or download it again"
                            )
                        view = view[count:]

                yield read
        except OSError as error:
            raise FormatError(
                f"{self.file}: {self.name} cannot be read: {error.strerror or error}"
            ) from error


def stored(file: Path) -> dict[str, Stored]:
    """Where the tensors of a safetensors file stand, whose header has been checked.

    Raises:
        FormatError: it is no such file, or has a dtype that nobody knows.
    """
    with format.open_file(file):  # which checks the header, and that tensors fill the file
        pass
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise FormatError(
                f"{file}: {name} is {entry['dtype']}, which is not known here: convert it first"
            )
        start = 8 + length + entry["data_offsets"][0]
        found[name] = Stored(file, name, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return found


class TensorFile:
    """A file that gets the bytes that ``safetensors.torch.save_file`` would write, in any order.

    Its whole size is reserved at once, so that a disk that is too small is known before any work. What a file
    of that path holds already stays, until it is written again.

    Args:
        path: of the file.
        tensors: what will be in it; only names, dtypes and shapes count, so they may be on the meta device.
        metadata: of the header. :meth:`finish` may change its values, not their lengths in bytes.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Lay the file out, and reserve its space."""
        self._path = path
        self._listed: dict[str, tuple[str, list[int]]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._tensors = dict(tensors)
        at = 0
        for name, dtype in _in_order(tensors).items():
            size = tensors[name].element_size() * prod(tensors[name].shape)
            self._listed[name] = dtype, list(tensors[name].shape)
            self._places[name] = at, at + size
            at += size
        header = self._header(metadata)
        self._start = len(header)
        # opened for each act: a checkpoint may have more shards than a process may have files open
        with open(path, "ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self._start + at)
            file.truncate(self._start + at)
        self._put([header], 0)

    def write(self, name: str, tensor: Tensor) -> str:
        """Put a tensor in its place; it has the dtype and the shape that were announced.

        Returns:
            Its :func:`lexibit.format.checksum`.
        """
        planned = self._tensors[name]
        assert (tensor.dtype, tensor.shape) == (planned.dtype, planned.shape), name
        return self.write_chunks(name, [tensor])

    def write_chunks(self, name: str, chunks: Iterable[Tensor]) -> str:
        """Put a tensor in its place that comes in parts, in order."""
        begin, end = self._places[name]
        digest = blake2b(digest_size=16)

        def contents() -> Iterator[memoryview]:
            for chunk in chunks:
                raw = chunk.detach().cpu().contiguous().view(-1).view(torch.uint8)
                digest.update(raw.numpy().data)
                yield raw.numpy().data

        written = self._put(contents(), self._start + begin)
        assert written == end - begin, name
        return digest.hexdigest()

    def holds(self, name: str, expected: str) -> bool:
        """Whether a tensor's place holds bytes of this :func:`lexibit.format.checksum`."""
        begin, end = self._places[name]
        place = Stored(self._path, name, torch.uint8, (end - begin,), self._start + begin)
        digest = blake2b(digest_size=16)
        for part in place.chunks():
            digest.update(part.numpy().data)
        return digest.hexdigest() == expected

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header anew."""
        header = self._header(metadata)
        assert len(header) == self._start, "the length of a header is fixed when its file is begun"
        self._put([header], 0)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        for name, (dtype, shape) in self._listed.items():
            document[name] = {"dtype": dtype, "shape": shape, "data_offsets": list(self._places[name])}
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def _put(self, contents: Iterable[bytes | memoryview], at: int) -> int:
        """Write bytes from a place on, and tell how many."""
        total = 0
        with open(self._path, "r+b", buffering=0) as file:
            file.seek(at)
            for content in contents:
                view = memoryview(content)
                total += len(view)
                while len(view):
                    # one call writes 2 GiB at most
                    view = view[file.write(view) :]
        return total


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names in the order in which safetensors stores them, and what it calls their dtypes."""
    # the order depends on names and dtypes: let safetensors show it on tensors without content
    raw = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    return {name: listed["dtype"] for name, listed in header.items()}
