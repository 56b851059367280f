"""Files to files: a checkpoint quantized tensor by tensor, of which one part at a time is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, Protocol

import numpy
import safetensors
import scipy
import torch
import transformers
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

import lexibit
from lexibit import format, memory, workers
from lexibit.checkpoint.layout import Layout, Origin
from lexibit.checkpoint.tensor_file import TensorFile
from lexibit.checkpoint.unfinished import Unfinished
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.fitting import is_banded, quantize_planned
from lexibit.plan import PlannedWeight
from lexibit.progress import progress_bar

# What a job takes, at most, and each of its weights: measured, as docs/performance.md tells.
_BYTES = 100 * 10**6
_BYTES_PER_WEIGHT, _WEIGHED, _WITH_OUTLIERS = 10, 27, 110
_UNKNOWN = "0" * 32  # stands for a checksum until it is known

Parts = dict[str, Tensor]


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
    whole = value.dtype.itemsize < 4 and not is_banded(job.planned)
    return value.float() if whole else value


class Workers(Protocol):
    """Who quantizes."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse jobs that they cannot do, before any work.

        Raises:
            LexibitError: names the weight and the remedy.
        """

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, Parts]]:
        """The results of :func:`fit` as they come."""


@dataclass(frozen=True)
class Local:
    """Threads of this process, whose jobs take ``limit`` bytes at most together; what is free if None."""

    limit: int | None = None

    def check(self, jobs: Sequence[Job]) -> None:
        """See that no job alone takes more."""
        for job in jobs:
            if self.limit is not None and job.memory > self.limit:
                raise LexibitError(
                    f"{job.planned.name} takes up to {ceil(job.memory / 1e6)} MB while it is quantized, "
                    f"--memory allows {self.limit / 1e6:.3g}: allow more, or exclude it"
                )

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, Parts]]:
        """The results as they come."""
        limit = memory.available() if self.limit is None else self.limit
        return workers.in_threads(fit, jobs, limit)


@dataclass(frozen=True)
class Cluster:
    """The machines of a Ray cluster, by its address."""

    address: str

    def check(self, jobs: Sequence[Job]) -> None:
        """See that the cluster is there, and has a machine with memory for the largest job."""
        most = workers.ray_memory(self.address)
        for job in jobs:
            if job.memory > most:
                raise LexibitError(
                    f"{job.planned.name} takes up to {ceil(job.memory / 1e6)} MB while it is quantized, and "
                    f"no machine of --ray {self.address} offers more than {most // 10**6}: start one with "
                    "'ray start --memory', or exclude it"
                )

    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, Parts]]:
        """The results as they come."""
        return workers.on_ray(fit, jobs, self.address)


def jobs_of(layout: Layout, config: LexibitConfig) -> list[Job]:
    """A job for every weight."""
    named = [(planned, layout.names[planned.name]) for planned in layout.plan.weights]
    return [Job(planned.alone(), name, layout.weights[name], config.seed) for planned, name in named]


def key(layout: Layout, config: LexibitConfig) -> str:
    """What tells a piece of work from others: the float files as they are, what is asked, and versions."""
    origins = layout.weights | layout.kept
    files = {origin.stored.file for origin in origins.values()}
    files |= {
        source for planned in layout.plan.weights if isinstance(source := planned.recipe.weighing(), Path)
    }
    document = {
        "versions": [lexibit.__version__, format.VERSION]
        + [package.__version__ for package in (torch, numpy, scipy, transformers, safetensors)],
        "config": config.to_dict(),
        "origins": {name: [str(o.stored.file), o.stored.name, str(o.dtype)] for name, o in origins.items()},
        "index": {name: spec.to_dict() for name, spec in layout.index.items()},
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
        LexibitError: a weight that cannot be quantized, or read.
        OSError: the disk.
    """
    tensors = layout.tensors
    unknown = dict.fromkeys([*tensors, *layout.copies], _UNKNOWN)
    files = {
        name: TensorFile(work.folder / name, inside, format.metadata(layout.index, unknown))
        for name, inside in layout.files.items()
    }
    place = {name: files[file] for file, inside in layout.files.items() for name in inside}
    finished = {
        name: noted
        for name, noted in work.finished.items()
        if name in place and place[name].holds(name, noted)
    }
    jobs = [
        job
        for job in jobs_of(layout, config)
        if not finished.keys() >= set(job.planned.spec.keys(job.name).values())
    ]
    with progress_bar(progress) as bar, closing(workers.run(jobs)) as results:
        task = bar.add_task("quantizing", total=len(layout.plan.weights))
        bar.advance(task, len(layout.plan.weights) - len(jobs))
        for _, parts in results:
            noted = {name: place[name].write(name, tensor) for name, tensor in parts.items()}
            del parts  # before the next ones are waited for
            work.finish(noted)
            finished |= noted
            bar.advance(task)
    for name, origin in layout.kept.items():
        if name not in finished:
            noted = {name: place[name].write_chunks(name, origin.chunks())}
            work.finish(noted)
            finished |= noted
    noted = {name: finished[name] for name in tensors}
    noted |= {copy: finished[name] for copy, name in layout.copies.items()}
    for file in files.values():
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
