"""What a stranger could send: every file of ``attacks/``, and folders that are more than their files."""

import json
import os
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from attacks.make import ATTACKS, UNSEEN, VALUES, sound
from attacks.make import FOLDER as ATTACKS_FOLDER
from safetensors.torch import save_file
from transformers import BertModel

import lexibit
import lexibit.checkpoint.streaming
import lexibit.hf
import lexibit.hub
from lexibit import FormatError, LexibitConfig, LexibitError, checkpoint, format

SOURCE = Path(lexibit.__file__).parents[1]
MOST = 64 << 20  # bytes that a refusal may take
TENSORS = {"layer.weight", "pruned.weight", "layer.bias"}


@pytest.fixture
def packed(float_folder, tmp_path):
    checkpoint.quantize_to(
        float_folder("bert"), tmp_path / "packed", LexibitConfig("linear", 3), progress=False
    )
    return tmp_path / "packed"


# files ------------------------------------------------------------------------------------------------------


def test_every_attack_is_there_as_it_is_made():
    assert {file.stem for file in ATTACKS_FOLDER.glob("*.safetensors")} == set(ATTACKS)
    for name, attack in ATTACKS.items():
        header, data = sound()
        assert (ATTACKS_FOLDER / f"{name}.safetensors").read_bytes() == attack(header, data), name


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_is_refused_with_the_name_of_its_file_and_takes_no_memory(name):
    file = ATTACKS_FOLDER / f"{name}.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    acts = [checkpoint.verify] if name in UNSEEN else [checkpoint.verify, lambda file: format.read([file])]
    for act in acts:
        with pytest.raises(FormatError) as caught:
            act(file)
        message = str(caught.value)
        assert name in message or str(ATTACKS_FOLDER) in message
        assert len(message) < 1000
        assert message.isprintable()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST


@pytest.mark.parametrize("name", sorted(UNSEEN))
def test_what_only_a_checksum_tells_has_the_right_form(name):
    found = format.read([ATTACKS_FOLDER / f"{name}.safetensors"])
    assert found.keys() == TENSORS
    assert found["layer.weight"].decode().shape == (6, 11)


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - UNSEEN - VALUES))
def test_a_model_is_not_loaded_from_an_attack(packed, name):
    (packed / "model.safetensors").write_bytes((ATTACKS_FOLDER / f"{name}.safetensors").read_bytes())
    with pytest.raises(LexibitError, match=str(packed)):
        checkpoint.load_quantized(packed)


# folders ----------------------------------------------------------------------------------------------------


class Touch:
    """Leaves a trace if it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_nothing_is_unpickled(packed, tmp_path):
    (packed / "model.safetensors").unlink()
    (packed / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "trace")))
    torch.save({"a": Touch(tmp_path / "trace")}, packed / "model.bin")
    for act in (checkpoint.load_quantized, checkpoint.inspect, checkpoint.verify):
        with pytest.raises(LexibitError):
            act(packed)
    assert not (tmp_path / "trace").exists()


def test_pickled_weights_of_a_float_model_run_nothing(float_folder, tmp_path):
    source = float_folder("bert")
    (source / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Touch(tmp_path / "trace")}, source / "pytorch_model.bin")
    with pytest.raises(LexibitError):
        checkpoint.quantize_to(source, tmp_path / "packed", LexibitConfig(), progress=False)
    assert not (tmp_path / "trace").exists()


def test_no_code_of_a_folder_is_run(packed, tmp_path):
    config = json.loads((packed / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"},
    }
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    for act in (checkpoint.load_quantized, checkpoint.load_model):
        with pytest.raises(LexibitError):
            act(packed)
    checkpoint.load_tokenizer(packed)
    assert not (tmp_path / "trace").exists()


def test_a_pipe_is_not_waited_for(packed, tmp_path):
    (packed / "model.safetensors").unlink()
    os.mkfifo(packed / "model.safetensors")
    os.mkfifo(tmp_path / "bare.safetensors")
    for path in (packed / "model.safetensors", tmp_path / "bare.safetensors"):
        with pytest.raises(LexibitError, match=r"safetensors: no such file, or something else than a file"):
            checkpoint.verify(path)
    with pytest.raises(LexibitError):
        checkpoint.load_quantized(packed)
    with pytest.raises(LexibitError):
        checkpoint.find(tmp_path / "bare.safetensors")


def test_a_folder_that_is_called_like_a_file(packed):
    (packed / "model.safetensors").unlink()
    (packed / "model.safetensors").mkdir()
    for act in (checkpoint.verify, checkpoint.inspect, checkpoint.load_quantized):
        with pytest.raises(LexibitError, match="packed"):
            act(packed)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..", "a/b.safetensors"])
def test_an_index_that_points_out_of_the_folder(float_folder, tmp_path, name):
    source = float_folder("bert")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LexibitError, match=r"index\.json.*(other folders|not there)"):
        checkpoint.quantize_to(source, tmp_path / "packed", LexibitConfig(), progress=False)


def test_an_index_of_a_quantized_folder_that_points_out_of_it(packed, tmp_path):
    (tmp_path / "other").mkdir()
    (packed / "model.safetensors").rename(tmp_path / "other" / "model.safetensors")
    names = lexibit.format.read_checksums([tmp_path / "other" / "model.safetensors"])
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../other/model.safetensors")}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LexibitError, match="files of other folders"):
        checkpoint.load_quantized(packed)
    with pytest.raises(LexibitError, match="a file of another folder"):
        BertModel.from_pretrained(packed)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "null"])
def test_an_index_of_shards_that_is_none(float_folder, tmp_path, text):
    source = float_folder("bert")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LexibitError, match=r"index\.json"):
        checkpoint.quantize_to(source, tmp_path / "packed", LexibitConfig(), progress=False)


def test_a_link_out_of_a_folder_brings_in_no_file_of_this_machine(float_folder, tmp_path):
    source = float_folder("bert")
    (tmp_path / "secret").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(LexibitError, match=r"notes\.txt: is a link out of the folder"):
        checkpoint.quantize_to(source, tmp_path / "packed", LexibitConfig("linear", 3), progress=False)
    assert not (tmp_path / "packed").exists()
    assert not (tmp_path / ".packed.unfinished").exists()
    (source / "notes.txt").unlink()
    (source / "notes.txt").symlink_to("tokenizer.json")  # within it
    checkpoint.quantize_to(source, tmp_path / "packed", LexibitConfig("linear", 3), progress=False)
    assert (tmp_path / "packed" / "notes.txt").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_the_links_of_the_hubs_cache_are_followed(float_folder, tmp_path):
    plain = float_folder("bert")
    repository = tmp_path / "models--someone--bert"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    config = LexibitConfig("linear", 3)
    checkpoint.quantize_to(plain, tmp_path / "expected", config, progress=False)
    checkpoint.quantize_to(snapshot, tmp_path / "packed", config, progress=False)
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "packed" / file.name).read_bytes() == file.read_bytes()
        assert not (tmp_path / "packed" / file.name).is_symlink()


def test_a_config_that_asks_for_files_reads_none(packed, tmp_path):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= {"scheme": "kmeans", "importance": str(tmp_path / "none.safetensors")}
    (packed / "config.json").write_text(json.dumps(config))
    model = checkpoint.load_quantized(packed)
    assert isinstance(model, BertModel)


CONFIGS = {
    "no class": {"architectures": ["AutoModel"]},
    "a function": {"architectures": ["pipeline"]},
    "a module": {"architectures": ["utils"]},
    "a configuration": {"architectures": ["BertConfig"]},
    "another model": {"architectures": ["GPT2LMHeadModel"]},
    "a number": {"architectures": [5]},
    "an object": {"architectures": {"a": 1}},
    "dtype of nothing": {"dtype": "foo"},
    "dtype that is a function": {"dtype": "load"},
    "dtype of whole numbers": {"dtype": "int8"},
    "size as text": {"hidden_size": "x"},
    "size not whole": {"vocab_size": 1.5},
    "no heads": {"num_attention_heads": 0},
    "padding outside": {"pad_token_id": 500},
    "activation unknown": {"hidden_act": "evil"},
    "layers without end": {"num_hidden_layers": 10**9},
    "more layers": {"num_hidden_layers": 10**5},
    "other size": {"hidden_size": 48},
    "other words": {"vocab_size": 30_000_000},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("form", ["quantized", "float"])
def test_a_config_of_anything_is_refused_and_takes_no_memory(packed, tmp_path, change, form):
    workers = checkpoint.streaming.Local(10**9)

    def act(source):
        if form == "quantized":
            checkpoint.load_quantized(source)
        else:
            checkpoint.quantize_to(source, tmp_path / "out", LexibitConfig(), progress=False, workers=workers)

    source = packed if form == "quantized" else tmp_path / "float"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LexibitError, match=str(source)):
        act(source)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * MOST


@pytest.mark.parametrize("text", ["null", "[]", "5", "{", "[" * 100_000, '{"quantization_config": [1]}'])
def test_a_config_that_is_none_is_refused(packed, text):
    (packed / "config.json").write_text(text)
    for act in (checkpoint.load_quantized, checkpoint.load_model, lexibit.hub.card):
        with pytest.raises(LexibitError, match=str(packed)):
            act(packed)


def test_layers_that_the_files_do_not_have_are_refused(packed, monkeypatch):
    monkeypatch.setattr(lexibit.hf, "_MISSING", 1 << 20)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 500}))
    with pytest.raises(LexibitError, match=r"weights that its files do not have"):
        checkpoint.load_quantized(packed)


def test_a_bomb_of_a_header_is_refused(tmp_path):
    # in a process of its own, as a crash would take the tests with it
    code = """
import json, sys
from pathlib import Path
import torch
from lexibit import LexibitError, checkpoint, format
from attacks.make import framed, sound
folder = Path(sys.argv[1])
header, data = sound()
index = json.loads(header["__metadata__"]["lexibit"])
for number in range(50_000):
    index["weights"][f"w{number}"] = index["weights"]["layer.weight"]
header["__metadata__"]["lexibit"] = json.dumps(index)
(folder / "many.safetensors").write_bytes(framed(header, data))
header["__metadata__"]["lexibit"] = " " * (65 << 20)
(folder / "long.safetensors").write_bytes(framed(header, data))
for name in ("many", "long"):
    try:
        format.read([folder / f"{name}.safetensors"])
    except LexibitError as error:
        print(name, str(error)[:200])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{SOURCE}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    many, long = done.stdout.splitlines()
    assert "is missing" in many or "limit" in many
    assert "limit" in long


def test_a_weight_of_many_rows_and_no_columns_is_decoded_at_once(tmp_path):
    spec = {
        "shape": [1 << 38, 0],
        "bits": 3,
        "block": [1 << 38, 1],
        "form": "table",
        "levels_dtype": "float32",
    }
    spec |= {"dtype": "float32", "scheme": "kmeans", "extra": [0, 0], "mask": False, "outliers": 0}
    index = {"format": 3, "weights": {"w": spec}, "checksums": dict.fromkeys(["w", "w_levels"], "0" * 32)}
    save_file(
        {"w": torch.empty(0, dtype=torch.uint8), "w_levels": torch.empty(0, 8)},
        tmp_path / "model.safetensors",
        metadata={"lexibit": json.dumps(index)},
    )
    weight = format.read([tmp_path / "model.safetensors"])["w"]
    start = time.perf_counter()
    assert weight.decode().shape == (1 << 38, 0)
    assert time.perf_counter() - start < 5


def test_a_quantized_folder_without_a_dtype_opens_no_file_but_safetensors(packed, tmp_path):
    # to find a dtype, transformers would open the weights first
    config = json.loads((packed / "config.json").read_text())
    config.pop("dtype")
    (packed / "config.json").write_text(json.dumps(config))
    assert isinstance(checkpoint.load_quantized(packed), BertModel)
    (packed / "model.safetensors").unlink()
    (packed / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "trace")))
    with pytest.raises(FormatError, match="holds safetensors files, but transformers found"):
        BertModel.from_pretrained(packed)
    assert not (tmp_path / "trace").exists()
