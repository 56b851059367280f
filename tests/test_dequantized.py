"""Quantized folders as plain float: loaded by tools that do not know lexibit."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from lexibit import LexibitConfig, LexibitError, checkpoint, format
from lexibit.nn import codebooks

CONFIG = LexibitConfig(scheme="lq", bits=3, groups="row", levels_dtype="float16")


@pytest.fixture
def packed(float_folder, tmp_path):
    """A function that quantizes a tiny model's folder."""

    def make(name):
        checkpoint.quantize_to(float_folder(name), tmp_path / "packed", CONFIG, progress=False)
        return tmp_path / "packed"

    return make


@pytest.mark.parametrize("name", ["bert-classifier", "marian"])
def test_a_folder_becomes_a_float_folder_that_transformers_loads_alone(packed, tmp_path, name):
    source, out = packed(name), tmp_path / "plain"
    nbytes = checkpoint.dequantize_to(source, out)
    assert nbytes == (out / "model.safetensors").stat().st_size
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert before.pop("quantization_config")
    assert after == before
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    # each weight is there once, and is what its codes say
    model, plain = checkpoint.load_quantized(source), load_file(out / "model.safetensors")
    assert plain.keys() >= checkpoint.inspect(source).weights.keys()
    for path, weight in codebooks(model).items():
        if path in plain:
            assert torch.equal(plain[path], weight.decode())
    assert plain.keys() == load_file(tmp_path / "float" / "model.safetensors").keys()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALONE), out, tmp_path / "outputs", model.__class__.__name__],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "outputs")["found"]
    ids = {"input_ids": torch.arange(5, 12)[None]}
    more = {"decoder_input_ids": ids["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        torch.testing.assert_close(model(**ids, **more)[0], theirs, rtol=1e-5, atol=1e-5)


ALONE = """
    import sys, torch, transformers
    from safetensors.torch import save_file

    folder, out, name = sys.argv[1:]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert transformers.AutoTokenizer.from_pretrained(folder)("w5 w6")["input_ids"] == [1, 5, 6, 2]
    assert "lexibit" not in sys.modules
    ids = torch.arange(5, 12)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        save_file({"found": model(ids, **more)[0]}, out)
"""


def test_a_file_becomes_a_file_and_a_folder_without_a_model_a_folder(tmp_path):
    torch.manual_seed(0)
    floats = {"a.weight": torch.randn(7, 9).bfloat16(), "a.bias": torch.randn(7), "n": torch.arange(3)}
    save_file(floats, tmp_path / "float.safetensors")
    checkpoint.quantize_to(tmp_path / "float.safetensors", tmp_path / "packed", CONFIG, progress=False)
    weights = format.read([tmp_path / "packed" / "model.safetensors"])
    expected = floats | {"a.weight": weights["a.weight"].decode()}
    checkpoint.dequantize_to(tmp_path / "packed" / "model.safetensors", tmp_path / "plain.safetensors")
    checkpoint.dequantize_to(tmp_path / "packed", tmp_path / "plain")
    for file in (tmp_path / "plain.safetensors", tmp_path / "plain" / "model.safetensors"):
        found = load_file(file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
        assert not format.read_index([file])


def test_what_is_not_quantized_or_in_the_way_is_told(packed, tmp_path, float_folder):
    source = packed("bert")
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "float.safetensors")
    with pytest.raises(LexibitError, match=r"float\.safetensors: holds no weights in codes"):
        checkpoint.dequantize_to(tmp_path / "float.safetensors", tmp_path / "out.safetensors")
    with pytest.raises(LexibitError, match="float: holds no weights in codes"):
        checkpoint.dequantize_to(tmp_path / "float", tmp_path / "out")
    for place in (source, tmp_path / "float.safetensors"):
        with pytest.raises(LexibitError, match="exists already"):
            checkpoint.dequantize_to(source / "model.safetensors", place)
    with pytest.raises(LexibitError, match="exists already"):
        checkpoint.dequantize_to(source, source)
    assert not any(path.name.startswith((".", "out")) for path in tmp_path.iterdir())


def test_the_command(packed, run, run_json, tmp_path):
    source = packed("bert")
    told = run_json("dequantize", source, tmp_path / "plain")
    assert told["file_bytes"] == (tmp_path / "plain" / "model.safetensors").stat().st_size
    code, out, _ = run("dequantize", source, tmp_path / "again")
    assert code == 0
    assert "plain float" in out
