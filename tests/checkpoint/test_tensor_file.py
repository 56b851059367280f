"""Files written tensor by tensor: the bytes are those of safetensors' own writer."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lexibit import FormatError, format
from lexibit.checkpoint.tensor_file import TensorFile, stored

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]
ENTRIES = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4))


def header(number):
    return {"lexibit": json.dumps({"checksums": {"a": f"{number:032x}"}})}


def on_meta(tensors):
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), ENTRIES, max_size=12),
    st.randoms(use_true_random=False),
)
def test_the_bytes_are_those_of_save_file(tmp_path_factory, entries, order):
    tensors = {
        name: torch.randint(0, 2, shape).to(dtype)
        for name, (dtype, shape) in entries.items()
        if name != "__metadata__"
    }
    folder = tmp_path_factory.mktemp("files")
    save_file(tensors, folder / "expected", metadata=header(7))
    names = list(tensors)
    order.shuffle(names)
    file = TensorFile(folder / "found", on_meta(tensors), header(0))
    for name in names:
        assert file.write(name, tensors[name]) == format.checksum(tensors[name])
    file.finish(header(7))
    assert (folder / "found").read_bytes() == (folder / "expected").read_bytes()


def test_what_is_there_already_stays(tmp_path):
    tensors = {"a": torch.arange(10.0), "b": torch.arange(7, dtype=torch.uint8)}
    file = TensorFile(tmp_path / "file", on_meta(tensors), header(0))
    file.write("a", tensors["a"])
    assert file.holds("a", format.checksum(tensors["a"]))
    assert not file.holds("b", format.checksum(tensors["b"]))
    file = TensorFile(tmp_path / "file", on_meta(tensors), header(0))
    assert file.holds("a", format.checksum(tensors["a"]))
    file.write("b", tensors["b"])
    file.finish(header(1))
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_its_space_is_reserved_at_once(tmp_path):
    TensorFile(tmp_path / "file", {"a": torch.empty(1 << 20, device="meta")}, {})
    status = (tmp_path / "file").stat()
    assert status.st_size > 4 << 20
    assert status.st_blocks * 512 >= 4 << 20


def test_a_file_that_was_longer_is_cut(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    tensors = {"a": torch.ones(3)}
    file = TensorFile(tmp_path / "file", on_meta(tensors), {})
    file.write("a", tensors["a"])
    file.finish({})
    assert torch.equal(load_file(tmp_path / "file")["a"], tensors["a"])


def test_a_tensor_may_come_in_parts(tmp_path):
    tensors = {"a": torch.randn(1000), "b": torch.ones(2)}
    file = TensorFile(tmp_path / "file", on_meta(tensors), {})
    assert file.write_chunks("a", tensors["a"].split(300)) == format.checksum(tensors["a"])
    assert torch.equal(stored(tmp_path / "file")["a"].read(), tensors["a"])


@given(st.dictionaries(st.sampled_from("abcdefgh"), ENTRIES, min_size=1))
def test_what_is_stored_is_read_as_safetensors_reads_it(tmp_path_factory, entries):
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in entries.items()}
    file = tmp_path_factory.mktemp("files") / "file"
    save_file(tensors, file)
    found = stored(file)
    assert found.keys() == tensors.keys()
    for name, tensor in load_file(file).items():
        assert found[name].meta.shape == tensor.shape
        assert found[name].read().dtype == tensor.dtype
        assert torch.equal(found[name].read(), tensor)
        assert torch.equal(
            torch.cat([torch.empty(0, dtype=tensor.dtype), *found[name].chunks()]), tensor.view(-1)
        )


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path):
    save_file({"a": torch.randn(10_000)}, tmp_path / "file")
    tensor = stored(tmp_path / "file")["a"]
    os.truncate(tmp_path / "file", 20_000)
    with pytest.raises(FormatError, match="file: ends inside of a"):
        tensor.read()
    (tmp_path / "file").unlink()
    with pytest.raises(FormatError, match="a cannot be read: No such file"):
        tensor.read()
