"""Where a model comes from: a folder, a safetensors file, or the hub."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lexibit import format, models
from lexibit.checkpoint.tensor_file import Stored, stored
from lexibit.config import LexibitConfig
from lexibit.errors import FormatError, LexibitError
from lexibit.plan import Plan

# Weights in any framework's form: of no use beside ours.
WEIGHT_FILES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
)

# How configurations call their number of layers, and how many of them make a model that nobody has.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_MOST_LAYERS = 10_000

# While transformers builds a model it replaces functions, its own and PyTorch's, for the whole process: two
# threads that do so at once would leave them replaced for good.
_BUILDING = threading.RLock()

_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "*.spm", "merges.txt")


def find(source: str | Path, *, weights: bool = True) -> Path:
    """A model's folder, or a safetensors file: a local path, or a hub name, which is downloaded.

    A safetensors file beside a ``config.json`` stands for its folder. A folder without one must hold weights
    in codes. Without ``weights``, a hub name brings the configuration only.

    Raises:
        LexibitError: there is no such thing, here or on the hub.
    """
    path = Path(source)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LexibitError(f"{source}: no such folder or file ({error.strerror})") from error
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LexibitError(f"{path}: give a model folder or a .safetensors file")
        return path.parent if (path.parent / "config.json").is_file() else path
    if path.is_dir():
        if not (path / "config.json").is_file() and not holds_codes(path):
            raise LexibitError(
                f"{path}: no config.json in it: give a folder written by save_pretrained, or a "
                ".safetensors file"
            )
        return path
    try:
        return _download(str(source), weights)
    except HFValidationError as error:
        raise LexibitError(f"{source}: no such folder or file, and no hub name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LexibitError(
            f"{source}: no such folder or file here, and the hub did not give it: {reason}"
        ) from error


def holds_codes(folder: Path) -> bool:
    """Whether there are weights in codes in a folder's safetensors files.

    Raises:
        FormatError: what is recorded of them is damaged.
    """
    return bool(format.read_index(sorted(folder.glob("*.safetensors"))))


def _download(name: str, weights: bool) -> Path:
    if not weights:
        return Path(snapshot_download(name, allow_patterns=["*.json"]))
    others = [f"*{suffix}" for suffix in WEIGHT_FILES if suffix != ".safetensors"]
    folder = Path(snapshot_download(name, ignore_patterns=others))
    if not any(folder.glob("*.safetensors")):
        # an older repository, with weights in PyTorch's own form only
        folder = Path(snapshot_download(name, allow_patterns=["*.bin", "*.bin.index.json"]))
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder (or the file itself), in order of name.

    Raises:
        LexibitError: there are none.
    """
    if not folder.exists():
        raise LexibitError(f"{folder}: no such folder or file")
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not files:
        raise FormatError(f"{folder}: no .safetensors file in it")
    return files


def model_class(folder: Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that saved a folder, and its configuration.

    Raises:
        LexibitError: config.json cannot be read, or names a class that transformers does not have.
    """
    with _config_of(folder):
        # no code of a checkpoint is run; without saying so, transformers would ask on the terminal
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = config.architectures
    name = names[0] if isinstance(names, list) and names else names or ""
    cls = (
        getattr(transformers, name, None) or models.CLASSES.get(name)
        if isinstance(name, str) and name
        else None
    )
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise LexibitError(
            f"{folder}: its config.json names the class {name!r} in 'architectures', which transformers "
            f"{transformers.__version__} does not have: correct it, or install a transformers that has it"
        )
    if cls.config_class is not None and not isinstance(config, cls.config_class):
        raise LexibitError(
            f"{folder}: its config.json names the class {name!r} in 'architectures', which is not of its "
            f"model_type {config.model_type!r}: correct one of the two"
        )
    for layers in _LAYERS:
        if (count := getattr(config, layers, 0) or 0) > _MOST_LAYERS:
            raise LexibitError(
                f"{folder}: its config.json claims {count} layers, the limit is {_MOST_LAYERS}"
            )
    return cls, config


@contextmanager
def _config_of(folder: Path) -> Iterator[None]:
    """Work with a configuration that anybody may have written: whatever it leads to is told as its fault."""
    try:
        yield
    except (LexibitError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LexibitError(f"{folder}: its config.json cannot be used: {reason}") from error


def load_float(folder: Path) -> PreTrainedModel:
    """The float model in a folder, in the class that saved it.

    Raises:
        LexibitError: it is quantized already, or cannot be loaded.
    """
    cls, config = model_class(folder)
    _check_float(folder, config)
    return _load(cls, folder)


def load_with_head(folder: Path, head: str, **settings: Any) -> PreTrainedModel:
    """The float32 model in a folder with a head, a fresh one if it has none, or one of another shape.

    Args:
        folder: of a float model.
        head: the class of transformers that knows which class has this head, like
            ``AutoModelForSequenceClassification``.
        settings: what its configuration is to say.

    Raises:
        LexibitError: it is quantized already, or cannot be loaded with this head.
    """
    _, config = model_class(folder)
    _check_float(folder, config)
    if type(config) not in getattr(transformers, head)._model_mapping:
        raise LexibitError(
            f"{folder}: a model of type {config.model_type!r} has no form for this task "
            f"({head.removeprefix('Auto')}): choose another model"
        )
    return _load(
        getattr(transformers, head), folder, ignore_mismatched_sizes=True, dtype=torch.float32, **settings
    )


def load_quantized(folder: Path) -> PreTrainedModel:
    """The quantized model in a folder, in the class that saved it.

    Raises:
        LexibitError: it is not quantized by lexibit, or damaged.
    """
    cls, config = model_class(folder)
    if getattr(config, "quantization_config", None) is None:
        raise LexibitError(f"{folder}: not quantized (no quantization_config in its config.json)")
    return _load(cls, folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    # without them transformers makes up a tokenizer that knows no words
    return any(next(folder.glob(files), None) for files in _TOKENIZER_FILES)


def load_model(folder: Path) -> PreTrainedModel:
    """The model in a folder, float or quantized, in the class that saved it.

    Raises:
        LexibitError: it cannot be loaded.
    """
    cls, _ = model_class(folder)
    return _load(cls, folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        LexibitError: there is none, or it cannot be used.
    """
    if not has_tokenizer(folder):
        raise LexibitError(f"{folder}: no tokenizer in it: copy the model's tokenizer files there")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LexibitError(f"{folder}: no tokenizer in it that can be used: {error}") from error
    return tokenizer


def _check_float(folder: Path, config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise LexibitError(f"{folder}: quantized already: give the float model that it came from")


def _load(cls: type[PreTrainedModel], folder: Path, **settings: Any) -> PreTrainedModel:
    model_files(folder)  # none of which is another folder's
    if other := next(folder.glob("shard-*-model-*.safetensors"), None):
        raise LexibitError(f"{other}: is of a checkpoint in parts of tensors: save it with save_pretrained")
    try:
        with _BUILDING:
            return cls.from_pretrained(folder, trust_remote_code=False, **settings)
    except SafetensorError as error:
        raise FormatError(
            f"{folder}: not a whole safetensors file ({error}): copy or download it again"
        ) from error
    except (LexibitError, MemoryError):
        raise
    except Exception as error:  # of whatever a stranger's config.json leads to
        reason = str(error).strip() or type(error).__name__
        raise LexibitError(f"{folder}: cannot be loaded: {reason}") from error


def plan(source: Path, config: LexibitConfig) -> Plan:
    """The plan for a folder or file; reads no weights."""
    if source.is_file():
        return Plan.of_tensors(without_values(headers(source)), config)
    return Plan.of(skeleton(source), config)


def skeleton(folder: Path) -> PreTrainedModel:
    """The float model in a folder without its values: on the meta device, in the class that saved it.

    Raises:
        LexibitError: it is quantized already, or its config.json cannot be used.
    """
    cls, config = model_class(folder)
    _check_float(folder, config)
    dtype = _dtype(folder, config)
    with _BUILDING, _config_of(folder), torch.device("meta"):
        model: PreTrainedModel = cls._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        if model.can_generate():
            # as from_pretrained does: what its file, or else config.json, says of generating text
            model.adjust_generation_fn(  # type: ignore[operator]
                None,
                False,
                False,
                folder,
                cache_dir=None,
                force_download=False,
                proxies=None,
                local_files_only=True,
                token=None,
                revision=None,
                subfolder="",
                trust_remote_code=False,
            )
    return model


def _dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype:
    """In which dtype transformers loads a folder: what its configuration says, else that of its weights."""
    named = getattr(config, "dtype", None)
    if named is not None:
        dtype = getattr(torch, named, None) if isinstance(named, str) else named
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise LexibitError(
                f"{folder}: its config.json names the dtype {named!r}, which models do not have"
            )
        return dtype
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = model_files(folder)
    if files and files[0].name != SAFE_WEIGHTS_NAME:
        told = _read_index(index).get("metadata")
        named = told.get("dtype") if isinstance(told, dict) else None
        if isinstance(named, str) and isinstance(getattr(torch, named, None), torch.dtype):
            return getattr(torch, named)  # type: ignore[no-any-return]
    for file in files[:1]:
        for tensor in headers(file).values():
            if tensor.dtype in format.TORCH_DTYPES.values():
                return tensor.dtype
    return torch.float32


def model_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a model's folder; none if there are none.

    Raises:
        FormatError: its index cannot be read, or lists a file that is not there.
    """
    one, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if one.is_file():
        return [one]
    if not index.is_file():
        return []
    try:
        names = sorted(set(_read_index(index)["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it lists files of other folders")
        files = [folder / name for name in names]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{index}: is no index of shards ({error}): copy or download it again") from error
    for file in files:
        if not file.is_file():
            raise FormatError(f"{index}: lists {file.name}, which is not there: copy or download it again")
    return files


def _read_index(index: Path) -> dict[str, Any]:
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{index}: is no index of shards ({error}): copy or download it again") from error
    if not isinstance(document, dict):
        raise FormatError(f"{index}: is no index of shards: copy or download it again")
    return document


def headers(file: Path) -> dict[str, Stored]:
    """Where the tensors of a float safetensors file stand.

    Raises:
        LexibitError: it holds weights in codes, or is damaged.
    """
    refuse_packed(file)
    return stored(file)


def without_values(tensors: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors of a file on the meta device."""
    return {name: tensor.meta for name, tensor in tensors.items()}


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a float safetensors file.

    Raises:
        LexibitError: it holds weights in codes, or is damaged.
    """
    refuse_packed(file)
    with format.open_file(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def refuse_packed(file: Path) -> None:
    """Refuse a file that holds weights in codes.

    Raises:
        LexibitError: it does.
    """
    if format.read_index([file]):
        raise LexibitError(f"{file}: quantized already: give the float file that it came from")
