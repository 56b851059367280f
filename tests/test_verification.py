"""``lexibit verify``: that a whole checkpoint passes, and that no changed byte does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import lexibit
from lexibit import FormatError, LexibitConfig, LexibitError
from lexibit.checkpoint import Verified, verify

GOLDEN = Path(__file__).parent / "golden"


def quantized(tiny_model: Any, folder: Path, name: str = "bert-mlm", **saved: Any) -> Path:
    model = tiny_model(name)
    lexibit.quantize(model, LexibitConfig(bits=3, outliers=0.01), progress=False)
    model.save_pretrained(folder, **saved)
    return folder


def change(file: Path, work: Any) -> None:
    """Apply ``work`` to the tensors of a file, and leave its header's metadata alone."""
    with safe_open(file, "pt") as opened:
        noted = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    work(tensors)
    save_file(tensors, file, metadata=noted)


@pytest.mark.parametrize("name", ["bert-mlm", "albert-mlm", "gpt2", "marian", "llama-tied", "roberta-qa"])
def test_what_was_saved_is_as_it_was_written(tiny_model: Any, tmp_path: Path, name: str) -> None:
    folder = quantized(tiny_model, tmp_path / "out", name)
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = len(file.keys())
    found = verify(folder)
    assert found == Verified(count, len(lexibit.checkpoint.inspect(folder).weights), True)
    assert found.weights > 5


def test_shards_are_one_checkpoint(tiny_model: Any, tmp_path: Path) -> None:
    whole = verify(quantized(tiny_model, tmp_path / "whole"))
    folder = quantized(tiny_model, tmp_path / "shards", max_shard_size="4KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert verify(folder) == whole
    shards[1].unlink()
    with pytest.raises(FormatError, match="missing"):
        verify(folder)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_bit_of_a_tensor_may_change(packed: Path, tmp_path: Path, place: float, bit: int) -> None:
    data = bytearray(packed.read_bytes())
    body = 8 + int.from_bytes(data[:8], "little")
    data[body + int(place * (len(data) - body))] ^= 1 << bit
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(data)
    with pytest.raises(FormatError, match="has other bytes than were written"):
        verify(changed)


@pytest.fixture
def packed(tiny_model: Any, tmp_path: Path) -> Path:
    return quantized(tiny_model, tmp_path / "out") / "model.safetensors"


def test_a_tensor_that_is_gone_or_came_is_named(packed: Path) -> None:
    key = "bert.encoder.layer.0.output.LayerNorm.weight"
    before = packed.read_bytes()
    change(packed, lambda tensors: tensors.pop("bert.encoder.layer.1.attention.self.key.weight"))
    with pytest.raises(FormatError, match=r"layer\.1\.attention\.self\.key\.weight.*is missing"):
        verify(packed)
    packed.write_bytes(before)
    change(packed, lambda tensors: tensors.pop("cls.predictions.transform.dense.bias"))
    with pytest.raises(FormatError, match=r"cls\.predictions\.transform\.dense\.bias.*is missing"):
        verify(packed)
    packed.write_bytes(before)
    change(packed, lambda tensors: tensors.update(stranger=torch.ones(3)))
    with pytest.raises(FormatError, match="nothing is noted of the tensor stranger"):
        verify(packed)
    packed.write_bytes(before)
    change(packed, lambda tensors: tensors.update({key: tensors[key] * 2}))
    with pytest.raises(FormatError, match=key):
        verify(packed)


@pytest.mark.parametrize("noted", ["none", ["a"], {"a": 1}, {"a": "00"}, {"a": "Z" * 32}])
def test_checksums_that_are_none_are_refused(packed: Path, noted: Any) -> None:
    with safe_open(packed, "pt") as file:
        document = json.loads(file.metadata()["lexibit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, packed, metadata={"lexibit": json.dumps(document | {"checksums": noted})})
    with pytest.raises(FormatError, match=r"model\.safetensors: its checksums are none"):
        verify(packed)
    del document["checksums"]
    save_file(tensors, packed, metadata={"lexibit": json.dumps(document)})
    with pytest.raises(FormatError, match="no record of weights"):
        verify(packed)


@pytest.mark.parametrize("version", [1, 2])
def test_older_files_are_checked_without_checksums(version: int, run: Any) -> None:
    file = GOLDEN / f"format-{version}.safetensors"
    found = verify(file)
    assert found.weights >= 3
    assert not found.checksums
    code, out, _ = run("verify", file)
    assert code == 0
    assert "no checksums, as its format is older" in " ".join(out.split())


def test_a_float_file_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.eye(3)}, tmp_path / "float.safetensors")
    with pytest.raises(LexibitError, match="no weights in codes"):
        verify(tmp_path / "float.safetensors")


def test_the_command_tells_and_fails(tiny_model: Any, tmp_path: Path, run: Any, run_json: Any) -> None:
    folder = quantized(tiny_model, tmp_path / "out")
    told = run_json("verify", folder)
    assert told["checksums"] is True
    code, out, _ = run("verify", folder)
    assert code == 0
    assert f"{told['tensors']} tensors, {told['weights']} weights in codes: all as they were written" in (
        " ".join(out.split())
    )
    change(folder / "model.safetensors", lambda tensors: tensors["bert.embeddings.LayerNorm.weight"].mul_(3))
    code, _, err = run("verify", folder)
    assert code == 1
    assert "bert.embeddings.LayerNorm.weight has other bytes" in " ".join(err.split())


@pytest.mark.parametrize(
    "fault", ["no index", "renamed shard", "renamed file", "config", "method", "no config"]
)
def test_a_folder_that_could_not_be_loaded_is_not_whole(tiny_model: Any, tmp_path: Path, fault: str) -> None:
    folder = quantized(tiny_model, tmp_path / "out", max_shard_size="4KB" if "shard" in fault else "1GB")
    if fault == "no index":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    elif fault == "renamed shard":
        sorted(folder.glob("*.safetensors"))[1].rename(folder / "model-2.safetensors")
    elif fault == "renamed file":
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
    elif fault == "config":
        (folder / "config.json").write_text("{")
    else:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["quant_method"] = "lexibitt"
        if fault == "no config":
            del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=str(folder)):
        verify(folder)
