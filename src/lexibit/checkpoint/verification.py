"""Whether a quantized checkpoint is what was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lexibit import format
from lexibit.checkpoint.source import weight_files
from lexibit.errors import FormatError, LexibitError

_REMEDY = "copy or download it again"


@dataclass(frozen=True)
class Verified:
    """What was found to be as it was written.

    Attributes:
        tensors: how many.
        weights: how many weights in codes are made of some of them.
        checksums: whether the tensors' bytes were compared with what was noted when they were written; files
            of format versions 1 and 2 note nothing, and of them only the form is checked.
    """

    tensors: int
    weights: int
    checksums: bool


def verify(folder: Path) -> Verified:
    """Check a quantized folder or file: its index, every tensor's checksum, and all parts of every weight.

    One weight at a time is in memory.

    Raises:
        FormatError: something is missing, or not what was written; names the file and the tensor.
        LexibitError: there is nothing quantized in it.
    """
    files = weight_files(folder)
    index, noted = format.read_index(files), format.read_checksums(files)
    if not index:
        raise LexibitError(f"{folder}: holds no weights in codes")
    places: dict[str, Path] = {}
    for file in files:
        with format.open_file(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                places[name] = file
                if not noted:
                    continue
                if name not in noted:
                    raise FormatError(f"{file}: nothing is noted of the tensor {name}: {_REMEDY}")
                if format.checksum(opened.get_tensor(name)) != noted[name]:
                    raise FormatError(
                        f"{file}: the tensor {name} has other bytes than were written: {_REMEDY}"
                    )
    for name, spec in index.items():
        format.read_weight(name, spec, places)
    return Verified(len(places), len(index), bool(noted))
