"""Coverage-guided fuzzing of what reads quantized files: ``python tests/fuzz.py [SECONDS]``, with atheris.

Starts from the golden files of every version and from the attacks. A mutation changes the file's bytes, or
its header or index as JSON, with the frame around it made sound again, so that deeper checks are reached.
Every input must end in an error of ours that names the file, or in weights that can be decoded, and soon.
Anything else ends the run with a crash, and atheris writes the input to a file.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["lexibit"]):
    from lexibit import checkpoint, format
    from lexibit.errors import LexibitError
    from lexibit.weight import CodebookWeight

HERE = Path(__file__).parent
SLOW = 5.0  # seconds that no small file may take
INTERESTING: list[Any] = [
    0,
    -1,
    1,
    2,
    3,
    8,
    9,
    255,
    1 << 16,
    1 << 31,
    1 << 40,
    1 << 63,
    10**30,
    0.5,
    float("nan"),
    True,
    None,
    "",
    "table",
    "binary",
    "float16",
    "U8",
    "F32",
    [],
    {},
    [0, 0],
    [1, 1 << 20],
]

folder = Path(tempfile.mkdtemp(prefix="fuzz."))
file = folder / "model.safetensors"
counts: Counter[str] = Counter()
faults: Counter[str] = Counter()
slowest = 0.0


def split(data: bytes) -> tuple[Any, bytes] | None:
    """Header and data of a file whose frame is sound."""
    if len(data) < 8:
        return None
    (length,) = struct.unpack("<Q", data[:8])
    try:
        return json.loads(data[8 : 8 + length]), data[8 + length :]
    except ValueError:
        return None


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON document: what holds it, and its key there."""
    found: list[tuple[Any, Any]] = []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        found += places(value[key])
    return found


def change(document: Any, rng: random.Random) -> None:
    """Change a JSON document somewhere."""
    spots = places(document)
    if not spots:
        return
    holder, key = rng.choice(spots)
    way = rng.randrange(5)
    if way == 0:
        holder[key] = rng.choice(INTERESTING)
    elif way == 1 and isinstance(holder, dict):
        del holder[key]
    elif way == 2 and isinstance(holder[key], int):
        holder[key] += rng.choice([-1, 1, 7, -holder[key], 1 << rng.randrange(64)])
    elif way == 3:
        other, its = rng.choice(spots)
        holder[key] = json.loads(json.dumps(other[its]))
    elif isinstance(holder, dict):
        holder[str(key) + rng.choice(["_levels", "_mask", "x", ""])] = json.loads(json.dumps(holder[key]))


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Another file from a file."""
    rng = random.Random(seed)
    found = split(data)
    if found is None or rng.random() < 0.2:
        mutated: bytes = atheris.Mutate(data, most)
        return mutated
    header, body = found
    way = rng.randrange(3)
    if way == 0:
        body = atheris.Mutate(body, max(most - 4096, 16))
        if rng.random() < 0.5:
            body = (body + found[1])[: len(found[1])]  # as long as before
    elif way == 1:
        change(header, rng)
    else:
        try:
            index = json.loads(header["__metadata__"]["lexibit"])
            change(index, rng)
            header["__metadata__"]["lexibit"] = json.dumps(index)
        except (KeyError, TypeError, ValueError):
            change(header, rng)
    text = json.dumps(header).encode()
    return (struct.pack("<Q", len(text)) + text + body)[:most]


def read_all(data: bytes) -> None:
    """Give a file to everything that reads it."""
    global slowest
    file.write_bytes(data)
    start = time.perf_counter()
    for name, act in (
        ("read", lambda: format.read([file])),
        ("inspect", lambda: checkpoint.inspect(file)),
        ("verify", lambda: checkpoint.verify(file)),
    ):
        counts["inputs"] += name == "read"
        try:
            found = act()
        except LexibitError as error:
            counts[f"{name}: refused"] += 1
            faults[normal(str(error))] += 1
            if str(folder) not in str(error):
                raise AssertionError(f"names no file: {error}") from error
            continue
        counts[f"{name}: taken"] += 1
        for weight in found.values() if name == "read" and isinstance(found, dict) else ():
            if isinstance(weight, CodebookWeight) and weight.shape.numel() < 1 << 20:
                assert weight.decode().shape == weight.shape
    slowest = max(slowest, time.perf_counter() - start)
    assert slowest < SLOW, f"{slowest:.1f} s"


def normal(text: str) -> str:
    """An error without names and numbers."""
    text = text.replace(str(folder), "")
    text = re.sub(r"\{.*\}|\[.*\]|nan|inf|True|False|None", "*", text)
    return re.sub(r"'[^']*'|\"[^\"]*\"|-?\d+(\.\d+)?|\b\S*(layer|weight|bias|pruned)\S*", "*", text)[:60]


def report() -> None:
    """What was done."""
    seconds = time.perf_counter() - began
    print(
        f"{counts['inputs']} inputs in {seconds:.0f} s, the slowest {slowest:.2f} s; "
        f"{len(faults)} distinct errors"
    )
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count}")
    for text, count in faults.most_common(200):
        print(f"  {count:8} {text}")


def one_input(data: bytes) -> None:
    """What atheris calls; ends the run when its time is over."""
    read_all(data)
    if time.perf_counter() - began > seconds:
        report()
        print("no crash")
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    corpus = folder / "corpus"
    corpus.mkdir()
    for path in [*(HERE / "golden").glob("*.safetensors"), *(HERE / "attacks").glob("*.safetensors")]:
        (corpus / path.name).write_bytes(path.read_bytes())
    began = time.perf_counter()
    options = [sys.argv[0], str(corpus), "-max_len=65536", "-timeout=60", "-rss_limit_mb=3000"]
    atheris.Setup(options, one_input, custom_mutator=mutate)
    atheris.Fuzz()
