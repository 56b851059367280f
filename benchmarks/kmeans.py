"""One-dimensional k-means: lexibit against flash1dkmeans and scikit-learn, side by side.

    python benchmarks/kmeans.py --shape 1x2359296 --bits 3 --repeats 5

Every method starts from the same unsorted float32 values and ends with levels and codes.  The
repeats are interleaved, so that a busy machine slows all methods alike; medians are reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

import numpy as np
import torch

from lexibit.schemes import kmeans1d
from lexibit.schemes.line.codes import nearest

Array = np.ndarray[Any, np.dtype[Any]]
Method = Callable[[Array, int], tuple[Array, Array]]


def exact(x: Array, k: int, weights: Array | None = None) -> tuple[Array, Array]:
    levels = kmeans1d.optimal(x, k, weights)
    return levels, nearest(x, levels)


def companding(x: Array, k: int) -> tuple[Array, Array]:
    levels = kmeans1d.companding(x, k, 20)
    return levels, nearest(x, levels)


def paper(x: Array, k: int) -> tuple[Array, Array]:
    levels = kmeans1d.plusplus(x, k, 3, np.random.default_rng(0))
    return levels, nearest(x, levels)


def flash(x: Array, k: int) -> tuple[Array, Array]:
    module = import_module("flash1dkmeans")
    results = [module.kmeans_1d(row, k, random_state=0) for row in x]
    levels = np.stack([np.asarray(centroids, dtype=np.float64) for centroids, _ in results])
    return np.sort(levels, axis=1), np.stack([labels for _, labels in results])


def scikit(x: Array, k: int, steps: int) -> tuple[Array, Array]:
    """One k-means++ start and at most `steps` Lloyd steps on float32 [n, 1]; labels are the codes."""
    cluster = import_module("sklearn.cluster")
    levels, codes = [], []
    for row in x:
        peer = cluster.KMeans(k, init="k-means++", n_init=1, max_iter=steps, random_state=0)
        with warnings.catch_warnings():  # it says that it did not converge
            warnings.simplefilter("ignore")
            peer.fit(row[:, None])
        levels.append(peer.cluster_centers_[:, 0].astype(np.float64))
        codes.append(peer.labels_)
    return np.stack(levels), np.stack(codes)


def squared_error(x: Array, levels: Array) -> float:
    """Squared error of x [G, S] with the nearest of the levels [G, k], in any order."""
    total = 0.0
    for row, level in zip(x, np.sort(levels, axis=1), strict=True):
        codes = nearest(row[None], level[None])[0]
        total += float(np.square(row - level[codes]).sum())
    return total


def available(name: str, package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        print(f"{name}: not installed, left out (pip install {name})")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", default="1x2359296", help="groups x values (1x2359296)")
    parser.add_argument("--bits", type=int, default=3, help="2 ** bits levels (3)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    groups, size = (int(part) for part in args.shape.split("x"))
    k = 2**args.bits
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((groups, size)) * 0.03).astype(np.float32)
    weights = rng.exponential(size=x.shape).astype(np.float32)

    methods: dict[str, Method] = {
        "lexibit optimal": exact,
        "lexibit optimal, weighted *": lambda x, k: exact(x, k, weights),
        "lexibit companding, 20 steps": companding,
        "lexibit k-means++, 3 steps": paper,
    }
    packages = ["numpy", "torch"]
    peers: dict[str, dict[str, Method]] = {
        "flash1dkmeans": {"flash1dkmeans": flash},
        "scikit-learn": {
            "scikit-learn, max_iter=3": lambda x, k: scikit(x, k, 3),
            "scikit-learn, max_iter=300": lambda x, k: scikit(x, k, 300),
        },
    }
    for package, lines in peers.items():
        if available(package, {"scikit-learn": "sklearn.cluster"}.get(package, package)):
            methods |= lines
            packages.append(package)

    print(", ".join(f"{name} {metadata.version(name)}" for name in packages))
    print(f"{os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads")
    print(f"{groups} x {size} values, k = {k}, medians of {args.repeats} interleaved repeats\n")

    tiny = x[:1, : min(size, 10_000)]
    for name, method in methods.items():  # compilation and imports are not timed
        if "weighted" not in name:
            method(tiny, min(k, 8))
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    errors: dict[str, float] = {}
    for repeat in range(args.repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            levels, _ = method(x, k)
            seconds[name].append(time.perf_counter() - start)
            if repeat == 0:
                errors[name] = squared_error(x, levels)

    base = statistics.median(seconds["lexibit optimal"])
    print(f"{'method':<30}{'seconds':>10}{'ratio':>8}{'squared error':>18}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<30}{median:>10.4f}{median / base:>8.1f}{errors[name]:>18.8g}")
    print("\n* minimizes a weighted error, so its unweighted error is higher")


if __name__ == "__main__":
    main()
