"""A BERT-base-sized model through the main job: seconds, peak memory, bytes.

Every step runs in a process of its own, so that its peak memory is its own. The weights are random (seeded,
normal with a deviation of 0.02): published ones are not needed to measure time and size.

    python benchmarks/bert_base.py --bits 3 --scheme kmeans
    python benchmarks/bert_base.py --bits 3 --all
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def resident(kind: str) -> int:
    """Bytes resident now (VmRSS) or at most so far (VmHWM), from /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which Linux has")


def make(folder: str) -> dict[str, float]:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    BertForMaskedLM(BertConfig()).save_pretrained(folder)
    return {"float bytes": Path(folder, "model.safetensors").stat().st_size}


def quantize(source: str, out: str, options: str) -> dict[str, float]:
    from transformers import BertForMaskedLM

    import lexibit

    model = BertForMaskedLM.from_pretrained(source)
    # read every page, so that the float model is counted whole
    sum(float(parameter.sum()) for parameter in model.parameters())
    before = resident("VmRSS")
    start = time.perf_counter()
    plan = lexibit.quantize(model, lexibit.LexibitConfig(**json.loads(options)), progress=False)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    model.save_pretrained(out)
    size = Path(out, "model.safetensors").stat().st_size
    return {
        "seconds to quantize": seconds,
        "peak memory over the loaded float model": peak - before,
        "stored bits per weight": plan.bits_per_weight,
        "file bytes": size,
        "times smaller": Path(source, "model.safetensors").stat().st_size / size,
    }


def load(folder: str) -> dict[str, float]:
    import torch
    from transformers import BertForMaskedLM

    import lexibit  # noqa: F401 (registers the loader)

    before = resident("VmRSS")
    start = time.perf_counter()
    model = BertForMaskedLM.from_pretrained(folder)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    ids = torch.randint(0, model.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids)
        start = time.perf_counter()
        model(ids)
    return {
        "seconds to load": seconds,
        "peak memory of loading": peak,
        "seconds, 1 x 128": time.perf_counter() - start,
    }


def step(name: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def one(options: dict[str, object]) -> None:
    """One scheme, from the float folder to the loaded model."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = f"{scratch}/float", f"{scratch}/packed"
        rows = step("make", source)
        rows |= step("quantize", source, out, json.dumps(options))
        rows |= step("load", out)
    for name, value in rows.items():
        shown = f"{value / 1e6:.1f} MB" if "bytes" in name or "memory" in name else f"{value:.3f}"
        print(f"{name:42}{shown:>12}")


def every(bits: int) -> None:
    """Every scheme in the form of its paper: seconds and memory of quantizing, size."""
    from lexibit.comparison import CONTENDERS

    print(f"{'scheme':26}{'groups':>12}{'seconds':>9}{'peak MB':>9}{'stored bits':>13}{'file MB':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        step("make", f"{scratch}/float")
        for contender in CONTENDERS:
            for groups in contender.own:
                options = {"scheme": contender.scheme, "bits": bits, "groups": groups}
                options["options"] = dict(contender.options)
                row = step("quantize", f"{scratch}/float", f"{scratch}/packed", json.dumps(options))
                print(
                    f"{contender.name:26}{groups:>12}{row['seconds to quantize']:>9.1f}"
                    f"{row['peak memory over the loaded float model'] / 1e6:>9.0f}"
                    f"{row['stored bits per weight']:>13.3f}{row['file bytes'] / 1e6:>9.1f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--scheme", default="kmeans")
    parser.add_argument("--groups", default="auto")
    parser.add_argument("--all", action="store_true", help="every scheme in the form of its paper")
    parser.add_argument("--step", choices=["make", "quantize", "load"], help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps({"make": make, "quantize": quantize, "load": load}[arguments.step](*arguments.rest)))
        return
    options = {"bits": arguments.bits, "scheme": arguments.scheme, "groups": arguments.groups}
    print(f"{'every scheme' if arguments.all else options}, {os.cpu_count()} CPUs, {platform.machine()}")
    if arguments.all:
        every(arguments.bits)
    else:
        one(options)


if __name__ == "__main__":
    main()
