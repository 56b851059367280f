"""Whether a quantized checkpoint is what was written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lexibit import format
from lexibit.checkpoint.source import model_files, weight_files
from lexibit.config import METHOD
from lexibit.errors import FormatError, no_codes

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

    Of a model's folder, with a config.json, also that transformers will find its files and know that they are
    quantized. One weight at a time is in memory.

    Raises:
        FormatError: something is missing, or not what was written; names the file and the tensor.
        LexibitError: there is nothing quantized in it.
    """
    files = weight_files(folder)
    index, noted = format.read_headers(files)
    if not index:
        raise no_codes(folder)
    if (folder / "config.json").is_file():
        _check_model(folder, files)
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


def _check_model(folder: Path, files: list[Path]) -> None:
    """See that a model's folder is one to transformers.

    Raises:
        FormatError: it is not.
    """
    found = model_files(folder)
    if strange := sorted(set(files) - set(found)):
        raise FormatError(
            f"{strange[0]}: is neither model.safetensors nor a shard that {SAFE_WEIGHTS_INDEX_NAME} lists: "
            f"{_REMEDY}"
        )
    file = folder / "config.json"
    try:
        asked = json.loads(file.read_text(encoding="utf-8"))["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{file}: has no quantization_config of lexibit ({error!r}): {_REMEDY}") from error
    if asked != METHOD:
        raise FormatError(f"{file}: its quant_method is {str(asked)[:40]!r}, not {METHOD!r}: {_REMEDY}")
