"""What a quantized checkpoint holds, and how near it stays to the float model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from lexibit import format
from lexibit.checkpoint.source import load_float, load_quantized, load_tokenizer, weight_files
from lexibit.errors import LexibitError, no_codes
from lexibit.fidelity import OutputFidelity, WeightError, output_fidelity, weight_errors
from lexibit.nn import codebooks
from lexibit.weight import CodebookWeight, WeightSpec, bits_per_weight


@dataclass(frozen=True)
class Contents:
    """What a quantized checkpoint holds.

    Attributes:
        weights: what is recorded of each weight in codes.
        parameters: how many parameters there are, in codes or not; shared ones count once.
        file_bytes: bytes of the safetensors files, headers included.
    """

    weights: dict[str, WeightSpec]
    parameters: int
    file_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the weights in codes divided by their number."""
        return bits_per_weight(self.weights.values())

    @property
    def file_bits_per_parameter(self) -> float:
        """Bits on disk, all included, divided by all parameters."""
        return 8 * self.file_bytes / max(self.parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        """The contents as plain JSON values."""
        return {
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "bits_per_weight": self.bits_per_weight,
            "file_bits_per_parameter": self.file_bits_per_parameter,
            "weights": [
                {"name": name, "bytes": spec.nbytes, "bits_per_weight": spec.bits_per_weight} | spec.to_dict()
                for name, spec in self.weights.items()
            ],
        }


def inspect(folder: Path) -> Contents:
    """What a quantized folder or file holds; reads headers only.

    Raises:
        LexibitError: there is nothing quantized in it, or it is damaged.
    """
    files = weight_files(folder)
    index = format.read_index(files)
    if not index:
        raise no_codes(folder)
    parameters = sum(prod(spec.shape) for spec in index.values())
    ours = {key for name, spec in index.items() for key in spec.keys(name).values()}
    for file in files:
        with format.open_file(file) as opened:
            for name in set(opened.keys()) - ours:
                parameters += prod(opened.get_slice(name).get_shape())
    return Contents(index, parameters, sum(file.stat().st_size for file in files))


def errors_against(folder: Path, original: Path) -> list[WeightError]:
    """The error of every weight in codes against the float model it was made from."""
    return weight_errors(*beside_floats(folder, original))


def beside_floats(folder: Path, original: Path) -> tuple[dict[str, CodebookWeight], dict[str, Tensor]]:
    """The weights in codes of a folder or file, and the float model's tensors, both by name."""
    if folder.is_file() or original.is_file():
        packed = format.read(weight_files(folder))
        floats = format.read(weight_files(original))
        return (
            {name: weight for name, weight in packed.items() if isinstance(weight, CodebookWeight)},
            {name: value for name, value in floats.items() if isinstance(value, Tensor)},
        )
    return codebooks(load_quantized(folder)), dict(load_float(original).named_parameters())


def compare(
    folder: Path, original: Path, texts: Sequence[str], *, batch_size: int, max_length: int
) -> OutputFidelity:
    """How near a quantized folder's outputs stay to those of the float model's folder."""
    for path in (folder, original):
        if not path.is_dir():
            raise LexibitError(f"{path}: no such folder; outputs need a model's config.json")
    quantized, floats, tokenizer = load_quantized(folder), load_float(original), load_tokenizer(original)
    return output_fidelity(quantized, floats, tokenizer, texts, batch_size=batch_size, max_length=max_length)


def read_texts(file: Path, limit: int) -> list[str]:
    """The lines of a text file that are not blank, ``limit`` at most.

    Raises:
        LexibitError: it cannot be read, or holds no text.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LexibitError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise LexibitError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    texts = [line.strip() for line in lines if line.strip()][:limit]
    if not texts:
        raise LexibitError(f"{file}: holds no text")
    return texts
