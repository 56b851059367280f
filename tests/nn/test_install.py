"""Modules that change to codes in place, keep what they are, and change back."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lexibit import CodebookWeight, LexibitConfig, dequantize, quantize
from lexibit.nn import (
    Quantized,
    QuantizedConv1D,
    QuantizedEmbedding,
    QuantizedGRU,
    QuantizedLinear,
    QuantizedLSTM,
    codebooks,
    restore_all,
)

# said once in a process, whichever test comes first
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def quantized(model: nn.Module, **options: object) -> nn.Module:
    quantize(model, LexibitConfig(**{"scheme": "linear", "bits": 3} | options), progress=False)
    return model


def reachable_floats(start: object) -> Iterator[Tensor]:
    """Every floating-point tensor that can be reached from an object, without leaving for its code."""
    code = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.FrameType)
    seen, todo = {id(start)}, [start]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor) and item.is_floating_point():
            yield item
        for other in gc.get_referents(item):
            if id(other) not in seen and not isinstance(other, code):
                seen.add(id(other))
                todo.append(other)


MODULES = {
    "linear": (lambda: nn.Linear(30, 20), QuantizedLinear, ["weight"]),
    "embedding": (lambda: nn.Embedding(30, 20, padding_idx=0), QuantizedEmbedding, ["weight"]),
    "conv1d": (lambda: Conv1D(30, 20), QuantizedConv1D, ["weight"]),
    "lstm": (
        lambda: nn.LSTM(20, 15, 2, bidirectional=True, proj_size=10),
        QuantizedLSTM,
        [
            f"weight_{kind}_l{i}{side}"
            for i in (0, 1)
            for side in ("", "_reverse")
            for kind in ("ih", "hh", "hr")
        ],
    ),
    "gru": (lambda: nn.GRU(20, 15), QuantizedGRU, ["weight_ih_l0", "weight_hh_l0"]),
}


@pytest.fixture(params=MODULES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, type[nn.Module], list[str]]:
    make, cls, parameters = MODULES[request.param]
    return make(), cls, parameters


Case = tuple[nn.Module, type[nn.Module], list[str]]


def test_a_module_keeps_its_identity_and_its_ancestry(case: Case) -> None:
    module, cls, parameters = case
    model, plain = nn.Sequential(module), type(module)
    quantized(model)
    assert model[0] is module
    assert type(module) is cls
    assert isinstance(module, plain)
    assert isinstance(module, Quantized)
    assert set(codebooks(model)) == {f"0.{name}" for name in parameters}


def test_weights_are_readable_and_are_what_the_codes_say(case: Case) -> None:
    module, _, parameters = case
    before = {name: getattr(module, name).detach().clone() for name in parameters}
    quantized(nn.Sequential(module), bits=8)
    for name in parameters:
        weight = getattr(module, name)
        codebook = module.get_submodule(name + CodebookWeight.SUFFIX)
        assert torch.equal(weight, codebook.decode())
        assert weight.shape == before[name].shape
        # equal bins, each weight at most a bin from the mean of its bin
        bin_width = (before[name].max() - before[name].min()) / 256
        assert (weight - before[name]).abs().max() <= bin_width * 1.001
        assert not torch.equal(weight, before[name])


def test_no_float_copy_of_a_weight_is_kept(case: Case) -> None:
    module, _, parameters = case
    sizes = {getattr(module, name).numel() for name in parameters}
    smallest = min(sizes)
    large = [t for t in reachable_floats(module) if t.numel() >= smallest]
    assert len(large) >= len(parameters), "the search does not find the float weights"
    witnesses = [weakref.ref(getattr(module, name)) for name in parameters]
    del large

    quantized(nn.Sequential(module))
    module.to("cpu").train().eval()
    gc.collect()

    assert all(isinstance(child, CodebookWeight) for child in module.children())
    assert [t.shape for t in reachable_floats(module) if t.numel() >= smallest] == []
    assert [p.shape for p in module.parameters() if p.dim() > 1] == []
    assert [name for name, value in vars(module).items() if isinstance(value, Tensor)] == []
    assert [witness() for witness in witnesses] == [None] * len(parameters)


def test_a_forward_pass_leaves_no_float_weight_behind(case: Case) -> None:
    module, _, parameters = case
    smallest = min(getattr(module, name).numel() for name in parameters)
    quantized(nn.Sequential(module))
    x = torch.arange(2) if isinstance(module, nn.Embedding) else torch.randn(2, 20)
    if isinstance(module, nn.Linear):
        x = torch.randn(2, 30)
    module(x)
    assert [t.shape for t in reachable_floats(module) if t.numel() >= smallest] == []


def test_the_bias_and_other_attributes_are_kept() -> None:
    linear, words = nn.Linear(6, 5), nn.Embedding(9, 4, padding_idx=3)
    bias = linear.bias
    linear.note = "mine"
    quantized(nn.Sequential(linear, words))
    assert isinstance(linear, QuantizedLinear)
    assert linear.bias is bias
    assert (linear.in_features, linear.out_features, linear.note) == (6, 5, "mine")
    assert (words.padding_idx, words.num_embeddings, words.embedding_dim) == (3, 9, 4)


def test_hooks_are_kept() -> None:
    linear = nn.Linear(6, 5)
    calls = []
    linear.register_forward_pre_hook(lambda module, args: calls.append("before"))
    linear.register_forward_hook(lambda module, args, output: calls.append("after"))
    quantized(nn.Sequential(linear))
    assert type(linear) is QuantizedLinear
    linear(torch.randn(2, 6))
    assert calls == ["before", "after"]


def test_a_module_used_twice_stays_shared() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    quantized(model)
    assert model[0] is model[2] is shared
    assert type(shared) is QuantizedLinear
    assert len(codebooks(model)) == 1


# subclasses ------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Reader(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2, self.bias)


class ScaledWords(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.t()


@pytest.mark.usefixtures("exact")
def test_a_subclass_that_calls_super_finds_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Scaled(6, 5)
    quantized(nn.Sequential(module))
    assert isinstance(module, Scaled)
    assert isinstance(module, QuantizedLinear)
    x = torch.randn(3, 6)
    expected = 2 * F.linear(x, module.weight, module.bias)
    # the weight is not decoded for it on the way
    monkeypatch.setattr(CodebookWeight, "decode", lambda self: pytest.fail("decoded"))
    assert torch.equal(module(x), expected)


def test_a_subclass_that_reads_its_weight_gets_it_decoded() -> None:
    module = Reader(6, 5)
    quantized(nn.Sequential(module))
    assert isinstance(module, QuantizedLinear)
    x = torch.randn(3, 6)
    expected = F.linear(x, 2 * module.weight_codebook.decode(), module.bias)
    assert torch.equal(module(x), expected)


def test_a_subclass_of_embedding_keeps_its_forward() -> None:
    words = ScaledWords(9, 4)
    quantized(nn.Sequential(words))
    assert isinstance(words, QuantizedEmbedding)
    ids = torch.tensor([[0, 8]])
    assert torch.equal(words(ids), 3 * words.weight_codebook.decode()[ids])


def test_two_modules_of_a_subclass_have_one_quantized_class() -> None:
    model = quantized(nn.Sequential(Scaled(6, 5), Scaled(5, 6)))
    assert isinstance(model[0], Quantized)
    assert type(model[0]) is type(model[1])


def test_a_bare_parameter_is_read_from_codes() -> None:
    module = Bare()
    quantized(nn.Sequential(module), parameters=["*table"])
    assert isinstance(module, Quantized)
    assert isinstance(module, Bare)
    x = torch.randn(3, 6)
    assert torch.equal(module(x), x @ module.table_codebook.decode().t())


@pytest.mark.parametrize("parameters", [[], ["in_proj_weight"]])
def test_attention_reads_its_projections_from_codes(parameters: list[str]) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    quantized(attention, parameters=parameters)
    assert isinstance(attention.out_proj, QuantizedLinear)
    assert isinstance(attention, Quantized) == bool(parameters)
    plain = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        plain.in_proj_weight.copy_(attention.in_proj_weight)
        plain.out_proj.weight.copy_(attention.out_proj.weight)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        result = attention(x, x, x)
        expected = plain(x, x, x)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result[1], expected[1], rtol=1e-5, atol=1e-6)


def test_an_encoder_layer_of_pytorch_runs_from_codes() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    quantized(layer)
    assert isinstance(layer.linear1, QuantizedLinear)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = layer(x)
        dequantize(layer)
        assert type(layer.linear1) is nn.Linear
        torch.testing.assert_close(fast, layer(x), rtol=1e-5, atol=1e-6)


# writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [nn.Parameter(torch.zeros(5, 6)), torch.zeros(5, 6), None], ids=["parameter", "tensor", "none"]
)
def test_a_quantized_weight_cannot_be_assigned(value: object) -> None:
    linear = nn.Linear(6, 5)
    quantized(nn.Sequential(linear))
    before = linear.weight
    with pytest.raises((AttributeError, TypeError), match=r"weight.*dequantize"):
        linear.weight = value
    assert torch.equal(linear.weight, before)
    assert torch.equal(linear(torch.eye(6)), F.linear(torch.eye(6), before, linear.bias))


def test_the_bias_of_a_quantized_layer_can_be_assigned() -> None:
    linear = nn.Linear(6, 5)
    quantized(nn.Sequential(linear))
    assert isinstance(linear, Quantized)
    linear.bias = nn.Parameter(torch.ones(5))
    assert torch.equal(linear(torch.zeros(1, 6)), torch.ones(1, 5))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    linear = nn.Linear(6, 5)
    quantized(nn.Sequential(linear))
    assert isinstance(linear, Quantized)
    with pytest.raises(AttributeError, match="wieght"):
        _ = linear.wieght


# copies ----------------------------------------------------------------------------------------


def test_a_deep_copy_is_quantized_and_independent(case: Case) -> None:
    module, cls, parameters = case
    quantized(nn.Sequential(module))
    other = copy.deepcopy(module)
    assert type(other) is cls
    for name in parameters:
        expected = getattr(module, name)
        assert torch.equal(getattr(other, name), expected)
        other.get_submodule(name + CodebookWeight.SUFFIX).levels.zero_()
        assert torch.equal(getattr(module, name), expected)


def test_a_pickled_module_comes_back(case: Case) -> None:
    module, cls, parameters = case
    quantized(nn.Sequential(module))
    other = pickle.loads(pickle.dumps(module))
    assert type(other) is cls
    for name in parameters:
        assert torch.equal(getattr(other, name), getattr(module, name))


# and back --------------------------------------------------------------------------------------


def test_restoring_gives_the_plain_module_with_the_decoded_weights(case: Case) -> None:
    module, cls, parameters = case
    plain = type(module)
    keys = set(module.state_dict())
    quantized(nn.Sequential(module))
    assert type(module) is cls
    decoded = {name: getattr(module, name) for name in parameters}
    restore_all(module)
    assert type(module) is plain
    assert list(module.children()) == []
    assert set(module.state_dict()) == keys
    for name in parameters:
        assert isinstance(getattr(module, name), nn.Parameter)
        assert torch.equal(getattr(module, name), decoded[name])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("cls", [Scaled, Reader, Bare])
def test_restoring_a_subclass_gives_that_subclass(cls: type[nn.Module]) -> None:
    module = cls() if cls is Bare else cls(6, 5)
    x = torch.randn(3, 6)
    quantized(module, parameters=["table"] if cls is Bare else [])
    assert isinstance(module, Quantized)
    expected = module(x)
    restore_all(module)
    assert type(module) is cls
    assert torch.equal(module(x), expected)


def test_restoring_keeps_weights_shared() -> None:
    words, head = nn.Embedding(9, 6), nn.Linear(6, 9)
    head.weight = words.weight
    model = quantized(nn.Sequential(words, head))
    assert words.weight_codebook is head.weight_codebook
    restore_all(model)
    assert type(head) is nn.Linear
    assert head.weight is words.weight


def test_restoring_weights_that_one_module_shares_with_itself() -> None:
    lstm = nn.LSTM(6, 6)
    lstm.weight_hh_l0 = lstm.weight_ih_l0
    x = torch.randn(4, 2, 6)
    quantized(lstm)
    assert lstm.weight_hh_l0_codebook is lstm.weight_ih_l0_codebook
    expected = lstm(x)[0]
    restore_all(lstm)
    assert type(lstm) is nn.LSTM
    assert lstm.weight_hh_l0 is lstm.weight_ih_l0
    assert torch.equal(lstm(x)[0], expected)


def test_restoring_a_frozen_weight_leaves_it_frozen() -> None:
    linear = nn.Linear(6, 5).requires_grad_(False)
    quantized(nn.Sequential(linear))
    assert isinstance(linear, Quantized)
    restore_all(linear)
    assert not linear.weight.requires_grad


def test_restoring_a_plain_module_changes_nothing() -> None:
    linear = nn.Linear(6, 5)
    weight = linear.weight
    restore_all(linear)
    assert linear.weight is weight


def test_a_quantized_subclass_is_pickled_and_copied():
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    model = torch.nn.Sequential(BartScaledWordEmbedding(11, 8, 0, embed_scale=3.0))
    quantize(model, LexibitConfig(bits=3), progress=False)
    assert isinstance(model[0], Quantized)
    ids = torch.arange(11)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again[0]) is type(model[0])
        assert torch.equal(again(ids), model(ids))
