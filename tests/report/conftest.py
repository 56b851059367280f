"""Results of a study that never ran."""

import json
import math

import pandas as pd
import pytest

EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


@pytest.fixture
def study_results():
    """A function that makes the results of a study: 19 cells a model, task and seed with the defaults."""

    def make(
        models=("bert",), tasks=("mrpc", "cola"), schemes=("kmeans", "linear"), bits=(1, 2, 4), seeds=(0, 1)
    ):
        lines = []
        for model in models:
            for place, task in enumerate(tasks):
                for seed in seeds:
                    quantized = [(s, b, t) for s in schemes for b in bits for t in (False, True)]
                    for scheme, width, tuned in [("float", 32, False), *quantized]:
                        loss = 0 if width == 32 else (8 if tuned else 16) / width
                        score = 80 + place - loss - (scheme == "linear") + seed / 10
                        lines.append(
                            {
                                "cell": f"{len(lines):016x}",
                                "study": "glue",
                                "model": model,
                                "task": task,
                                "scheme": scheme,
                                "bits": width,
                                "groups": None if width == 32 else "row",
                                "importance": None,
                                "tuned": tuned,
                                "seed": seed,
                                "metric": "f1",
                                "score": score,
                                "low": score - 2,
                                "high": score + 2,
                                "higher": True,
                                "examples": 408,
                                "split": "dev",
                                "bytes": 1_000_000 * width,
                                "parameters": 8_000_000,
                                "bits_per_weight": width + 0.0 if width == 32 else width + 0.1,
                                "bits_per_parameter": width + 0.2,
                                "finetune_seconds": 100.0,
                                "quantize_seconds": math.nan if width == 32 else 10.0,
                                "tune_seconds": 30.0 if tuned else math.nan,
                                "evaluate_seconds": 5.0,
                                "peak_memory": 2_000_000_000,
                                "model_key": None if width == 32 else f"key{len(lines)}",
                                "commands": f"lexibit quantize {model} out\nlexibit evaluate out",
                                "versions": json.dumps({"torch": "2.13"}),
                                "machine": "8 cores",
                                "at": "2026-01-01T00:00:00",
                                "error": None,
                            }
                        )
        return pd.DataFrame(lines)

    return make


@pytest.fixture
def described():
    """A function that gives a description of two weights, as if they were measured."""

    def make(floats=True, importance=None, name="encoder.layer.{}.query.weight"):
        histogram = {
            "low": -1.0,
            "high": 1.0,
            "counts": [1, 5, 9, 4],
            "below": 0,
            "above": 2,
            "not_finite": 0,
        }
        return [
            {
                "name": name.format(layer),
                "layer": name.format(layer).rpartition(".query")[0],
                "kind": "query",
                "shape": [4, 8],
                "scheme": "kmeans",
                "bits": 1,
                "groups": 4,
                "stored_bits": 1.5,
                "importance": importance,
                "relative_error": 0.1 + layer if floats else None,
                "largest_error": 0.5 if floats else None,
                "histogram": histogram | {"counts": [1, 5 + layer, 9, 4]} if floats else None,
                "levels": [
                    {"median": -0.5, "low": -0.6, "high": -0.4},
                    {"median": 0.5, "low": 0.4, "high": 0.6},
                ],
            }
            for layer in (0, 1)
        ]

    return make


@pytest.fixture
def evil():
    """A name that is code, if it is not escaped."""
    return EVIL
