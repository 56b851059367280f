"""What a quantized model computes with: the same model, in int8 and back."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

import lexibit
from lexibit import LexibitConfig, LexibitError, ops
from lexibit.nn import codebooks
from lexibit.ops import native

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}
ENCODERS = {
    "bert": lambda: BertModel(BertConfig(num_hidden_layers=2, **SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(num_hidden_layers=2, **SIZES)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(n_layers=2, dim=64, n_heads=4, hidden_dim=128, vocab_size=100)
    ),
    "albert": lambda: AlbertModel(AlbertConfig(num_hidden_layers=2, embedding_size=32, **SIZES)),
}
IDS = torch.arange(2, 26).view(2, 12)


def quantized(kind: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = ENCODERS[kind]().eval()
    lexibit.quantize(model, LexibitConfig(**{"bits": 4, "groups": "row"} | settings), progress=False)
    return model


def hidden(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(IDS).last_hidden_state


@pytest.mark.parametrize("compute", ["int8", "bfloat16"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_model_computes_in_less_near_its_float32_and_goes_back_to_it(kind: str, compute: str) -> None:
    model = quantized(kind)
    before = hidden(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert lexibit.optimize(model, compute) == {}
    products = [one for one in model.modules() if isinstance(one, lexibit.nn.QuantizedLinear)]
    assert products
    assert all(one.weight_codebook.compute == compute for one in products)
    # the activations of the feed-forward layers are done with the products
    fused = [one._followed_by for one in products if one._followed_by != "none"]
    shared = {"albert": 1}.get(kind, 2)
    assert fused == [{"albert": "gelu_tanh"}.get(kind, "gelu")] * shared
    after = hidden(model)
    assert not torch.equal(after, before)
    assert nn.functional.cosine_similarity(after, before, dim=-1).min() > 0.99
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert lexibit.optimize(model, "float32") == {}
    assert torch.equal(hidden(model), before)


@pytest.mark.parametrize("kind", ENCODERS)
def test_fusing_changes_nothing_but_rounding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.kernels("reference"):
        fused, plain = quantized(kind), quantized(kind)
        lexibit.optimize(fused)
        monkeypatch.setattr(sys.modules["lexibit.optimize"], "_FEED_FORWARD", {})
        lexibit.optimize(plain)
        assert {
            one._followed_by for one in plain.modules() if isinstance(one, lexibit.nn.QuantizedLinear)
        } == {"none"}
        assert torch.equal(hidden(fused), hidden(plain))


@pytest.mark.parametrize("compute", ops.COMPUTE)
@pytest.mark.skipif(native.chosen().name == native.REFERENCE, reason="the reference decodes a whole matrix")
def test_no_float_copy_of_a_weight_is_made(compute: str) -> None:
    model = nn.Sequential(nn.Embedding(3000, 512), nn.Linear(512, 2000), nn.Linear(2000, 512)).eval()
    largest = max(one.nbytes for one in model.parameters())
    lexibit.quantize(model, LexibitConfig(bits=3), progress=False)
    held = [*model.parameters(), *model.buffers()]
    file = sum(weight.nbytes for weight in codebooks(model).values()) + 4 * 2512  # and biases
    assert sum(one.nbytes for one in held) < 1.3 * file
    if native.supports(compute):
        lexibit.optimize(model, compute)
        for tokens in (1, 20):
            ids = torch.arange(tokens)[None]
            with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as seen:
                assert model(ids).shape == (1, tokens, 512)
            taken = [event.self_cpu_memory_usage for event in seen.events()]
            assert 0 < max(taken) <= 4 * 2000 * tokens < largest / 10


def test_twice_is_once() -> None:
    model = quantized("bert")
    lexibit.optimize(model)
    once = hidden(model)
    lexibit.optimize(model)
    assert torch.equal(hidden(model), once)
    lexibit.optimize(model, "float32")
    assert not any(type(one).__name__ == "Done" for one in model.modules())


def test_it_is_saved_copied_and_dequantized_as_before(tmp_path: Path) -> None:
    model = quantized("bert")
    model.save_pretrained(tmp_path / "before")
    floats = copy.deepcopy(model)
    lexibit.dequantize(floats)
    lexibit.optimize(model)
    inside = hidden(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(hidden(other), inside)
        assert other.tie_weights.args == (other,)
    lexibit.dequantize(model)
    assert not codebooks(model)
    assert torch.equal(hidden(model), hidden(floats))


def test_a_tied_embedding_is_looked_up_exactly_and_multiplied_in_int8() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(num_hidden_layers=1, **SIZES)).eval()
    lexibit.quantize(model, LexibitConfig(bits=4), progress=False)
    words = model.bert.embeddings.word_embeddings
    before = words(IDS)
    lexibit.optimize(model)
    assert model.cls.predictions.decoder.weight_codebook is words.weight_codebook
    assert words.weight_codebook.compute == "int8"
    assert torch.equal(words(IDS), before)


def test_what_stays_in_float32_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = quantized("bert", scheme="ocs", groups="matrix")
    with caplog.at_level(logging.WARNING, logger="lexibit"):
        left = lexibit.optimize(model)
    assert set(left.values()) == {"it has extra rows or columns"}
    assert f"{len(left)} weights compute in float32" in caplog.text
    assert all(codebooks(model)[name].compute == "float32" for name in left)
    gpt2 = GPT2Model(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    lexibit.quantize(gpt2, LexibitConfig(bits=4), progress=False)
    left = lexibit.optimize(gpt2)
    assert left["h.0.mlp.c_fc.weight"] == "its matrix stands the other way round (Conv1D)"
    lstm = nn.Sequential(nn.LSTM(8, 8))
    lexibit.quantize(lstm, LexibitConfig(bits=4), progress=False)
    assert lexibit.optimize(lstm)["0.weight_ih_l0"] == "a recurrent layer decodes it"


def test_a_cpu_without_such_kernels_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = quantized("bert")
    with ops.kernels("reference"), caplog.at_level(logging.WARNING, logger="lexibit"):
        assert lexibit.optimize(model) == {}
        assert "no kernels compute in int8 here (reference)" in caplog.text
        by_reference = hidden(model)
    if native.supports("int8"):
        torch.testing.assert_close(hidden(model), by_reference, rtol=1e-3, atol=1e-3)


def test_another_word_and_a_float_model_are_refused() -> None:
    with pytest.raises(LexibitError, match="unknown compute 'int4': did you mean 'int8'"):
        lexibit.optimize(quantized("bert"), "int4")
    with pytest.raises(LexibitError, match="BertModel has no weights in codes: quantize it first"):
        lexibit.optimize(ENCODERS["bert"]())


def test_training_says_that_int8_has_no_gradient() -> None:
    model = quantized("bert")
    lexibit.optimize(model)
    with pytest.raises(LexibitError, match="no gradient"):
        model(IDS).last_hidden_state.sum().backward()


def test_transformers_own_dequantize_undoes_it_first() -> None:
    model = quantized("bert")
    before = hidden(model)
    lexibit.optimize(model)
    model.dequantize()
    torch.testing.assert_close(hidden(model), before, rtol=1e-4, atol=1e-4)


def test_a_linear_layers_own_activation_is_its_own() -> None:
    class Layer(nn.Linear):
        activation = "gelu"

        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.gelu(super().forward(input))

    model = nn.Sequential(Layer(8, 8))
    lexibit.quantize(model, LexibitConfig(bits=8), progress=False)
    x = torch.randn(2, 8)
    expected = nn.functional.gelu(nn.functional.linear(x, model[0].weight, model[0].bias))
    torch.testing.assert_close(model(x), expected)


def test_a_hook_on_an_activation_is_still_called() -> None:
    model = quantized("bert")
    seen: list[int] = []
    model.encoder.layer[0].intermediate.intermediate_act_fn.register_forward_hook(lambda *_: seen.append(1))
    lexibit.optimize(model)
    hidden(model)
    assert seen == [1]


def test_both_forms_of_gelu_are_told_apart() -> None:
    for approximate in ("none", "tanh"):
        model = quantized("bert")
        for layer in model.encoder.layer:
            layer.intermediate.intermediate_act_fn = nn.GELU(approximate=approximate)
        lexibit.optimize(model)
        names = {layer.intermediate.dense._followed_by for layer in model.encoder.layer}
        assert names == {"gelu" if approximate == "none" else "gelu_tanh"}
