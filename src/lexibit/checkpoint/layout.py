"""What a quantized checkpoint will hold, and where each part comes from: worked out from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lexibit import format
from lexibit.checkpoint.source import headers, model_files, skeleton, without_values
from lexibit.checkpoint.tensor_file import Stored
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.fitting import install_everywhere
from lexibit.hf import attach, saved_names, stored_form
from lexibit.plan import Plan, storages
from lexibit.weight import COMPUTED, CodebookWeight, WeightSpec

SHARD_SIZE = 50 * 10**9  # bytes: what save_pretrained takes by itself


class NotPlainError(LexibitError):
    """A checkpoint of which the model makes more than its tensors say; tells why."""


@dataclass(frozen=True)
class Origin:
    """A tensor of the float checkpoint, and the dtype in which the model has it."""

    stored: Stored
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Its values."""
        return self.stored.read().to(self.dtype)

    def chunks(self) -> Iterator[Tensor]:
        """Its values in order, some at a time."""
        return (chunk.to(self.dtype) for chunk in self.stored.chunks())


@dataclass(frozen=True)
class Layout:
    """What will be stored.

    Attributes:
        plan: the weights to quantize, and what is kept.
        names: under which name each weight is stored, by its name in the plan.
        weights: where each weight's values come from, by its stored name.
        kept: where each other stored tensor comes from, by name.
        files: the stored tensors, on the meta device, by file.
        index: what the headers say of the weights.
        copies: names that the headers list, of tensors that are stored under another name.
        model: the model on the meta device, its weights in codes; None for a bare file.
    """

    plan: Plan
    names: dict[str, str]
    weights: dict[str, Origin]
    kept: dict[str, Origin]
    files: dict[str, dict[str, Tensor]]
    index: dict[str, WeightSpec]
    copies: dict[str, str]
    model: PreTrainedModel | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors, on the meta device."""
        return {name: tensor for tensors in self.files.values() for name, tensor in tensors.items()}


def of_file(file: Path, config: LexibitConfig, shard_size: int = SHARD_SIZE) -> Layout:
    """The layout for a bare safetensors file.

    Raises:
        LexibitError: it is quantized already, or nothing in it can be.
    """
    found = headers(file)
    tensors = without_values(found)
    plan = Plan.of_tensors(tensors, config)
    if not plan.weights:
        raise LexibitError(f"{file}: nothing to quantize in it: see lexibit plan {file}")
    weights = {planned.name: planned for planned in plan.weights}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = _announced(weights[name].spec).tensors(name) if name in weights else {name: tensor}
        for key in parts.keys() & stored.keys():
            raise LexibitError(f"{file}: two tensors would be stored as {key}: rename one")
        stored |= parts
    origins = {name: Origin(tensor, tensor.dtype) for name, tensor in found.items()}
    return Layout(
        plan,
        {name: name for name in weights},
        {name: origins[name] for name in weights},
        {name: origin for name, origin in origins.items() if name not in weights},
        _sharded(stored, shard_size),
        {name: planned.spec for name, planned in weights.items()},
        {},
        None,
    )


def of_folder(folder: Path, config: LexibitConfig, shard_size: int = SHARD_SIZE) -> Layout:
    """The layout for a model folder: what ``save_pretrained`` would store of the model, once quantized.

    Raises:
        NotPlainError: the model is not just the folder's tensors under its own names.
        LexibitError: from the plan, or nothing can be quantized.
    """
    model = skeleton(folder)
    origins = _origins(folder, model)
    plan = Plan.of(model, config)
    if not plan.weights:
        raise LexibitError(f"nothing to quantize in {type(model).__name__}: see its plan")
    found = {use.name: [one.name for one in uses] for _, uses in storages(model) for use in uses}
    of_weight = {planned.name: _one_of(planned.names, origins) for planned in plan.weights}
    for planned in plan.weights:
        install_everywhere(planned, _announced(planned.spec))
    attach(model, config)
    state, index = stored_form(model)
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    parts = {key for name, spec in index.items() for key in spec.keys(name).values()}
    every = {name: tensor for name, tensor in state.items() if name not in parts}
    kept = remove_tied_weights_from_state_dict(dict(every), model)
    shared = {name: found.get(name, [name]) for name in every}  # a buffer has one name
    copies = {name: _kept_copy(name, shared[name], kept) for name in every.keys() - kept.keys()}
    stored = {name: state[name] for name in state if name in parts or name in kept}
    saved = saved_names(model, state)
    return Layout(
        plan,
        {name: saved[name] for name in index},
        {saved[name]: origin for name, origin in of_weight.items()},
        {saved[name]: _one_of(shared[name], origins) for name in kept},
        # in the order in which shards are filled
        _sharded(revert_weight_conversion(model, stored), shard_size),
        {saved[name]: spec for name, spec in index.items()},
        {saved[copy]: saved[name] for copy, name in copies.items()},
        model,
    )


def _announced(spec: WeightSpec) -> CodebookWeight:
    """A weight in codes without any, on the meta device."""
    own = getattr(torch, spec.dtype)
    return CodebookWeight(
        spec,
        **{
            part: torch.empty(shape, dtype=own if part in COMPUTED else dtype, device="meta")
            for part, (dtype, shape) in spec.parts.items()
        },
    )


def _kept_copy(name: str, names: Iterable[str], kept: Mapping[str, Tensor]) -> str:
    """Under which of a tensor's names it is stored."""
    for other in names:
        if other in kept:
            return other
    raise NotPlainError(f"{name} shares its memory with a tensor of another name")


def _sharded(tensors: dict[str, Tensor], size: int) -> dict[str, dict[str, Tensor]]:
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=size
    )
    return {
        file: {name: tensors[name] for name in names} for file, names in split.filename_to_tensors.items()
    }


def _one_of(names: Iterable[str], origins: Mapping[str, Origin]) -> Origin:
    """Where a tensor of some names comes from; if its copies are in the checkpoint too, they are the same.

    Raises:
        NotPlainError: it is not there, or its copies are others.
    """
    names = list(names)
    given = [name for name in names if name in origins]
    if not given:
        raise NotPlainError(f"{names[0]} is not in it")
    first = origins[given[0]]
    if len({origins[name] for name in given}) > 1:
        digests = {format.checksum(origins[name].read()) for name in given}
        if len(digests) > 1:
            raise NotPlainError(f"{' and '.join(given)} should be the same, and are not")
    return first


def _origins(folder: Path, model: PreTrainedModel) -> dict[str, Origin]:
    """Where the tensors of a model's state come from, by the rules by which transformers loads them.

    Raises:
        NotPlainError: the model makes something else of them.
    """
    state = model.state_dict()
    if model._get_dtype_plan(model.dtype):
        raise NotPlainError(f"{type(model).__name__} keeps some of its weights in float32")
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    files = model_files(folder)
    if (folder / "adapter_config.json").is_file():
        raise NotPlainError("an adapter is loaded into it")
    if not files or getattr(model.config, "transformers_weights", None) or type(model.config).extra_files:
        raise NotPlainError("its weights are in other files than model.safetensors and its shards")
    origins: dict[str, Origin] = {}
    for file in files:
        for key, tensor in headers(file).items():
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
            if pattern is not None:
                raise NotPlainError(f"{key} becomes something else as it is loaded")
            if name not in state:
                continue  # a head that this class does not have, say
            if name in origins:
                raise NotPlainError(f"{key} and {origins[name].stored.name} are both {name}")
            if tensor.shape != state[name].shape:
                raise NotPlainError(f"{key} is {list(tensor.shape)}, not {list(state[name].shape)}")
            origins[name] = Origin(tensor, state[name].dtype)
    # as transformers notes it of a model that it loaded: it is saved under the names that it came with
    model.__dict__["_weight_conversions"] = [entry for entry in mapping if entry.was_used()]
    return origins
