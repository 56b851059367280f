"""Checkpoints of growing size, files to files: seconds, peak resident memory, and what reading alone costs.

Makes Llama-shaped checkpoints in bfloat16 with random weights, in shards, and gives each to ``lexibit
quantize`` in a process of its own. Beside it, in a process of its own, the least that a scheme could do: read
every tensor, sort it, and write as many bytes as lexibit does, with as many threads.

    python benchmarks/big_checkpoint.py FOLDER --gigabytes 1 2 4 8 --json big.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
LAYER = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # bytes
ENDS = 2 * 2 * 32000 * 4096
SCHEMES = {
    "k-means, a table a matrix": ["--scheme", "kmeans"],
    "k-means as the paper has it": ["--scheme", "kmeans", "--option", "init=k-means++"],
    "k-means, as recommended": [],
    "LQ, a scale a row": ["--scheme", "lq", "--groups", "row", "--levels-dtype", "float16"],
}


def make(folder: Path, gigabytes: float) -> None:
    """A checkpoint of about that many bytes: all shards but the last hold a layer each."""
    layers = max(round((gigabytes * 1e9 - ENDS) / LAYER), 1)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, dtype=torch.bfloat16, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "ends"
        shards.setdefault(part, {})[name] = tensor.shape
    places = {}
    generator = torch.Generator().manual_seed(0)
    for number, shapes in enumerate(shards.values()):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def least(folder: Path, out: Path, nbytes: int) -> None:
    """Read and sort every tensor of a folder, and write some bytes."""

    def work(job: tuple[Path, str]) -> int:
        file, name = job
        with safe_open(file, framework="pt") as opened:
            values = opened.get_tensor(name).float().numpy().ravel()
        np.sort(values)
        return values.size

    jobs = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            jobs += [(file, name) for name in opened.keys()]  # noqa: SIM118
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        total = sum(pool.map(work, jobs))
    with out.open("wb") as written:
        for _ in range(nbytes // (1 << 24) + 1):
            written.write(os.urandom(1 << 10) * (1 << 14))
        written.flush()
        os.fsync(written.fileno())
    print(total)


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} failed: {status}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for checkpoints; emptied of them again")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--memory", default="1.5GB")
    parser.add_argument(
        "--schemes", nargs="+", default=list(SCHEMES)[:2] + list(SCHEMES)[3:], choices=list(SCHEMES)
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", nargs=2, metavar=("FOLDER", "GIGABYTES"), help=argparse.SUPPRESS)
    parser.add_argument("--least", nargs=3, metavar=("FOLDER", "OUT", "BYTES"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.least:
        least(Path(asked.least[0]), Path(asked.least[1]), int(asked.least[2]))
        return
    if asked.make:
        make(Path(asked.make[0]), float(asked.make[1]))
        return
    rows = []
    for gigabytes in asked.gigabytes:
        source, out = asked.folder / f"float-{gigabytes:g}", asked.folder / "packed"
        if not source.exists():
            # the peak of a process is never below that of the one that started it: this one stays small
            timed([sys.executable, __file__, str(asked.folder), "--make", str(source), str(gigabytes)])
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        for name in asked.schemes:
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "lexibit", "quantize", str(source), str(out)]
            command += ["--bits", str(asked.bits), "--memory", asked.memory, *SCHEMES[name]]
            seconds, peak = timed(command)
            written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            rows.append({"scheme": name, "bytes": size, "written": written, "seconds": seconds, "peak": peak})
            print(
                f"{size / 1e9:5.2f} GB  {name:30} {seconds:7.1f} s  {size / 1e6 / seconds:6.1f} MB/s  "
                f"peak {peak / 1e9:.2f} GB  written {written / 1e9:.2f} GB",
                flush=True,
            )
        command = [sys.executable, __file__, str(asked.folder), "--least", str(source)]
        seconds, peak = timed([*command, str(asked.folder / "bytes"), str(written)])
        (asked.folder / "bytes").unlink()
        rows.append({"scheme": "least", "bytes": size, "written": written, "seconds": seconds, "peak": peak})
        print(
            f"{size / 1e9:5.2f} GB  {'read, sort, write':30} {seconds:7.1f} s  peak {peak / 1e9:.2f} GB",
            flush=True,
        )
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(source)
        if asked.json is not None:
            asked.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
