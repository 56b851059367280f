"""Binary codes: lexibit's alternating rounds against least squares a row in NumPy, side by side.

    OMP_NUM_THREADS=2 python benchmarks/binary.py --shape 3072x768 --bits 3 --rounds 15

One float32 matrix, scales per row, every method from unsorted weights to what they decode to. For scale, one
plain pass of k-means (nearest of 2^bits levels, then their means) over the same weights. Repeats are
interleaved, so that a busy machine slows all alike; medians are reported. Peak memory is that of a process of
its own, above what it holds before it begins.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lexibit import Recipe, quantize_tensor

Array = np.ndarray[Any, np.dtype[Any]]


def matrix(shape: tuple[int, int]) -> Array:
    return (np.random.default_rng(0).standard_normal(shape) * 0.03).astype(np.float32)


def importance(shape: tuple[int, int]) -> Array:
    return np.random.default_rng(1).exponential(size=shape).astype(np.float32)


def ours(w: Array, bits: int, rounds: int, m: Array | None = None) -> Array:
    """What it decodes to."""
    recipe = Recipe("binary", bits, "row", {"rounds": rounds})
    given = None if m is None else torch.from_numpy(m)
    packed = quantize_tensor(torch.from_numpy(w), recipe, importance=given)
    return np.asarray(packed.decode())


def numpy_rows(w: Array, bits: int, rounds: int) -> Array:
    """The papers' algorithm as one would first write it: a row at a time, `lstsq` and a search."""
    every = np.where(np.arange(2**bits)[:, None] >> np.arange(bits) & 1, 1.0, -1.0)
    out = np.empty(w.shape, np.float32)
    for row, x in enumerate(w):
        planes = np.empty((len(x), bits))
        residual = x.astype(np.float64)
        for plane in range(bits):
            planes[:, plane] = np.where(residual >= 0, 1.0, -1.0)
            residual -= np.abs(residual).mean() * planes[:, plane]
        for _ in range(rounds):
            scales = np.linalg.lstsq(planes, x, rcond=None)[0]
            levels = every @ scales
            order = np.argsort(levels)
            middles = (levels[order][1:] + levels[order][:-1]) / 2
            planes = every[order[np.searchsorted(middles, x, side="right")]]
        out[row] = planes @ np.linalg.lstsq(planes, x, rcond=None)[0]
    return out


def one_pass(w: Array, bits: int) -> Array:
    """One Lloyd step over all weights, from evenly spaced levels."""
    x = w.ravel()
    levels = np.linspace(x.min(), x.max(), 2**bits, dtype=np.float32)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    means = np.bincount(codes, weights=x, minlength=len(levels)) / np.maximum(np.bincount(codes), 1)
    return means.astype(np.float32)[codes].reshape(w.shape)


def resident(kind: str) -> int:
    """Bytes resident now (VmRSS) or at most so far (VmHWM), from /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which Linux has")


def peak(shape: tuple[int, int], bits: int, rounds: int) -> float:
    """Peak memory of quantizing, above the matrix itself, as a multiple of the matrix."""
    w = torch.from_numpy(matrix(shape))
    recipe = Recipe("binary", bits, "row", {"rounds": rounds})
    quantize_tensor(w[:64], recipe)
    before = resident("VmRSS")
    quantize_tensor(w, recipe)
    return (resident("VmHWM") - before) / (w.numel() * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", default="3072x768", help="rows x columns (3072x768)")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows, columns = (int(part) for part in args.shape.split("x"))
    shape, bits, rounds = (rows, columns), args.bits, args.rounds
    if args.peak:
        print(peak(shape, bits, rounds))
        return
    w, m = matrix(shape), importance(shape)
    methods: dict[str, Callable[[], Array]] = {
        "lexibit, alternating": lambda: ours(w, bits, rounds),
        "lexibit, alternating, weighted": lambda: ours(w, bits, rounds, m),
        "one plain pass of k-means": lambda: one_pass(w, bits),
        "NumPy, least squares a row": lambda: numpy_rows(w, bits, rounds),
    }
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "torch"))
    print(f"{versions}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{rows} x {columns} values, {bits} bits, {rounds} rounds, medians of {args.repeats} repeats\n")
    ours(w[:64], bits, rounds)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    errors: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            decoded = method()
            seconds[name].append(time.perf_counter() - start)
            errors[name] = float(np.square(decoded - w, dtype=np.float64).sum() / np.square(w).sum())
    base = statistics.median(seconds["lexibit, alternating"])
    print(f"{'method':<34}{'seconds':>10}{'spread':>18}{'ratio':>8}{'relative error':>17}")
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"{min(times):.3f} to {max(times):.3f}"
        print(f"{name:<34}{median:>10.3f}{spread:>18}{median / base:>8.2f}{errors[name]:>17.5f}")
    command = [sys.executable, __file__, "--peak", "--shape", args.shape, "--bits", str(bits)]
    done = subprocess.run([*command, "--rounds", str(rounds)], capture_output=True, text=True, check=True)
    print(
        f"\npeak memory of lexibit, alternating, above the matrix: {float(done.stdout):.2f} times the matrix"
    )


if __name__ == "__main__":
    main()
