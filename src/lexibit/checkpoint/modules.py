"""Models that are not transformers': any quantized module to one file, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lexibit import format
from lexibit.errors import FormatError, LexibitError
from lexibit.files import replacing
from lexibit.hf import stored_form
from lexibit.nn import codebooks, install
from lexibit.plan import storages
from lexibit.weight import CodebookWeight


def save(model: nn.Module, path: str | Path) -> None:
    """Save any quantized module to one safetensors file, really packed.

    For transformers models ``save_pretrained`` does the same and more. Tensors that share memory are
    stored once.

    Raises:
        LexibitError: the model holds no weight in codes, or the file cannot be written.
    """
    path = Path(path)
    state, index = stored_form(model)
    if not index:
        raise LexibitError("the model is not quantized: call lexibit.quantize(model) first")
    seen: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    kept = {
        name: tensor
        for name, tensor in state.items()
        if tensor.numel() == 0
        or seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name) == name
    }
    with replacing(path) as staged:
        format.write_tensors(staged, kept, index)


def load(model: nn.Module, path: str | Path) -> None:
    """Load a file of :func:`save` into a float model of the same structure, in place.

    Nothing is changed before everything in the file is known to fit.

    Raises:
        LexibitError: the model is quantized already.
        FormatError: the file is damaged, or does not fit the model.
    """
    path = Path(path)
    if codebooks(model):
        raise LexibitError("the model is quantized already: load into a float model of the same structure")
    tensors = format.read([path])
    uses = {use.name: every for _, every in storages(model) for use in every}
    state = model.state_dict()
    known = {use.name for name in tensors for use in uses.get(name, ())} | tensors.keys()
    faults = [f"lacks {name}" for name in sorted(state.keys() - known)]
    for name, value in tensors.items():
        if name not in state:
            faults.append(f"holds {name}, which the model does not have")
        elif state[name].shape != value.shape:
            faults.append(f"{name} is {list(value.shape)}, not {list(state[name].shape)}")
    if faults:
        raise FormatError(f"{path}: does not fit {type(model).__name__}: {'; '.join(faults)}")
    for name, value in tensors.items():
        if isinstance(value, CodebookWeight):
            for use in uses[name]:
                install(use.module, use.parameter, value)
    plain = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    model.load_state_dict(plain, strict=False)
