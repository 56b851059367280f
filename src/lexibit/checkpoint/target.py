"""Where a quantized form goes: a new folder that appears only when it is whole."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import logging as transformers_logging

from lexibit.calibration.layerwise import Calibration
from lexibit.checkpoint import layout, streaming
from lexibit.checkpoint.source import WEIGHT_FILES, load_float, weight_files
from lexibit.checkpoint.unfinished import unfinished
from lexibit.config import LexibitConfig
from lexibit.errors import FormatError, LexibitError
from lexibit.files import (
    cannot_write,
    exists_already,
    finish_folder,
    occupied,
    of_the_disk,
    parents_of,
    sync,
    write_json,
)
from lexibit.hf import NoWeights
from lexibit.plan import Plan
from lexibit.quantize import quantize

_logger = logging.getLogger("lexibit")

CALIBRATION = "calibration.json"
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
    shard_size: int = layout.SHARD_SIZE,
    workers: streaming.Workers | None = None,
) -> tuple[Plan, int]:
    """Quantize a model folder or safetensors file into a new folder.

    The folder gets the packed weights, every other file of the source (tokenizer, pooling, ...), and files
    ``beside`` them, by name. It appears in one step when it is whole.

    Weights are read, quantized and written one by one: the float model is never in memory, and its size does
    not matter. The bytes are those of quantizing the loaded model and ``save_pretrained``. What was finished
    when it is cut short is kept beside ``out``, and the same call goes on with it.

    The model is loaded as a whole, and work that is cut short is lost, with ``calibrate``, or if the model is
    not just its checkpoint's tensors (a mixture of experts that transformers merges as it loads, weights in
    PyTorch's own form), which is said.

    Args:
        source: of the float model, as :func:`lexibit.checkpoint.find` gives it.
        out: the new folder.
        config: how.
        progress: whether to draw a bar.
        beside: files to put into the folder, by name.
        calibrate: gives what the float model is calibrated on; the folder then tells what became of each
            weight (calibration.json).
        shard_size: bytes above which no file grows, but for one tensor.
        workers: who quantizes (:class:`streaming.Local`, :class:`streaming.Cluster`); threads of this
            process, within what memory is free, if None.

    Returns:
        The plan that was carried out, and the bytes of the weight files written.

    Raises:
        LexibitError: the source or the configuration is wrong, ``out`` exists or cannot be written, or
            ``workers`` are given where the model is loaded as a whole.
    """
    if occupied(out):
        raise exists_already(out)
    if calibrate is not None and source.is_file():
        raise no_model(source)
    if source.is_dir():
        companions(source)  # what cannot be copied is known before the work
    why = "its weights are calibrated" if calibrate is not None else ""
    try:
        if not why:
            of = layout.of_file if source.is_file() else layout.of_folder
            return _streamed(source, out, config, of(source, config, shard_size), progress, beside, workers)
    except layout.NotPlainError as error:
        why = str(error)
    if workers is not None:
        raise LexibitError(f"{source}: the whole model must be loaded, as {why}: leave memory and ray out")
    if calibrate is None:
        _logger.warning("%s: the whole model is loaded, as %s", source, why)
    return _loaded(source, out, config, progress, beside, calibrate, shard_size)


def _streamed(
    source: Path,
    out: Path,
    config: LexibitConfig,
    found: layout.Layout,
    progress: bool,
    beside: Mapping[str, bytes] | None,
    workers: streaming.Workers | None,
) -> tuple[Plan, int]:
    """Tensor by tensor, never the model."""
    workers = workers or streaming.Local()
    workers.check(streaming.jobs_of(found, config))
    with unfinished(out, streaming.key(found, config)) as work:
        streaming.write(found, work, config, workers, progress=progress)
        work.clear([*found.files, SAFE_WEIGHTS_INDEX_NAME])
        size = sum(file.stat().st_size for file in weight_files(work.folder))
        if found.model is not None:
            save_configuration(found.model, work.folder)
            copy_companions(source, work.folder)
        _put(work.folder, beside)
    return found.plan, size


def _loaded(
    source: Path,
    out: Path,
    config: LexibitConfig,
    progress: bool,
    beside: Mapping[str, bytes] | None,
    calibrate: Callable[[PreTrainedModel], Calibration] | None,
    shard_size: int,
) -> tuple[Plan, int]:
    """By way of the model, as a whole in memory."""
    with new_folder(out) as staged:
        model = load_float(source)
        calibration = None if calibrate is None else calibrate(model)
        done = quantize(model, config, calibration=calibration, progress=progress)
        save_folder(model, staged, shard_size)
        copy_companions(source, staged)
        if calibration is not None:
            write_json(staged / CALIBRATION, [asdict(one) for one in calibration.weights])
        _put(staged, beside)
        size = sum(file.stat().st_size for file in weight_files(staged))
    if calibration is not None and calibration.folder is not None:
        shutil.rmtree(calibration.folder, ignore_errors=True)
    return done, size


def _put(folder: Path, files: Mapping[str, bytes] | None) -> None:
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)


def no_model(source: Path) -> LexibitError:
    """The error for calibrating a file, of which nobody knows how to run it."""
    return LexibitError(f"{source}: only a model can be calibrated: give its folder, with config.json")


def save_folder(model: PreTrainedModel, folder: Path, shard_size: int = layout.SHARD_SIZE) -> None:
    """``save_pretrained``, without its bar."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder, max_shard_size=shard_size)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def save_configuration(model: PreTrainedModel, folder: Path) -> None:
    """What ``save_pretrained`` writes beside weights: configurations of the model and of its generation."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        quantizer: Any = model.hf_quantizer
        model.__dict__["hf_quantizer"] = NoWeights(quantizer.quantization_config)
        try:
            save_folder(model, Path(beside))
        finally:
            model.__dict__["hf_quantizer"] = quantizer
        for path in Path(beside).iterdir():
            if path.suffix != ".safetensors":
                os.replace(path, folder / path.name)


def copy_companions(source: Path, out: Path) -> None:
    """Copy what a model folder holds beside weights and configuration: tokenizer, pooling, ...

    Raises:
        LexibitError: one of them is a link out of the folder.
    """
    for path in companions(source):
        inside = path.relative_to(source)
        if not (out / inside).exists():
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            try:
                content = path.open("rb")
            except OSError as error:
                raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
            with content, (out / inside).open("wb") as copy:
                shutil.copyfileobj(content, copy)


def companions(source: Path) -> list[Path]:
    """The files that :func:`copy_companions` copies, if they are not there already.

    Raises:
        LexibitError: one of them is a link out of the folder, by which a stranger's folder would bring in a
            file of this machine. In the hub's cache, links to files of the same repository are the rule.
    """
    cached = source.parent.name == "snapshots" and (source.parent.parent / "blobs").is_dir()
    root = (source.parent.parent if cached else source).resolve()
    found = []
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if any(part.startswith(".") for part in inside.parts) or inside.parts[0] in (*TRAINING, CALIBRATION):
            continue
        # weights in a sub-folder (a dense layer after the encoder, say) belong to another module
        is_weights = path.suffix in WEIGHT_FILES or path.name.endswith(".index.json")
        is_weights = is_weights and (len(inside.parts) == 1 or inside.parts[0] in _OTHER_FRAMEWORKS)
        if path.is_file() and not is_weights:
            if not path.resolve().is_relative_to(root):
                raise LexibitError(f"{path}: is a link out of the folder: put the file itself in its place")
            found.append(path)
    return found


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that appears at ``out`` only when the work inside ended well.

    Raises:
        LexibitError: ``out`` exists, or cannot be written.
    """
    if occupied(out):
        raise exists_already(out)
    with parents_of(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        except OSError as error:
            raise LexibitError(f"{out}: cannot be written: {error.strerror or error}") from error
        try:
            yield staged
            finish_folder(staged)
            os.replace(staged, out)
            sync(out.parent)
        except (OSError, SafetensorError) as error:
            if not of_the_disk(error):
                raise
            raise cannot_write(out, error) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
