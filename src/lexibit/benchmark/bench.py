"""Everyone in turn, in one process: medians and quartiles of the same forward passes."""

from __future__ import annotations

import copy
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lexibit.benchmark.contestant import Contestant
from lexibit.benchmark.peers import Peers
from lexibit.errors import LexibitError
from lexibit.nn import codebooks
from lexibit.nn.modes import evaluating
from lexibit.ops import COMPUTE, native
from lexibit.optimize import optimize
from lexibit.progress import progress_bar
from lexibit.quantize import dequantize

FLOAT32 = "float32"
LENGTHS = (16, 128)
_WARM_UP = 3  # rounds that do not count


@dataclass(frozen=True)
class Timing:
    """One contestant on inputs of one shape.

    Attributes:
        name: of the contestant.
        threads: how many computed.
        texts, tokens: of the input.
        seconds: the median.
        low, high: the quartiles, seconds.
        times: how many times as fast as float32, medians.
        cosine: of its outputs to those of float32, the mean over the first output's vectors.
    """

    name: str
    threads: int
    texts: int
    tokens: int
    seconds: float
    low: float
    high: float
    times: float
    cosine: float


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        machine: the CPU and the versions.
        bytes: of each contestant's weights: in memory, or in the file that it was loaded from.
        rounds: how many times everything ran.
        timings: in the order in which they were asked for.
    """

    machine: dict[str, Any]
    bytes: dict[str, int]
    rounds: int
    timings: list[Timing]


def bench(
    model: PreTrainedModel,
    *,
    texts: Sequence[int] = (1, 8),
    tokens: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    others: bool = False,
    rounds: int = 15,
    seed: int = 0,
    progress: bool = True,
) -> Bench:
    """Time a quantized model's forward pass against float32, on random tokens, in this process.

    The float32 model has the very weights that the codes stand for. In each round everyone runs once, in an
    order drawn anew, so that what else the machine does meets all alike.

    Args:
        model: with weights in codes.
        texts: batch sizes.
        tokens: lengths; every batch size is measured with every length. 16 and 128 if not given, or as many
            as the model takes.
        threads: how many threads compute; as many as PyTorch uses if not given.
        others: whether other tools take part (see :mod:`lexibit.benchmark.peers`).
        rounds: how many times each runs, after some that do not count.
        seed: of the tokens and the order.
        progress: whether to draw a progress bar on the terminal.

    Raises:
        LexibitError: a model without weights in codes, texts that are too long for it, or a tool that is
            missing.
    """
    if not codebooks(model):
        raise LexibitError(f"{type(model).__name__} has no weights in codes: quantize it first")
    longest = _longest(model)
    if tokens is None:
        tokens = sorted({min(length, longest or length) for length in LENGTHS})
    if longest and max(tokens) > longest:
        raise LexibitError(f"texts of {max(tokens)} tokens: the model takes {longest} at most")
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, length) for count in texts for length in tokens]
    ids = [torch.randint(5, model.config.vocab_size, shape, generator=generator) for shape in shapes]
    before, found, sizes = torch.get_num_threads(), list[Timing](), dict[str, int]()
    counts = list(threads or [before])
    order = random.Random(seed)
    with evaluating(model), tempfile.TemporaryDirectory() as folder, progress_bar(progress) as drawn:
        floats, ours = _ours(model)
        peers = Peers(floats, Path(folder)) if others else None
        task = drawn.add_task("bench", total=len(counts) * len(shapes) * (rounds + _WARM_UP))
        try:
            for count in counts:
                torch.set_num_threads(count)
                contestants = ours + (peers.contestants(count) if peers else [])
                sizes = {one.name: one.nbytes for one in contestants}
                for part in ids:
                    found += _timed(contestants, part, count, rounds, order, lambda: drawn.advance(task))
        finally:
            torch.set_num_threads(before)
    return Bench(machine(), sizes, rounds, found)


def _longest(model: PreTrainedModel) -> int | None:
    """How many tokens a model takes at most, if it says so."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa begins to count behind the row of padding
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) and positions:
            return positions - int(module.padding_idx) - 1
    return positions


def _ours(model: PreTrainedModel) -> tuple[PreTrainedModel, list[Contestant]]:
    """The float model, and what we make of it."""
    floats = copy.deepcopy(model)
    dequantize(floats)
    ours: dict[str, PreTrainedModel] = {FLOAT32: floats}
    for compute in COMPUTE:
        if native.supports(compute) or compute in (FLOAT32, "int8"):
            ours[f"lexibit, {compute}"] = copy.deepcopy(model)
            optimize(ours[f"lexibit, {compute}"], compute)
    return floats, [Contestant.of(name, one) for name, one in ours.items()]


def _timed(
    contestants: list[Contestant],
    ids: Tensor,
    threads: int,
    rounds: int,
    order: random.Random,
    step: Callable[[], None],
) -> list[Timing]:
    seconds: dict[str, list[float]] = {one.name: [] for one in contestants}
    outputs: dict[str, Tensor] = {}
    for turn in range(rounds + _WARM_UP):
        for one in order.sample(contestants, len(contestants)):
            start = time.perf_counter()
            outputs[one.name] = one.run(ids)
            if turn >= _WARM_UP:
                seconds[one.name].append(time.perf_counter() - start)
        step()
    base, exact = median(seconds[FLOAT32]), outputs[FLOAT32].float()
    found = []
    for name, some in seconds.items():
        low, middle, high = quantiles(some, n=4, method="inclusive") if len(some) > 1 else some * 3
        cosine = F.cosine_similarity(outputs[name].float(), exact, dim=-1).mean().item()
        texts, tokens = ids.shape
        found.append(Timing(name, threads, texts, tokens, middle, low, high, base / middle, cosine))
    return found


def machine() -> dict[str, Any]:
    """The CPU, the kernels, the versions, and how OpenMP's threads wait."""
    return {
        "cpu": _cpu(),
        "kernels": native.chosen().name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
