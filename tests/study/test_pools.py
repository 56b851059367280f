"""Steps on a Ray cluster of which a machine is lost, in order and once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import pytest

import lexibit
from lexibit import LexibitError
from lexibit.study import Study, results, run
from lexibit.study.pools import Processes
from lexibit.study.steps import Step

SOURCE = Path(lexibit.__file__).parents[1]

CLUSTER = """
import json, sys, threading, time
from dataclasses import replace
from pathlib import Path
from ray.cluster_utils import Cluster
from lexibit import LexibitError
from lexibit.study import read, run

file, out = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1, memory=10**9, object_store_memory=80 * 10**6) for _ in range(2)]
cluster.wait_for_nodes()
try:
    run(replace(read(file), gpus=2), out.with_name("gpus"), ray=cluster.address)
    said = ""
except LexibitError as error:
    said = str(error)

def done():
    return len(list(out.glob("steps/*/step.json")))

def lose_a_node():
    while done() < 3:
        time.sleep(0.01)
    cluster.remove_node(nodes[0], allow_graceful=False)
    lost.append(done())

lost = []
watch = threading.Thread(target=lose_a_node)
watch.start()
told = []
found = run(read(file), out, ray=cluster.address, tell=lambda cell, *_: told.append(cell.key))
watch.join()
done = {"lost at": lost[0], "cells": found.cells, "failed": found.failed, "told": told, "said": said}
print(json.dumps(done))
cluster.shutdown()
"""


def test_a_cluster_that_loses_a_machine_does_every_cell_once(settings, write, tmp_path):
    file, folder = write(settings), tmp_path / "out"
    environment = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, file, folder],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "no machine has 1 CPUs and 2 GPUs: ask for fewer" in told["said"]
    # it was in the middle
    assert 3 <= told["lost at"] < 22
    assert (told["cells"], told["failed"]) == (9, 0)
    assert len(told["told"]) == len(set(told["told"])) == 9
    found = results(folder)
    assert found["cell"].nunique() == 9
    assert found["error"].isna().all()
    # the same as on one machine
    run(Study(**settings, name="tiny"), tmp_path / "alone")
    same = ["cell", "score", "low", "high", "bytes", "model_key"]
    assert found[same].equals(results(tmp_path / "alone")[same])


@pytest.mark.parametrize(
    ("count", "memory", "sizes", "together"),
    [
        (3, 10, [4, 4, 4], 2),
        (2, 100, [1, 1, 1], 2),
        # too large for the memory: alone
        (3, 10, [50, 1], 1),
        (3, 10, [1, 50], 1),
    ],
)
def test_processes_keep_to_their_number_and_memory(count, memory, sizes, together):
    steps = [Step(str(place), "evaluate", memory=size) for place, size in enumerate(sizes)]
    with Processes(count, memory) as pool:
        begun = []
        while pool.room(steps[len(begun)]):
            begun.append(pool.submit(repr, steps[len(begun)]))
        assert len(begun) == together
        wait(begun)
        assert [pool.outcome(future) for future in begun] == [repr(step) for step in steps[:together]]
        assert pool.room(Step("another", "evaluate", memory=10**9))


def test_a_process_that_ends_while_it_is_idle_is_replaced():
    step = Step("a", "evaluate")
    with Processes(1, 10) as pool:
        future = pool.submit(repr, step)
        assert pool.outcome(future) == repr(step) if wait([future]) else False
        (process,) = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        time.sleep(0.5)  # until its executor has seen it
        future = pool.submit(repr, step)
        wait([future])
        assert pool.outcome(future) == repr(step)


def test_no_cluster_is_one_clear_error(settings, tmp_path):
    with pytest.raises(LexibitError, match=r"--ray 127\.0\.0\.1:1: no cluster there.*ray start --head"):
        run(Study(**settings), tmp_path / "out", ray="127.0.0.1:1")
