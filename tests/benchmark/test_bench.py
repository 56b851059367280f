"""Everyone in turn: who takes part, what is counted, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lexibit
from lexibit import LexibitConfig, LexibitError, benchmark
from lexibit.benchmark.contestant import nbytes
from lexibit.nn import codebooks
from lexibit.ops import native

Make = Callable[..., Any]
NAMES = ["float32", "lexibit, float32", "lexibit, bfloat16", "lexibit, int8"]
if not native.supports("bfloat16"):
    NAMES.remove("lexibit, bfloat16")


@pytest.fixture
def model(tiny_model: Make) -> Any:
    model = tiny_model("bert-classifier")
    lexibit.quantize(model, LexibitConfig(bits=4, groups="row"), progress=False)
    return model


def bench(model: Any, **options: Any) -> benchmark.Bench:
    return benchmark.bench(model, progress=False, rounds=2, **options)


def test_every_contestant_is_timed_on_every_shape_with_every_number_of_threads(model: Any) -> None:
    before = torch.get_num_threads()
    found = bench(model, texts=(1, 3), tokens=(4, 7), threads=(1, 2))
    assert torch.get_num_threads() == before
    names = NAMES
    expected = [
        (name, threads, texts, tokens)
        for threads in (1, 2)
        for texts in (1, 3)
        for tokens in (4, 7)
        for name in names
    ]
    assert [(one.name, one.threads, one.texts, one.tokens) for one in found.timings] == expected
    for one in found.timings:
        assert 0 < one.low <= one.seconds <= one.high
        assert one.cosine > 0.95
    for one in found.timings:
        if one.name == "float32":
            assert (one.times, round(one.cosine, 5)) == (1.0, 1.0)
        if one.name == "lexibit, float32":
            assert one.cosine == pytest.approx(1, abs=1e-4)
    assert found.bytes["lexibit, int8"] == nbytes(model) < found.bytes["float32"]
    assert found.machine["kernels"] in lexibit.ops.native.available()


def test_the_model_is_as_before(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        before = model(ids).logits
    model.train()
    bench(model, texts=(1,), tokens=(4,))
    assert model.training
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)
    assert {weight.compute for weight in codebooks(model).values()} == {"float32"}


@pytest.mark.parametrize("name", ["gpt2", "llama", "marian", "distilbert-mlm"])
def test_models_of_other_kinds_run(tiny_model: Make, name: str) -> None:
    model = tiny_model(name)
    lexibit.quantize(model, LexibitConfig(bits=4), progress=False)
    assert [one.name for one in bench(model, texts=(1,), tokens=(4,)).timings] == NAMES


def test_what_cannot_be_timed_is_told(model: Any, tiny_model: Make) -> None:
    with pytest.raises(LexibitError, match="has no weights in codes: quantize it first"):
        bench(tiny_model("bert-classifier"))
    longest = model.config.max_position_embeddings
    assert [one.tokens for one in bench(model, texts=(1,)).timings][:: len(NAMES)] == [16, longest]
    with pytest.raises(LexibitError, match=f"texts of {longest + 1} tokens: the model takes {longest}"):
        bench(model, tokens=(longest + 1,))
    # of RoBERTa's positions two are none
    roberta = tiny_model("roberta-qa")
    lexibit.quantize(roberta, LexibitConfig(bits=4), progress=False)
    longest = roberta.config.max_position_embeddings - 2
    with pytest.raises(LexibitError, match=f"the model takes {longest} at most"):
        bench(roberta, tokens=(longest + 1,))
    assert bench(roberta, texts=(1,), tokens=(longest,)).timings


@pytest.mark.filterwarnings("ignore")
def test_other_tools_take_part_and_give_what_they_should(model: Any) -> None:
    for package in ("nncf", "onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="the extra peers is not installed")
    found = bench(model, texts=(2,), tokens=(6,), others=True)
    cosine = {one.name: one.cosine for one in found.timings}
    assert set(cosine) - set(NAMES) == {
        "torch, bf16, packed",
        "torch, int8 dynamic",
        "ONNX Runtime, int8",
        "OpenVINO, int8 weights",
        "OpenVINO, int4 weights",
    }
    assert all(value > 0.8 for value in cosine.values())
    assert found.bytes["torch, bf16, packed"] == pytest.approx(found.bytes["float32"] / 2, rel=0.1)


def test_a_missing_tool_is_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(LexibitError, match=r"pip install 'lexibit\[peers\]'"):
        bench(model, others=True)
