"""The transformers plug-in: ``save_pretrained`` and ``from_pretrained`` for weights in codes.

Importing lexibit registers it. While transformers loads a quantized folder, each planned weight is an
ordinary uint8 parameter of the packed size with its other parts beside it, so that shards, prefixes, ties
and device maps are transformers' own business; at the end they become one weight in codes. While it
loads a float folder with a :class:`LexibitConfig`, each weight is quantized as it arrives.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from lexibit import format
from lexibit.config import METHOD, LexibitConfig
from lexibit.errors import FormatError, LexibitError
from lexibit.fitting import Quantizing, install_everywhere, quantize_planned
from lexibit.nn import install, restore_all
from lexibit.plan import Plan, PlannedWeight, Use, storages
from lexibit.weight import COMPUTED, PARTS, CodebookWeight, WeightSpec

_MISSING = 1 << 28  # bytes of weights that a folder may lack: a fresh head
# where accelerate puts what it loads again at every use
_NO_DEVICES = ("disk", "meta")

register_quantization_config(METHOD)(LexibitConfig)


@register_quantizer(METHOD)
class LexibitHfQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves."""

    quantization_config: LexibitConfig

    def __init__(self, quantization_config: LexibitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # name, what is stored, its uses, and whether it is trained in a float model
        self._stored: list[tuple[str, WeightSpec, tuple[Use, ...], bool]] = []
        self._planned: dict[str, PlannedWeight] = {}
        self._quantizing: Quantizing | None = None
        self._arrived: dict[str, bytes] = {}
        self._folder = Path()
        self._fault: LexibitError | None = None
        self.tunes = False

    # loading ------------------------------------------------------------------------------------

    def validate_environment(
        self, *args: Any, device_map: str | dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Refuse a device map that leaves weights on a disk, from which nothing would bring codes back.

        Raises:
            LexibitError: it does.
        """
        for module, device in device_map.items() if isinstance(device_map, dict) else ():
            if str(device) in _NO_DEVICES:
                raise LexibitError(
                    f"device_map puts {module or 'the whole model'} on {str(device)!r}: weights in codes "
                    "must be in memory, of which they take little: name a device, or allow more (max_memory)"
                )

    def update_attn_implementation(self, config: Any) -> Any:
        """Have a dtype before transformers, to find one, opens the weight files that are not yet checked."""
        if self.pre_quantized and getattr(config, "dtype", None) is None:
            config.dtype = torch.get_default_dtype()
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            plan = Plan.of(model, self.quantization_config)
            if not plan.weights:
                raise LexibitError(f"nothing to quantize in {type(model).__name__}: see its plan")
            self._planned = {use.name: weight for weight in plan.weights for use in weight.uses}
            self._quantizing = Quantizing(self.quantization_config, len(plan.weights), False)
            return
        files = [Path(file) for file in checkpoint_files or ()]
        self._folder = files[0].parent if files else Path()
        if not files or any(file.suffix != ".safetensors" for file in files):
            found = ", ".join(map(str, files)) or "none"
            raise FormatError(f"a lexibit folder holds safetensors files, but transformers found {found}")
        given = Path(str(model.config.name_or_path))
        for file in files if given.is_dir() else ():
            if os.path.relpath(file, given).startswith(".."):
                raise FormatError(f"{given}: its index lists {file}, a file of another folder: correct it")
        index = format.read_index(files)
        if not index:
            raise FormatError(
                f"{files[0]}: config.json says that it is quantized by lexibit, but the file holds no "
                "weights in codes: restore the file, or remove quantization_config from config.json"
            )
        # tying pads a bias to the first axis of the weight, which packed codes do not have
        model._adjust_bias = lambda *_: None  # type: ignore[method-assign]
        by_name = {use.name: found for found in storages(model) for use in found[1]}
        for name, spec in _in_model(model, index):
            if name not in by_name:
                continue  # a head that this class does not have; transformers reports the key
            parameter, uses = by_name[name]
            if tuple(parameter.shape) != spec.shape:
                raise FormatError(
                    f"{self._folder}: {name} was {list(spec.shape)} when it was quantized, "
                    f"{type(model).__name__} wants "
                    f"{list(parameter.shape)}: load it with the configuration it was saved with"
                )
            first = next(use for use in uses if use.name == name)
            self._stored.append((name, spec, uses, parameter.requires_grad))
            for part, (dtype, shape) in spec.parts.items():
                placeholder = _placeholder(shape, parameter.dtype if part in COMPUTED else dtype)
                # the codes stand for the weight, wherever it is used
                for use in uses if part == "codes" else (first,):
                    use.module._parameters[use.parameter + PARTS[part]] = placeholder
        _check_sizes(model, files, index)
        if not self._stored:
            raise FormatError(
                f"{self._folder}: none of its weights in codes is one of {type(model).__name__}: correct "
                "'architectures' in its config.json, or load it with the class that saved it"
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self._quantizing is not None:
            self._install_quantized(self._quantizing)
        for name, spec, uses, trained in self._stored:
            first = next(use for use in uses if use.name == name)
            parts: dict[str, Tensor] = {}
            for part, key in spec.keys(first.parameter).items():
                loaded = first.module._parameters[key]
                if loaded is None or loaded.is_meta:
                    raise FormatError(f"{self._folder}: {name}: transformers did not load its {part}")
                parts[part] = loaded.data
                if part != "codes":
                    del first.module._parameters[key]
            weight = format.assemble(self._folder, name, spec, parts)
            for use in uses:
                install(use.module, use.parameter, weight)
            weight.requires_grad = trained
        model.__dict__.pop("_adjust_bias", None)
        _mark(model, self)
        self._stored, self._planned, self._quantizing, self._arrived = [], {}, None, {}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether a float parameter that arrives is planned to be quantized."""
        return param_name in self._planned

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers calls with every such parameter."""
        return _QuantizeOnArrival(self)

    def arrived(self, name: str, value: Tensor) -> None:
        """Take a float weight from the checkpoint.

        What is wrong with it (another shape than planned, or other values under a second name of a tied
        weight) is kept, and raised when all have arrived: transformers would swallow it here.
        """
        planned = self._planned[name]
        assert self._quantizing is not None
        if tuple(value.shape) != planned.spec.shape:
            self._fault = self._fault or LexibitError(
                f"{name} is {list(value.shape)} in the checkpoint, the model wants "
                f"{list(planned.spec.shape)}: load it with the configuration it was saved with, or exclude it"
            )
            return
        if len(planned.uses) > 1:
            digest = _digest(value)
            first = self._arrived.get(planned.name)
            if first is not None and first != digest:
                self._fault = LexibitError(
                    f"the config ties {' and '.join(use.name for use in planned.uses)}, but the checkpoint "
                    "holds different values for them: load it with tie_word_embeddings=False"
                )
        else:
            digest = b""
        if planned.name not in self._arrived:
            self._arrived[planned.name] = digest
            self._quantizing.add(planned, value)

    def _install_quantized(self, quantizing: Quantizing) -> None:
        for planned, weight in quantizing.results():
            install_everywhere(planned, weight)
        if self._fault is not None:
            raise self._fault
        # weights that the checkpoint lacks (a fresh head) were initialised by transformers
        for planned in {planned.name: planned for planned in self._planned.values()}.values():
            if planned.name not in self._arrived:
                use = planned.uses[0]
                value = use.module.get_parameter(use.parameter)
                weight = quantize_planned(planned, value, seed=self.quantization_config.seed)
                install_everywhere(planned, weight)

    # saving -------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to store and what the header says of them."""
        tensors, index = stored_form(model)
        # what transformers leaves out, as the model computes it
        left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        written = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        names = saved_names(model, written)
        index = {names[name]: spec for name, spec in index.items()}
        # what is stored of merged experts, say, are the experts
        saved = revert_weight_conversion(model, written)
        return tensors, _OneKey(format.metadata(index, format.checksums(saved)))

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """By transformers' Trainer while the levels are trained (:mod:`lexibit.tuning`)."""
        return self.tunes

    @property
    def is_qat_trainable(self) -> bool:
        """As it is trainable, without adapters."""
        return self.tunes

    @property
    def is_compileable(self) -> bool:
        """The operators have fake kernels for torch.compile."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        restore_all(model)
        detach(model)
        # transformers keeps config.dtype as text once a model was saved
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model


class NoWeights(LexibitHfQuantizer):
    """What makes ``save_pretrained`` write all but the weights."""

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Nothing."""
        return {}, {}


class _OneKey(dict[str, str]):
    """Metadata to which transformers cannot add its ``format``.

    safetensors writes several keys in random order; with one, the same model gives the same bytes.
    """

    def __setitem__(self, key: str, value: str) -> None:
        if key != "format":
            super().__setitem__(key, value)


class _QuantizeOnArrival(ConversionOps):
    """Hands a loaded tensor to the quantizer and gives transformers nothing to set."""

    def __init__(self, quantizer: LexibitHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            self.quantizer.arrived(name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


def _digest(value: Tensor) -> bytes:
    """A digest of a tensor's bytes."""
    raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.blake2b(raw.numpy().data).digest()


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    placeholder = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    placeholder._is_hf_initialized = True  # type: ignore[attr-defined]  # codes have no initial values
    return placeholder


def _in_model(model: PreTrainedModel, index: dict[str, WeightSpec]) -> Iterator[tuple[str, WeightSpec]]:
    """The stored names as this model's class calls them, by the rules that transformers will apply."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    for name, spec in index.items():
        yield (
            rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0],
            spec,
        )


def _check_sizes(model: PreTrainedModel, files: list[Path], index: Mapping[str, WeightSpec]) -> None:
    """Refuse a configuration that asks for other tensors than there are, before memory is taken for them.

    Raises:
        FormatError: it does.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    missing = dict(state)
    for file in files:
        with format.open_file(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                name = rename_source_key(key, renamings, [], model.base_model_prefix, state)[0]
                wanted = missing.pop(name, None)
                shape = opened.get_slice(key).get_shape()
                if wanted is not None and key not in index and list(wanted.shape) != shape:
                    raise FormatError(
                        f"{file}: {key} is {shape}, config.json wants {list(wanted.shape)}: load it with the "
                        "configuration it was saved with"
                    )
    for name in getattr(model, "all_tied_weights_keys", None) or {}:
        missing.pop(name, None)
    size = sum(tensor.numel() * tensor.element_size() for tensor in missing.values())
    most = _MISSING + 32 * sum(file.stat().st_size for file in files)
    if size > most:
        raise FormatError(
            f"{files[0].parent}: config.json wants {size} bytes of weights that its files do not have, like "
            f"{next(iter(missing))}: load it with the configuration it was saved with"
        )


def stored_form(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, WeightSpec]]:
    """A model's state as it is stored: each weight in codes once, under one of its names."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[CodebookWeight, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CodebookWeight):
            names.setdefault(module, []).append(path.removesuffix(CodebookWeight.SUFFIX))
    state = model.state_dict()
    index: dict[str, WeightSpec] = {}
    for weight, aliases in names.items():
        for alias in aliases:
            for key in weight.spec.keys(alias).values():
                del state[key]
        name = min(aliases, key=lambda alias: alias in tied)
        index[name] = weight.spec
        state |= weight.tensors(name)
    return state, index


def saved_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Under which names ``save_pretrained`` stores a state's tensors, by their names in the model.

    A checkpoint with older names (``LayerNorm.gamma``) is saved under these again. A tensor of which several
    are stored keeps its name here.
    """
    saved = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(state)).items()}
    return {name: saved.get(id(tensor), name) for name, tensor in state.items()}


def attach(model: nn.Module, config: LexibitConfig) -> None:
    """Tell transformers that a model, or the models inside it, are quantized, so that it saves them so."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            LexibitHfQuantizer(config, pre_quantized=True).postprocess_model(part)


def _mark(model: PreTrainedModel, quantizer: LexibitHfQuantizer) -> None:
    """Let a model with weights in codes, and the models inside it, answer transformers as such."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            # no methods: pickle would look for them in the model's class, by their names
            part.__dict__.update(
                hf_quantizer=quantizer,
                is_quantized=True,
                quantization_method=METHOD,
                tie_weights=partial(_tied_already, part),
                resize_token_embeddings=partial(_refuse_to_resize, part),
            )


def _tied_already(model: PreTrainedModel, *_: Any, **__: Any) -> None:
    """What ``tie_weights`` does to a quantized model: its ties are one weight in codes, made for good."""


def _refuse_to_resize(model: PreTrainedModel, *_: Any, **__: Any) -> None:
    raise LexibitError(
        f"the embeddings of this {type(model).__name__} are in codes and cannot be resized: call "
        "lexibit.dequantize(model), resize, and quantize again"
    )


def detach(model: nn.Module) -> None:
    """Tell transformers that a model is a float model again."""
    for part in model.modules():
        quantizer = getattr(part, "hf_quantizer", None)
        if isinstance(part, PreTrainedModel) and isinstance(quantizer, LexibitHfQuantizer):
            quantizer.remove_quantization_config(part)  # type: ignore[no-untyped-call]
            part.config._is_quantized = False
            for name in ("tie_weights", "resize_token_embeddings"):
                part.__dict__.pop(name, None)
