"""A quantized folder and a quantized model in many threads and processes at once."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import lexibit
from lexibit import LexibitConfig, checkpoint, format

SOURCE = Path(lexibit.__file__).parents[1]
IDS = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 2, 0, 0]])


def outputs(folder):
    # transformers' own from_pretrained is not safe in threads at once
    model = checkpoint.load_quantized(Path(folder))
    with torch.inference_mode():
        return model(IDS).logits


def output_bytes(folder):
    torch.set_num_threads(1)
    return outputs(folder).numpy().tobytes()


@pytest.fixture
def packed(float_folder, tmp_path):
    config = LexibitConfig(bits=3, groups="row", levels_dtype="float16")
    checkpoint.quantize_to(float_folder(), tmp_path / "packed", config, progress=False)
    return tmp_path / "packed"


def test_threads_that_load_at_once_get_the_same_model(packed):
    expected = outputs(packed)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(outputs, [packed] * 24))
    assert len(found) == 24
    assert all(torch.equal(one, expected) for one in found)
    # and nothing is left of what transformers does meanwhile
    tied = BertForMaskedLM(BertConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1))
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_threads_that_run_one_model_get_the_same_results(packed):
    model = BertForSequenceClassification.from_pretrained(packed)
    batches = [torch.randint(3, 90, (2, 9)) for _ in range(8)]

    def run(ids):
        with torch.inference_mode():
            return model(ids).logits

    expected = [run(ids) for ids in batches]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(run, batches * 20))
    assert all(torch.equal(one, expected[number % 8]) for number, one in enumerate(found))


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_processes_that_load_at_once_get_the_same_model(packed, way):
    # what a user's program does: nothing has computed before it forks, in a process of its own
    code = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
sys.path.insert(0, sys.argv[3])
from test_concurrency import output_bytes
if __name__ == "__main__":
    with ProcessPoolExecutor(3, multiprocessing.get_context(sys.argv[2])) as pool:
        found = set(pool.map(output_bytes, [sys.argv[1]] * 6))
    print(len(found), found.pop().hex())
"""
    script = packed.parent / "load.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, packed, way, Path(__file__).parent],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    count, found = done.stdout.split()
    assert count == "1"
    assert torch.allclose(
        torch.frombuffer(bytearray.fromhex(found), dtype=torch.float32), outputs(packed).flatten(), atol=1e-6
    )


def test_a_loaded_model_survives_a_fork(packed):
    code = """
import os, sys, torch
import lexibit
from transformers import BertForSequenceClassification
torch.set_num_threads(2)
model = BertForSequenceClassification.from_pretrained(sys.argv[1])
ids = torch.randint(3, 90, (4, 30))
with torch.inference_mode():
    before = model(ids).logits
    for _ in range(3):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork, whoever uses them
            os._exit(0 if torch.allclose(model(ids).logits, before, atol=1e-6) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, packed],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        timeout=120,
    )
    assert done.stdout == "same\n", done.stderr


def test_a_file_is_read_whole_while_another_version_takes_its_place(tmp_path, tiny_model):
    versions = []
    for seed in range(2):
        model = tiny_model("bert", seed=seed)
        lexibit.quantize(model, LexibitConfig("linear", 3), progress=False)
        versions.append(model)
    file = tmp_path / "model.safetensors"
    names = ["embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"]
    expected = []
    for model in versions:
        lexibit.save(model, file)
        expected.append([format.read([file])[name].codes for name in names])
    assert not torch.equal(expected[0][0], expected[1][0])
    stop, seen, faults = threading.Event(), set(), []

    def read():
        while not stop.is_set():
            found = format.read([file])
            of = [
                all(torch.equal(found[name].codes, codes) for name, codes in zip(names, one, strict=True))
                for one in expected
            ]
            if not any(of):
                faults.append(of)
            seen.add(of.index(True) if any(of) else -1)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(60):
        lexibit.save(versions[turn % 2], file)
    stop.set()
    for reader in readers:
        reader.join()
    assert faults == []
    assert seen == {0, 1}


def test_a_folder_is_read_while_another_is_written_beside_it(packed, float_folder, tmp_path):
    expected = outputs(packed)
    other = float_folder("bert", folder="other")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(
            checkpoint.quantize_to, other, tmp_path / "packed-2", LexibitConfig(bits=2), progress=False
        )
        while not writing.done():
            assert torch.equal(outputs(packed), expected)
            # a folder that is there is whole
            if (tmp_path / "packed-2").exists():
                checkpoint.verify(tmp_path / "packed-2")
        writing.result()
    BertModel.from_pretrained(tmp_path / "packed-2")


def test_the_results_of_a_model_do_not_depend_on_the_number_of_threads(packed):
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            weights = format.read([packed / "model.safetensors"])
            weight = weights["bert.encoder.layer.0.intermediate.dense.weight"]
            x = torch.linspace(-1, 1, 24 * 7).view(7, 24)
            found.append((weight.linear(x), weight.decode(), weight.embedding(torch.arange(5))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
