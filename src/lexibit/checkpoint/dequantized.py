"""Back to float: what any tool loads, without lexibit."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from lexibit import format
from lexibit.checkpoint.source import load_quantized, weight_files
from lexibit.checkpoint.target import copy_companions, new_folder, save_folder
from lexibit.checkpoint.verification import verify
from lexibit.errors import no_codes
from lexibit.files import exists_already, replacing
from lexibit.quantize import dequantize


def dequantize_to(source: Path, out: Path) -> int:
    """Write a quantized folder or safetensors file as plain float, every weight as its codes say.

    A folder becomes a new folder, with every other file of the source; a file becomes a file. The source is
    verified first.

    Returns:
        The bytes of the weight files written.

    Raises:
        LexibitError: the source is not quantized, or damaged; ``out`` exists, or cannot be written.
    """
    verify(source)
    if source.is_file():
        if out.exists():
            raise exists_already(out)
        with replacing(out) as staged:
            _decode_files(source, staged)
        return out.stat().st_size
    with new_folder(out) as staged:
        if (source / "config.json").is_file():
            model = load_quantized(source)
            dequantize(model)
            save_folder(model, staged)
        else:
            _decode_files(source, staged / SAFE_WEIGHTS_NAME)
        copy_companions(source, staged)
        _drop_card(staged / "README.md")
        return sum(file.stat().st_size for file in weight_files(staged))


def _drop_card(file: Path) -> None:
    """Remove a card that tells of codes (:mod:`lexibit.hub`): here are none."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if text.startswith("---\n") and "\n- lexibit\n" in text.partition("\n---\n")[0] + "\n":
        file.unlink()


def _decode_files(source: Path, out: Path) -> None:
    """All tensors of a checkpoint without a model, in one float file."""
    tensors = format.read(weight_files(source))
    floats = {name: value if isinstance(value, Tensor) else value.decode() for name, value in tensors.items()}
    if all(floats[name] is tensors[name] for name in floats):
        raise no_codes(source)
    # loaders ask whose tensors they are
    save_file({name: value.contiguous() for name, value in floats.items()}, out, metadata={"format": "pt"})
