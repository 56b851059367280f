"""Folders and files: finding models, quantizing them to disk, and what is left when that fails."""

import copy
import filecmp
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification

import lexibit
from lexibit import FormatError, LexibitConfig, LexibitError, checkpoint
from lexibit.nn import Quantized, codebooks

SOURCE = Path(lexibit.__file__).parents[1]
LINEAR = LexibitConfig(scheme="linear", bits=3)


def quantize_to(source, out, config=LINEAR):
    return checkpoint.quantize_to(source, out, config, progress=False)


def everything(folder):
    """All that is below a folder: bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


# finding -----------------------------------------------------------------------------------------------


def test_a_folder_a_file_and_a_file_beside_its_config_are_found(float_folder, tmp_path):
    folder = float_folder()
    assert checkpoint.find(folder) == folder
    assert checkpoint.find(str(folder)) == folder
    assert checkpoint.find(folder / "model.safetensors") == folder
    bare = tmp_path / "bare.safetensors"
    save_file({"w": torch.ones(2, 2)}, bare)
    assert checkpoint.find(bare) == bare


def test_what_is_no_model_is_refused_with_what_to_give_instead(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"")
    for wrong, said in [
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "model.bin", "give a model folder"),
        (tmp_path / "not" / "here", "no such folder or file"),
        ("x" * 300, "no such folder or file"),
    ]:
        with pytest.raises(LexibitError, match=said) as caught:
            checkpoint.find(wrong)
        assert str(wrong) in str(caught.value)


def test_a_hub_name_is_downloaded_without_weights_of_other_frameworks(monkeypatch, float_folder):
    folder = float_folder()
    asked = []

    def download(name, *, ignore_patterns):
        asked.append(name)
        for unwanted in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx"):
            assert any(Path(unwanted).match(pattern) for pattern in ignore_patterns)
        for wanted in ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt"):
            assert not any(Path(wanted).match(pattern) for pattern in ignore_patterns)
        return str(folder)

    monkeypatch.setattr(checkpoint.source, "snapshot_download", download)
    assert checkpoint.find("someone/a-model") == folder
    assert asked == ["someone/a-model"]


def test_of_a_hub_name_without_weights_only_the_configuration_is_downloaded(monkeypatch, float_folder):
    folder = float_folder()

    def download(name, *, allow_patterns):
        assert allow_patterns == ["*.json"]
        return str(folder)

    monkeypatch.setattr(checkpoint.source, "snapshot_download", download)
    assert checkpoint.find("someone/a-model", weights=False) == folder


def test_a_hub_name_with_weights_in_bin_files_only_brings_those(monkeypatch, tmp_path):
    asked = []

    def download(name, **patterns):
        asked.append(patterns)
        return str(tmp_path)

    monkeypatch.setattr(checkpoint.source, "snapshot_download", download)
    assert checkpoint.find("someone/an-old-model") == tmp_path
    assert "*.bin" in asked[0]["ignore_patterns"]
    assert "*.bin" in asked[1]["allow_patterns"]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("not in the cache"), OSError("no route")])
def test_a_hub_name_that_cannot_be_had_is_an_error_that_says_why(monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.source, "snapshot_download", download)
    with pytest.raises(LexibitError, match=rf"someone/a-model.*{error}"):
        checkpoint.find("someone/a-model")


def test_a_hub_name_without_a_network_is_an_error(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LexibitError, match=r"lexibit-tests/no-such-model.*the hub did not give it"):
        checkpoint.find("lexibit-tests/no-such-model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["BertForTelepathy"]}, "BertForTelepathy"),
        ({"architectures": None}, "architectures"),
        ({"model_type": "telepathy"}, "telepathy"),
    ],
)
def test_a_config_that_names_no_known_class_is_refused(float_folder, change, said):
    folder = float_folder()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(LexibitError, match=said):
        checkpoint.load_float(folder)


def test_a_config_that_is_no_json_is_refused(float_folder):
    folder = float_folder()
    (folder / "config.json").write_text("{")
    with pytest.raises(LexibitError, match=r"config\.json"):
        checkpoint.load_float(folder)


# planning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bert-mlm", "albert-mlm", "distilbert-classifier", "longformer", "gpt2", "marian", "llama-tied"]
)
def test_the_plan_of_a_folder_is_the_plan_that_is_carried_out(float_folder, tmp_path, name):
    folder = float_folder(name)
    planned = checkpoint.plan(folder, LINEAR)
    assert planned.weights
    done, _ = quantize_to(folder, tmp_path / "packed")
    assert planned.to_dict() == done.to_dict()
    found = checkpoint.inspect(tmp_path / "packed").to_dict()["weights"]
    assert {weight["name"]: weight["bytes"] for weight in found} == {
        weight.name: weight.bytes_after for weight in planned.weights
    }


def test_the_plan_of_a_file_is_the_plan_that_is_carried_out(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {
        "a.weight": torch.randn(6, 5),
        "embed.weight": torch.randn(7, 4),
        "a.bias": torch.randn(6),
        "steps": torch.arange(12).view(3, 4),
    }
    save_file(tensors, file)
    planned = checkpoint.plan(file, LINEAR)
    assert {weight.name for weight in planned.weights} == {"a.weight", "embed.weight"}
    done, _ = quantize_to(file, tmp_path / "packed")
    assert planned.to_dict() == done.to_dict()


def test_planning_reads_no_weights(float_folder):
    folder = float_folder()
    expected = checkpoint.plan(folder, LINEAR).to_dict()
    assert len(expected["weights"]) == 16
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert checkpoint.plan(folder, LINEAR).to_dict() == expected
    weights.unlink()
    assert checkpoint.plan(folder, LINEAR).to_dict() == expected


# quantizing to disk --------------------------------------------------------------------------------------


def test_a_folder_is_quantized_with_its_tokenizer_and_subfolders_and_no_other_weights(float_folder, tmp_path):
    source = float_folder()
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling": 1}')
    (source / "README.md").write_text("a model")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    (source / "onnx").mkdir()
    for other in (
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "model.ckpt",
        "onnx/model.onnx",
        "pytorch_model.bin.index.json",
    ):
        (source / other).write_bytes(b"other weights")
    before = everything(source)
    plan, size = quantize_to(source, tmp_path / "packed")
    out = tmp_path / "packed"
    assert everything(source) == before
    assert len(plan.weights) == 16
    assert size == (out / "model.safetensors").stat().st_size
    written = {path for path, content in everything(out).items() if content is not None}
    assert written == {
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for same in ("1_Pooling/config.json", "README.md", "tokenizer.json", "tokenizer_config.json"):
        assert filecmp.cmp(source / same, out / same, shallow=False)
    model = BertForSequenceClassification.from_pretrained(out)
    assert len(codebooks(model)) == 16
    given = AutoTokenizer.from_pretrained(out)("w5 w6 w7", return_tensors="pt")
    reference = BertForSequenceClassification.from_pretrained(source)
    lexibit.quantize(reference, LINEAR, progress=False)
    with torch.inference_mode():
        assert torch.equal(model(**given).logits, reference(**given).logits)


def test_weights_in_subfolders_that_the_model_needs_are_kept(float_folder, tmp_path):
    # as sentence-transformers' Dense module keeps them
    source = float_folder("bert")
    (source / "2_Dense").mkdir()
    save_file({"linear.weight": torch.eye(3)}, source / "2_Dense" / "model.safetensors")
    quantize_to(source, tmp_path / "packed")
    kept = tmp_path / "packed" / "2_Dense" / "model.safetensors"
    assert kept.is_file()
    assert torch.equal(load_file(kept)["linear.weight"], torch.eye(3))


def test_a_bare_file_becomes_a_model_file_in_a_new_folder(tmp_path):
    tensors = {
        "a.weight": torch.randn(6, 5),
        "word_embed.weight": torch.randn(7, 4).bfloat16(),
        "a.bias": torch.randn(6),
        "steps": torch.arange(12).view(3, 4),
    }
    save_file(tensors, tmp_path / "float.safetensors")
    plan, size = quantize_to(tmp_path / "float.safetensors", tmp_path / "new" / "packed")
    assert {weight.name for weight in plan.weights} == {"a.weight", "word_embed.weight"}
    out = tmp_path / "new" / "packed" / "model.safetensors"
    assert list(out.parent.iterdir()) == [out]
    assert size == out.stat().st_size
    back = lexibit.format.read([out])
    assert back.keys() == tensors.keys()
    for name in ("a.bias", "steps"):
        assert torch.equal(back[name], tensors[name])
    for name in ("a.weight", "word_embed.weight"):
        expected = lexibit.quantize_tensor(tensors[name], lexibit.Recipe(scheme="linear", bits=3))
        assert back[name].codes.numel() == -(-tensors[name].numel() * 3 // 8)
        assert torch.equal(back[name].decode(), expected.decode())


def test_a_file_in_which_nothing_can_be_quantized_is_refused(tmp_path):
    save_file({"a.bias": torch.ones(3)}, tmp_path / "float.safetensors")
    with pytest.raises(LexibitError, match="nothing to quantize"):
        quantize_to(tmp_path / "float.safetensors", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_what_is_quantized_already_is_refused(float_folder, tmp_path):
    source = float_folder()
    quantize_to(source, tmp_path / "packed")
    save_file({"a.weight": torch.randn(3, 4)}, tmp_path / "bare.safetensors")
    quantize_to(tmp_path / "bare.safetensors", tmp_path / "bare")
    for folder in (tmp_path / "packed", tmp_path / "bare" / "model.safetensors"):
        for act in (checkpoint.plan, lambda it, config: quantize_to(it, tmp_path / "again", config)):
            with pytest.raises(LexibitError, match="quantized already"):
                act(folder, LINEAR)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", ["file", "full folder", "link", "dangling link"])
def test_an_output_that_exists_is_refused_and_stays_as_it_is(float_folder, tmp_path, kind):
    source, out = float_folder(), tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "full folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        if kind == "link":
            (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target")
    before = everything(tmp_path)
    with pytest.raises(LexibitError, match=r"exists already.*choose another"):
        quantize_to(source, out)
    assert everything(tmp_path) == before


def break_weight(source, value=float("nan")):
    tensors = load_file(source / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.weight"][2, 3] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def fail_in_quantizing(source, monkeypatch):
    break_weight(source)
    return LexibitError


def fail_in_saving(source, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.target, "save_configuration", fail)
    return LexibitError


def fail_in_copying(source, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.target, "copy_companions", fail)
    return KeyboardInterrupt


def fail_in_renaming(source, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    return LexibitError


def fail_in_loading(source, monkeypatch):
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return FormatError


@pytest.mark.parametrize(
    "failure", [fail_in_loading, fail_in_quantizing, fail_in_saving, fail_in_copying, fail_in_renaming]
)
@pytest.mark.parametrize("out", ["packed", "new/parent/packed"])
def test_a_failure_leaves_nothing_but_what_is_finished(float_folder, tmp_path, monkeypatch, failure, out):
    source = float_folder()
    error = failure(source, monkeypatch)
    before = everything(source)
    with pytest.raises(error):
        quantize_to(source, tmp_path / out)
    assert everything(source) == before
    beside = (tmp_path / out).parent
    left = {path.name for path in beside.iterdir()} - {"float"} if beside.exists() else set()
    useless = failure in (fail_in_loading, fail_in_quantizing)
    assert left == (set() if useless else {".packed.unfinished"})


def test_a_weight_that_is_not_finite_is_named(float_folder, tmp_path):
    source = float_folder()
    break_weight(source, float("inf"))
    with pytest.raises(LexibitError, match=r"encoder\.layer\.1\.output\.dense\.weight.*row 2, column 3"):
        quantize_to(source, tmp_path / "packed")


def environment():
    return os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def test_ctrl_c_while_it_quantizes_keeps_what_is_finished_and_exits_with_130(float_folder, tmp_path):
    # many layers, each of some tenths of a second with so many iterations
    source = float_folder(
        "bert", hidden_size=128, intermediate_size=2048, num_hidden_layers=12, vocab_size=3000
    )
    before = everything(tmp_path)
    options = ["--bits", "8", "--option", "init=k-means++", "--option", "iterations=300"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lexibit", "quantize", str(source), str(tmp_path / "packed"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        deadline = time.monotonic() + 60
        journal = tmp_path / ".packed.unfinished" / "journal.jsonl"
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 1) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, (out, err)
    assert "Traceback" not in err
    assert "the same command goes on with it" in err
    assert everything(tmp_path).keys() - before.keys() >= {".packed.unfinished/journal.jsonl"}
    assert not (tmp_path / "packed").exists()


# what is in it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-classifier", "albert-mlm", "marian"])
def test_inspect_counts_the_bytes_on_disk(float_folder, tmp_path, name):
    source = float_folder(name)
    config = LexibitConfig(scheme="linear", bits=3, groups="row", levels_dtype="float16")
    quantize_to(source, tmp_path / "packed", config)
    contents = checkpoint.inspect(tmp_path / "packed")
    data = (tmp_path / "packed" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    index = json.loads(header.pop("__metadata__")["lexibit"])["weights"]
    size = {name: np.diff(entry["data_offsets"])[0] for name, entry in header.items()}
    elements = {name: int(np.prod(record["shape"])) for name, record in index.items()}
    assert set(contents.weights) == set(index)
    total = 0
    for weight in contents.to_dict()["weights"]:
        name = weight["name"]
        stored = size[name] + size[name + "_levels"]
        total += stored
        assert weight["bytes"] == stored
        assert weight["bits_per_weight"] == pytest.approx(8 * stored / elements[name])
    assert contents.bits_per_weight == pytest.approx(8 * total / sum(elements.values()))
    assert contents.bits_per_weight > 3
    plain = {name for name in header if name not in index and name.removesuffix("_levels") not in index}
    parameters = sum(elements.values()) + sum(int(np.prod(header[name]["shape"])) for name in plain)
    assert contents.parameters == parameters
    floats = load_file(source / "model.safetensors")
    assert contents.parameters == sum(tensor.numel() for tensor in floats.values())
    assert contents.file_bytes == len(data)
    assert contents.file_bits_per_parameter == pytest.approx(8 * len(data) / parameters)


def test_a_folder_that_is_not_quantized_has_nothing_to_inspect(float_folder, tmp_path):
    with pytest.raises(LexibitError, match="no weights in codes"):
        checkpoint.inspect(float_folder())
    (tmp_path / "empty").mkdir()
    with pytest.raises(LexibitError, match=r"no \.safetensors file"):
        checkpoint.inspect(tmp_path / "empty")
    with pytest.raises(LexibitError, match="no such folder"):
        checkpoint.inspect(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["bert-mlm", "marian", "gpt2"])
@pytest.mark.parametrize("form", ["folders", "files"])
def test_errors_against_the_original_are_those_of_every_stored_weight(float_folder, tmp_path, name, form):
    source = float_folder(name)
    quantize_to(source, tmp_path / "packed")
    file = "model.safetensors" if form == "files" else ""
    found = checkpoint.errors_against(tmp_path / "packed" / file, source / file)
    floats = load_file(source / "model.safetensors")
    packed = lexibit.format.read([tmp_path / "packed" / "model.safetensors"])
    assert {error.name for error in found} == set(checkpoint.inspect(tmp_path / "packed").weights)
    for error in found:
        w, q = (tensor.numpy().astype(float) for tensor in (floats[error.name], packed[error.name].decode()))
        assert error.relative == pytest.approx(((w - q) ** 2).sum() / (w**2).sum(), rel=1e-6)
        assert error.largest == pytest.approx(np.abs(w - q).max(), rel=1e-6)


def test_errors_against_another_model_are_refused(float_folder, tmp_path):
    quantize_to(float_folder(), tmp_path / "packed")
    with pytest.raises(LexibitError, match=r"word_embeddings.*\[97, 24\].*\[98, 24\]"):
        checkpoint.errors_against(tmp_path / "packed", float_folder(folder="wider", vocab_size=98))
    with pytest.raises(LexibitError, match="no weight"):
        checkpoint.errors_against(tmp_path / "packed", float_folder("gpt2", folder="gpt2"))


def test_texts_are_the_lines_that_are_not_blank(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one\n\n  two \n\t\nthree é\n", encoding="utf-8")
    assert checkpoint.read_texts(file, 10) == ["one", "two", "three é"]
    assert checkpoint.read_texts(file, 2) == ["one", "two"]


def test_texts_that_cannot_be_read_are_an_error(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    for name, said in [("blank.txt", "no text"), ("latin.txt", "UTF-8"), ("none.txt", "cannot be read")]:
        with pytest.raises(LexibitError, match=f"{name}.*{said}"):
            checkpoint.read_texts(tmp_path / name, 10)


# models that are not transformers' -----------------------------------------------------------------------


class LanguageModel(nn.Module):
    """An LSTM whose decoder is tied to its embedding."""

    def __init__(self, words=31, width=12, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, words)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        return self.decoder(self.norm(self.lstm(self.embedding(ids))[0]))


IDS = torch.arange(24).view(2, 12)


def saved_language_model(path):
    model = LanguageModel().eval()
    lexibit.quantize(model, LexibitConfig(scheme="linear", bits=5), progress=False)
    lexibit.save(model, path)
    return model


@pytest.mark.usefixtures("exact")
def test_a_plain_torch_model_is_saved_and_loaded_bit_for_bit_with_its_tie(tmp_path):
    model = saved_language_model(tmp_path / "lm.safetensors")
    assert len(codebooks(model)) == 5  # the tied weight, and two matrices of each layer
    tensors = load_file(tmp_path / "lm.safetensors")
    assert tensors["embedding.weight"].dtype == torch.uint8
    assert "decoder.weight" not in tensors
    loaded = LanguageModel(seed=1).eval()
    lexibit.load(loaded, tmp_path / "lm.safetensors")
    assert isinstance(loaded.lstm, Quantized)
    assert loaded.decoder.weight_codebook is loaded.embedding.weight_codebook
    for name, weight in codebooks(loaded).items():
        assert torch.equal(weight.codes, codebooks(model)[name].codes)
        assert torch.equal(weight.levels, codebooks(model)[name].levels)
    with torch.inference_mode():
        assert torch.equal(loaded(IDS), model(IDS))
    lexibit.save(loaded, tmp_path / "again.safetensors")
    assert filecmp.cmp(tmp_path / "lm.safetensors", tmp_path / "again.safetensors", shallow=False)
    with torch.inference_mode():
        expected = model(IDS)
        lexibit.dequantize(loaded)
        assert torch.equal(loaded(IDS), expected)


def narrow_norm(model):
    model.norm = nn.LayerNorm(5)


def wider_words(model):
    model.embedding = nn.Embedding(32, 12)
    model.decoder.weight = model.embedding.weight


def no_decoder(model):
    del model.decoder


def one_more(model):
    model.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wider_words, "embedding.weight"),
        (no_decoder, "decoder.bias"),
        (one_more, "extra"),
        (narrow_norm, "norm.weight"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_refused_and_changes_nothing(tmp_path, change, said):
    saved_language_model(tmp_path / "lm.safetensors")
    model = LanguageModel(seed=1)
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FormatError, match=said):
        lexibit.load(model, tmp_path / "lm.safetensors")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_float_model_is_not_saved_as_a_quantized_one(tmp_path):
    with pytest.raises(LexibitError, match="not quantized"):
        lexibit.save(LanguageModel(), tmp_path / "lm.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "lm.safetensors"
    model = saved_language_model(path)
    before = everything(tmp_path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(LexibitError, match="No space left"):
        lexibit.save(model, path)
    assert everything(tmp_path) == before
