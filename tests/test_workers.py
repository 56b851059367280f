"""Jobs in threads within some memory, and on a Ray cluster."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import lexibit
from lexibit import LexibitConfig, LexibitError, checkpoint, workers

SOURCE = Path(lexibit.__file__).parents[1]


@dataclass(frozen=True)
class Job:
    number: int
    memory: int


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Watch:
    """A function for jobs that knows how much memory those took that ran together."""

    def __init__(self):
        self.lock, self.now, self.most, self.together = threading.Lock(), [], 0, 0

    def __call__(self, job):
        with self.lock:
            self.now.append(job.memory)
            self.most = max(self.most, sum(self.now))
            self.together = max(self.together, len(self.now))
        time.sleep(0.01)
        with self.lock:
            self.now.remove(job.memory)
        return job.number * 10


def test_every_job_is_done_once_and_within_the_memory(threads):
    jobs = [Job(number, memory) for number, memory in enumerate([5, 1, 1, 9, 2, 2, 7, 3] * 3)]
    watch = Watch()
    done = list(workers.in_threads(watch, jobs, 10))
    assert sorted(job.number for job, _ in done) == list(range(len(jobs)))
    assert all(result == job.number * 10 for job, result in done)
    assert watch.most <= 10
    assert watch.together > 1


def test_a_job_that_is_too_large_runs_alone(threads):
    watch = Watch()
    done = list(workers.in_threads(watch, [Job(0, 50), Job(1, 4), Job(2, 4)], 10))
    assert len(done) == 3
    assert watch.most == 50


def test_no_more_jobs_at_once_than_threads(threads):
    watch = Watch()
    list(workers.in_threads(watch, [Job(number, 1) for number in range(40)], 10**6))
    assert watch.together == 4


def test_the_error_of_a_job_ends_the_work(threads):
    begun = []

    def fail(job):
        begun.append(job.number)
        if job.number == 3:
            raise LexibitError("three")
        time.sleep(0.005)

    with pytest.raises(LexibitError, match="three"):
        list(workers.in_threads(fail, [Job(number, 1) for number in range(500)], 10**6))
    time.sleep(0.05)
    assert len(begun) < 500


def test_no_jobs_are_no_work():
    assert list(workers.in_threads(print, [], 10)) == []


# Ray --------------------------------------------------------------------------------------------------------


def test_no_cluster_is_one_clear_error():
    with pytest.raises(LexibitError, match=r"--ray 127\.0\.0\.1:1: no cluster there.*ray start --head"):
        list(workers.on_ray(print, [Job(0, 1)], "127.0.0.1:1"))


CLUSTER = """
import json, os, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from lexibit import LexibitConfig, checkpoint
from lexibit.checkpoint import streaming

source, out = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1, memory=10**9, object_store_memory=80 * 10**6) for _ in range(2)]
cluster.wait_for_nodes()
config = LexibitConfig(scheme="kmeans", bits=6, options={"init": "k-means++", "iterations": 100})
journal = out.with_name(f".{out.name}.unfinished") / "journal.jsonl"

def lose_a_node():
    while not journal.exists() or journal.read_bytes().count(b"\\n") < 6:
        time.sleep(0.01)
    cluster.remove_node(nodes[0], allow_graceful=False)
    lost.append(journal.read_bytes().count(b"\\n"))

lost = []
watch = threading.Thread(target=lose_a_node)
watch.start()
plan, _ = checkpoint.quantize_to(
    source, out, config, progress=False, workers=streaming.Cluster(cluster.address)
)
watch.join()
print(json.dumps({"lost at": lost[0], "weights": len(plan.weights)}))
cluster.shutdown()
"""


def test_a_cluster_that_loses_a_machine_gives_the_same_bytes(float_folder, tmp_path):
    source = float_folder("bert", hidden_size=64, intermediate_size=256, num_hidden_layers=8, vocab_size=800)
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, source, tmp_path / "packed"],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["lost at"] < told["weights"]
    config = LexibitConfig(scheme="kmeans", bits=6, options={"init": "k-means++", "iterations": 100})
    checkpoint.quantize_to(source, tmp_path / "expected", config, progress=False)
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "packed" / file.name).read_bytes() == file.read_bytes(), file.name
