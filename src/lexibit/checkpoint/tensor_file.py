"""A safetensors file whose tensors are written one by one, in any order."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save
from torch import Tensor

from lexibit.format import checksum

_CHUNK = 1 << 24  # bytes read at a time


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
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, self._start + at)
            os.truncate(self._file, self._start + at)
            self._put(header, 0)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it, finished or not."""
        os.close(self._file)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place; it has the dtype and the shape that were announced."""
        planned = self._tensors[name]
        assert (tensor.dtype, tensor.shape) == (planned.dtype, planned.shape), name
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self._put(raw.numpy().data, self._start + self._places[name][0])

    def read(self, name: str) -> Tensor:
        """What is in a tensor's place: uint8 ``[bytes]``."""
        begin, end = self._places[name]
        raw = torch.empty(end - begin, dtype=torch.uint8)
        view = raw.numpy().data
        for at in range(0, end - begin, _CHUNK):
            part = view[at : at + _CHUNK]
            if os.preadv(self._file, [part], self._start + begin + at) != len(part):
                raise OSError(f"{name}: the file ends inside of it")
        return raw

    def holds(self, name: str, expected: str) -> bool:
        """Whether a tensor's place holds bytes of this :func:`lexibit.format.checksum`."""
        return checksum(self.read(name)) == expected

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header anew and have the disk keep all of the file."""
        header = self._header(metadata)
        assert len(header) == self._start, "the length of a header is fixed when its file is begun"
        self._put(header, 0)
        os.fsync(self._file)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        for name, (dtype, shape) in self._listed.items():
            document[name] = {"dtype": dtype, "shape": shape, "data_offsets": list(self._places[name])}
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def _put(self, content: bytes | memoryview, at: int) -> None:
        view = memoryview(content).cast("B") if len(content) else memoryview(b"")
        while len(view):
            # one call writes 2 GiB at most
            written = os.pwrite(self._file, view, at)
            view, at = view[written:], at + written


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names in the order in which safetensors stores them, and what it calls their dtypes."""
    # the order depends on names and dtypes: let safetensors show it on tensors without content
    raw = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    return {name: listed["dtype"] for name, listed in header.items()}
