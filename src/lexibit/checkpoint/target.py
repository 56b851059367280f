"""Where a quantized form goes: a new folder that appears only when it is whole."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from lexibit import format
from lexibit.calibration.layerwise import Calibration
from lexibit.checkpoint.source import WEIGHT_FILES, load_float, load_tensors, weight_files
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.files import sync, write_json
from lexibit.fitting import Quantizing
from lexibit.plan import Plan
from lexibit.quantize import quantize

WEIGHTS = "model.safetensors"
CALIBRATION = "calibration.json"
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# What tells of a float model's training, and of nothing else.
TRAINING = ("training.json", "logs")
# Sub-folders in which other frameworks' copies of the same weights are published.
_OTHER_FRAMEWORKS = ("onnx", "openvino", "coreml", "tensorflow", "flax", "rust")


def quantize_to(
    source: Path,
    out: Path,
    config: LexibitConfig,
    *,
    progress: bool = True,
    beside: Mapping[str, bytes] | None = None,
    calibrate: Callable[[PreTrainedModel], Calibration] | None = None,
) -> tuple[Plan, int]:
    """Quantize a model folder or safetensors file into a new folder.

    The folder gets the packed weights, every other file of the source (tokenizer, pooling, ...), and files
    ``beside`` them, by name, and, with ``calibrate``, which gives what its float model is calibrated on, what
    became of each weight (calibration.json). It appears in one step when it is whole; if anything fails,
    nothing is left.

    Returns:
        The plan that was carried out, and the bytes of the weight files written.

    Raises:
        LexibitError: the source or the configuration is wrong, ``out`` exists, or cannot be written.
    """
    calibration: Calibration | None = None
    with new_folder(out) as staged:
        if source.is_file():
            if calibrate is not None:
                raise no_model(source)
            done = _quantize_file(source, staged / WEIGHTS, config, progress)
        else:
            model = load_float(source)
            calibration = None if calibrate is None else calibrate(model)
            done = quantize(model, config, calibration=calibration, progress=progress)
            save_folder(model, staged)
            copy_companions(source, staged)
            if calibration is not None:
                write_json(staged / CALIBRATION, [asdict(one) for one in calibration.weights])
        for name, content in (beside or {}).items():
            (staged / name).write_bytes(content)
        size = sum(file.stat().st_size for file in weight_files(staged))
    if calibration is not None and calibration.folder is not None:
        shutil.rmtree(calibration.folder, ignore_errors=True)
    return done, size


def no_model(source: Path) -> LexibitError:
    """The error for calibrating a file, of which nobody knows how to run it."""
    return LexibitError(f"{source}: only a model can be calibrated: give its folder, with config.json")


def _quantize_file(source: Path, out: Path, config: LexibitConfig, progress: bool) -> Plan:
    tensors = load_tensors(source)
    done = Plan.of_tensors(tensors, config)
    if not done.weights:
        raise LexibitError(f"{source}: nothing to quantize in it: see lexibit plan {source}")
    quantizing = Quantizing(config, len(done.weights), progress)
    for planned in done.weights:
        quantizing.add(planned, tensors[planned.name])
    packed = {planned.name: weight for planned, weight in quantizing.results()}
    format.write(out, {**tensors, **packed})
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
        if any(part.startswith(".") for part in inside.parts) or inside.parts[0] in (*TRAINING, CALIBRATION):
            continue
        # weights in a sub-folder (a dense layer after the encoder, say) belong to another module
        is_weights = path.suffix in WEIGHT_FILES or path.name.endswith(".index.json")
        is_weights = is_weights and (len(inside.parts) == 1 or inside.parts[0] in _OTHER_FRAMEWORKS)
        if path.is_file() and not is_weights and not (out / inside).exists():
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / inside)


def exists_already(out: Path) -> LexibitError:
    """The error for a new folder whose place is taken."""
    return LexibitError(f"{out}: exists already: choose another folder, or remove it first")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears at ``out`` only when the work inside ended well.

    Raises:
        LexibitError: ``out`` exists, or cannot be written.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise exists_already(out)
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
            if path.is_file():
                path.chmod(0o666 & ~_umask())
            sync(path)
        os.replace(staged, out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _CANNOT_WRITE:
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
