"""Folders and files: where a model comes from, and where its quantized form goes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from lexibit import format
from lexibit.config import LexibitConfig
from lexibit.errors import FormatError, LexibitError
from lexibit.fidelity import OutputFidelity, WeightError, output_fidelity, weight_errors
from lexibit.fitting import Quantizing
from lexibit.hf import stored_form
from lexibit.nn import codebooks, install
from lexibit.plan import Plan, storages
from lexibit.quantize import quantize
from lexibit.weight import CodebookWeight, WeightSpec

WEIGHTS = "model.safetensors"

# Weights in any framework's form: of no use beside ours.
_WEIGHT_FILES = (
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
# Sub-folders in which other frameworks' copies of the same weights are published.
_OTHER_FRAMEWORKS = ("onnx", "openvino", "coreml", "tensorflow", "flax", "rust")


# where a model comes from --------------------------------------------------------------------------


def find(source: str | Path) -> Path:
    """A model's folder, or a safetensors file: a local path, or a hub name, which is downloaded.

    A safetensors file beside a ``config.json`` stands for its folder.

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
        if not (path / "config.json").is_file():
            raise LexibitError(
                f"{path}: no config.json in it: give a folder written by save_pretrained, or a "
                ".safetensors file"
            )
        return path
    try:
        weights = [f"*{suffix}" for suffix in _WEIGHT_FILES if suffix != ".safetensors"]
        return Path(snapshot_download(str(source), ignore_patterns=weights))
    except HFValidationError as error:
        raise LexibitError(f"{source}: no such folder or file, and no hub name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LexibitError(
            f"{source}: no such folder or file here, and the hub did not give it: {reason}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder (or the file itself), in order of name.

    Raises:
        FormatError: there are none.
    """
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{folder}: no .safetensors file in it")
    return files


def model_class(folder: Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that saved a folder, and its configuration.

    Raises:
        LexibitError: config.json cannot be read, or names a class that transformers does not have.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise LexibitError(f"{folder}: its config.json cannot be used: {error}") from error
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None) if name else None
    if cls is None:
        raise LexibitError(
            f"{folder}: its config.json names the class {name!r} in 'architectures', which transformers "
            f"{transformers.__version__} does not have: correct it, or install a transformers that has it"
        )
    return cls, config


def load_float(folder: Path) -> PreTrainedModel:
    """The float model in a folder, in the class that saved it.

    Raises:
        LexibitError: it is quantized already, or cannot be loaded.
    """
    cls, config = model_class(folder)
    _check_float(folder, config)
    return _load(cls, folder)


def load_quantized(folder: Path) -> PreTrainedModel:
    """The quantized model in a folder, in the class that saved it.

    Raises:
        LexibitError: it is not quantized by lexibit, or damaged.
    """
    cls, config = model_class(folder)
    if getattr(config, "quantization_config", None) is None:
        raise LexibitError(f"{folder}: not quantized (no quantization_config in its config.json)")
    return _load(cls, folder)


def _check_float(folder: Path, config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise LexibitError(f"{folder}: quantized already: give the float model that it came from")


def _load(cls: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    try:
        return cls.from_pretrained(folder)
    except SafetensorError as error:
        raise FormatError(
            f"{folder}: not a whole safetensors file ({error}): copy or download it again"
        ) from error
    except LexibitError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise LexibitError(f"{folder}: cannot be loaded: {error}") from error


def plan(source: Path, config: LexibitConfig) -> Plan:
    """The plan for a folder or file; reads no weights."""
    if source.is_file():
        _refuse_packed(source)
        return Plan.of_tensors(_headers(source), config)
    cls, its_config = model_class(source)
    _check_float(source, its_config)
    dtype = getattr(its_config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = cls._from_config(its_config, dtype=dtype)  # type: ignore[no-untyped-call]
    return Plan.of(model, config)


def _headers(file: Path) -> dict[str, Tensor]:
    """The tensors of a file without their values: on the meta device."""
    tensors = {}
    with format.open_file(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            # the dtypes that are not quantized count with their size; an empty slice knows them
            dtype = format.TORCH_DTYPES.get(part.get_dtype()) or part[:0].dtype
            tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    return tensors


def _refuse_packed(file: Path) -> None:
    if format.read_index([file]):
        raise LexibitError(f"{file}: quantized already: give the float file that it came from")


# where its quantized form goes ----------------------------------------------------------------------


def quantize_to(source: Path, out: Path, config: LexibitConfig, *, progress: bool = True) -> tuple[Plan, int]:
    """Quantize a model folder or safetensors file into a new folder.

    The folder gets the packed weights and every other file of the source (tokenizer, pooling, ...). It
    appears in one step when it is whole; if anything fails, nothing is left.

    Returns:
        The plan that was carried out, and the bytes of the weight files written.

    Raises:
        LexibitError: the source or the configuration is wrong, ``out`` exists, or cannot be written.
    """
    with new_folder(out) as staged:
        if source.is_file():
            done = _quantize_file(source, staged / WEIGHTS, config, progress)
        else:
            model = load_float(source)
            done = quantize(model, config, progress=progress)
            save_folder(model, staged)
            copy_companions(source, staged)
        size = sum(file.stat().st_size for file in weight_files(staged))
    return done, size


def _quantize_file(source: Path, out: Path, config: LexibitConfig, progress: bool) -> Plan:
    _refuse_packed(source)
    with format.open_file(source) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    done = Plan.of_tensors(tensors, config)
    if not done.weights:
        raise LexibitError(f"{source}: nothing to quantize in it: see lexibit plan {source}")
    quantizing = Quantizing(config, len(done.weights), progress)
    for planned in done.weights:
        quantizing.add(planned, tensors[planned.name])
    packed = {planned.name: weight for planned, weight in quantizing.results()}
    format.write(out, tensors | packed)
    return done


def save_folder(model: PreTrainedModel, folder: Path) -> None:
    """``save_pretrained``, without its bar."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def copy_companions(source: Path, out: Path) -> None:
    """Copy what a model folder holds beside weights and configuration: tokenizer, pooling, ..."""
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if any(part.startswith(".") for part in inside.parts):
            continue
        # weights in a sub-folder (a dense layer after the encoder, say) belong to another module
        is_weights = path.suffix in _WEIGHT_FILES or path.name.endswith(".index.json")
        is_weights = is_weights and (len(inside.parts) == 1 or inside.parts[0] in _OTHER_FRAMEWORKS)
        if path.is_file() and not is_weights and not (out / inside).exists():
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / inside)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears at ``out`` only when the work inside ended well.

    Raises:
        LexibitError: ``out`` exists, or cannot be written.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise LexibitError(f"{out}: exists already: choose another folder, or remove it first")
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise LexibitError(f"{out}: cannot be written: {error.strerror or error}") from error
    try:
        staged.chmod(0o777 & ~_umask())
        yield staged
        for path in staged.rglob("*"):
            _sync(path)
        os.replace(staged, out)
        _sync(out.parent)
    except (OSError, SafetensorError) as error:
        if (
            isinstance(error, OSError)
            and error.filename
            and not str(error.filename).startswith((str(staged), str(out)))
        ):
            raise
        raise LexibitError(
            f"{out}: cannot be written ({error}): free some space or choose another disk; nothing "
            "was left there"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds the finished folder
                parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# what is in it ---------------------------------------------------------------------------------------


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
        count = sum(prod(spec.shape) for spec in self.weights.values())
        return 8 * sum(spec.nbytes for spec in self.weights.values()) / max(count, 1)

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
    if not folder.exists():
        raise LexibitError(f"{folder}: no such folder or file")
    files = weight_files(folder)
    index = format.read_index(files)
    if not index:
        raise LexibitError(f"{folder}: holds no weights in codes")
    parameters = sum(prod(spec.shape) for spec in index.values())
    ours = {name for weight in index for name in (weight, weight + CodebookWeight.LEVELS)}
    for file in files:
        with format.open_file(file) as opened:
            for name in set(opened.keys()) - ours:
                parameters += prod(opened.get_slice(name).get_shape())
    return Contents(index, parameters, sum(file.stat().st_size for file in files))


def errors_against(folder: Path, original: Path) -> list[WeightError]:
    """The error of every weight in codes against the float model it was made from."""
    if folder.is_file() or original.is_file():
        packed = format.read(weight_files(folder))
        floats = format.read(weight_files(original))
        return weight_errors(
            {name: weight for name, weight in packed.items() if isinstance(weight, CodebookWeight)},
            {name: value for name, value in floats.items() if isinstance(value, Tensor)},
        )
    weights, parameters = codebooks(load_quantized(folder)), load_float(original).named_parameters()
    return weight_errors(weights, dict(parameters))


def compare(
    folder: Path, original: Path, texts: Sequence[str], *, batch_size: int, max_length: int
) -> OutputFidelity:
    """How near a quantized folder's outputs stay to those of the float model's folder."""
    for path in (folder, original):
        if not path.is_dir():
            raise LexibitError(f"{path}: no such folder; outputs need a model's config.json")
    quantized, floats = load_quantized(folder), load_float(original)
    try:
        tokenizer = AutoTokenizer.from_pretrained(original)
    except (OSError, ValueError) as error:
        raise LexibitError(f"{original}: no tokenizer in it that can be used: {error}") from error
    return output_fidelity(quantized, floats, tokenizer, texts, batch_size=batch_size, max_length=max_length)


def read_texts(file: Path, limit: int) -> list[str]:
    """The lines of a text file that are not blank, ``limit`` at most.

    Raises:
        LexibitError: it cannot be read, or holds no text.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LexibitError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    texts = [line.strip() for line in lines if line.strip()][:limit]
    if not texts:
        raise LexibitError(f"{file}: holds no text")
    return texts


# models that are not transformers' -------------------------------------------------------------------


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
    staged = path.with_name(f".{path.name}.part")
    try:
        format.write_tensors(staged, kept, index)
        _sync(staged)
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        raise LexibitError(f"{path}: cannot be written ({error})") from error
    finally:
        staged.unlink(missing_ok=True)


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
