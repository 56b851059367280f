"""How fast a quantized model runs, beside float32 and beside what other tools make of the same weights."""

from lexibit.benchmark.bench import Bench, Timing, bench

__all__ = ["Bench", "Timing", "bench"]
