"""Files to files: a checkpoint quantized tensor by tensor, of which one part at a time is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

import lexibit
from lexibit import format, memory, workers
from lexibit.checkpoint.layout import Layout, Origin
from lexibit.checkpoint.tensor_file import TensorFile
from lexibit.checkpoint.unfinished import Unfinished
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.fitting import in_bands, quantize_planned
from lexibit.plan import PlannedWeight
from lexibit.progress import progress_bar

# What a job takes, at most, and each of its weights: measured, as docs/performance.md tells.
_BYTES = 100 * 10**6
_BYTES_PER_WEIGHT, _WEIGHED, _WITH_OUTLIERS = 10, 27, 110
_UNKNOWN = "0" * 32  # stands for a checksum until it is known

Parts = dict[str, Tensor]
Workers = Callable[[Callable[["Job"], Parts], Sequence["Job"]], Generator[tuple["Job", Parts]]]


@dataclass(frozen=True)
class Job:
    """A weight to quantize, by whoever can read its file.

    Attributes:
        planned: the weight, free of any model.
        name: under which it is stored.
        origin: where its values are.
        seed: of any random choice.
    """

    planned: PlannedWeight
    name: str
    origin: Origin
    seed: int

    @property
    def memory(self) -> int:
        """Bytes that it takes at most."""
        spec, recipe = self.planned.spec, self.planned.recipe
        each = _WEIGHED if recipe.importance else _BYTES_PER_WEIGHT
        return _BYTES + prod(spec.shape) * (_WITH_OUTLIERS if spec.outliers else each)


def fit(job: Job) -> Parts:
    """The stored tensors of a job's weight."""
    found = quantize_planned(job.planned, _values(job), seed=job.seed)
    return found.tensors(job.name)


def _values(job: Job) -> Tensor:
    """A job's weight; in float32 already if it will be needed so as a whole, to let go of the file first."""
    value = job.origin.read()
    whole = value.dtype.itemsize < 4 and not in_bands(job.planned)
    return value.float() if whole else value


def local(limit: int | None) -> Workers:
    """Workers of this machine, which take ``limit`` bytes at most; what is free if None."""

    def work(function: Callable[[Job], Parts], jobs: Sequence[Job]) -> Generator[tuple[Job, Parts]]:
        for job in jobs:
            if limit is not None and job.memory > limit:
                raise LexibitError(
                    f"{job.planned.name} takes up to {job.memory / 1e6:.1f} MB while it is quantized, "
                    f"--memory allows {limit / 1e6:.1f}: allow more, or exclude it"
                )
        return workers.in_threads(function, jobs, memory.available() if limit is None else limit)

    return work


def cluster(address: str) -> Workers:
    """The machines of a Ray cluster."""
    return partial(workers.on_ray, address=address)


def key(layout: Layout, config: LexibitConfig) -> str:
    """What tells a piece of work from others: the float files as they are, what is asked, and versions."""
    files = {origin.file for origin in (*layout.weights.values(), *layout.kept.values())}
    files |= {
        source for planned in layout.plan.weights if isinstance(source := planned.recipe.weighing(), Path)
    }
    document = {
        "versions": [lexibit.__version__, format.VERSION, torch.__version__, numpy.__version__],
        "config": config.to_dict(),
        "files": sorted((str(file.resolve()), *_state(file)) for file in files),
        "tensors": {
            file: {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
            for file, tensors in layout.files.items()
        },
    }
    return hashlib.blake2b(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _state(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns


def write(
    layout: Layout, work: Unfinished, config: LexibitConfig, workers: Workers, *, progress: bool
) -> None:
    """Write the safetensors files of a layout, and their index if there are several.

    What the work has finished already, and is as it was written, stays.

    Raises:
        LexibitError: a weight that cannot be quantized.
        OSError: the disk.
    """
    tensors = layout.tensors
    unknown = dict.fromkeys([*tensors, *layout.copies], _UNKNOWN)
    with ExitStack() as stack:
        place: dict[str, TensorFile] = {}
        for name, inside in layout.files.items():
            header = format.metadata(layout.index, unknown)
            file = stack.enter_context(TensorFile(work.folder / name, inside, header))
            place |= dict.fromkeys(inside, file)
        finished = {
            name: noted
            for name, noted in work.finished.items()
            if name in place and place[name].holds(name, noted)
        }

        def put(parts: Mapping[str, Tensor]) -> None:
            for name, tensor in parts.items():
                place[name].write(name, tensor)
            noted = format.checksums(parts)
            work.finish(noted)
            finished.update(noted)

        jobs = [
            Job(planned.alone(), name, layout.weights[name], config.seed)
            for planned in layout.plan.weights
            if not finished.keys() >= set(planned.spec.keys(name := layout.names[planned.name]).values())
        ]
        with progress_bar(progress) as bar, closing(workers(fit, jobs)) as results:
            task = bar.add_task("quantizing", total=len(layout.plan.weights))
            bar.advance(task, len(layout.plan.weights) - len(jobs))
            for _, parts in results:
                put(parts)
                bar.advance(task)
                del parts  # before the next ones are waited for
        for name, origin in layout.kept.items():
            if name not in finished:
                put({name: origin.read()})
        noted = {name: finished[name] for name in tensors}
        noted |= {copy: finished[name] for copy, name in layout.copies.items()}
        for file in set(place.values()):
            file.finish(format.metadata(layout.index, noted))
    if len(layout.files) > 1:
        _write_index(layout, work.folder / SAFE_WEIGHTS_INDEX_NAME)


def _write_index(layout: Layout, path: Path) -> None:
    """The list of shards, as ``save_pretrained`` writes it."""
    tensors = layout.tensors
    if layout.model is None:
        parameters = sum(prod(tensors[name].shape) for name in layout.kept)
    else:
        parameters = layout.model.num_parameters()
    document: dict[str, Any] = {
        "metadata": {
            "total_parameters": parameters,
            "total_size": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        },
        "weight_map": {name: file for file, inside in layout.files.items() for name in inside},
    }
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
