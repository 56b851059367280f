"""The layers against their float classes with the decoded weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lexibit import LexibitConfig, dequantize, quantize
from lexibit.nn import Quantized

# said once in a process, whichever test comes first
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def both(module: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The module quantized, and a float module with the values that it decodes to."""
    module.eval()
    plain = copy.deepcopy(module)
    quantize(module, LexibitConfig(**{"scheme": "linear", "bits": 3} | options), progress=False)
    assert isinstance(module, Quantized)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.dim() > 1:
                assert not torch.equal(parameter, getattr(module, name))
                # as codes have no gradient; PyTorch multiplies in another order where a weight has one
                parameter.requires_grad_(False)
            parameter.copy_(getattr(module, name))
    return module, plain


def same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("groups", ["matrix", "row", "columns:4"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 11), (2, 3, 11), (11,), (0, 11)])
def test_linear(groups: str, bias: bool, shape: tuple[int, ...]) -> None:
    ours, plain = both(nn.Linear(11, 7, bias=bias), groups=groups)
    x = torch.randn(shape)
    same(ours(x), plain(x))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("groups", ["matrix", "row", "columns:4"])
@pytest.mark.parametrize("shape", [(3, 11), (2, 3, 11), (11,), (0, 11)])
def test_conv1d(groups: str, shape: tuple[int, ...]) -> None:
    ours, plain = both(Conv1D(7, 11), groups=groups)
    x = torch.randn(shape)
    same(ours(x), plain(x))


@pytest.mark.parametrize("groups", ["matrix", "row", "columns:4"])
@pytest.mark.parametrize("padding", [None, 0, -1])
def test_embedding(groups: str, padding: int | None) -> None:
    ours, plain = both(nn.Embedding(13, 5, padding_idx=padding), groups=groups)
    ids = torch.tensor([[0, 12, 3], [3, 0, 1]])
    same(ours(ids), plain(ids))
    assert ours.padding_idx == plain.padding_idx


def test_an_embedding_refuses_ids_that_are_not_whole_numbers() -> None:
    ours, plain = both(nn.Embedding(13, 5))
    for module in (plain, ours):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            module(torch.tensor([1.7]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False},
        {"num_layers": 3, "dropout": 0.5},
        {"proj_size": 3},
        {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_recurrent(cls: type[nn.RNNBase], options: dict[str, Any]) -> None:
    if cls is nn.GRU and "proj_size" in options:
        options = {name: value for name, value in options.items() if name != "proj_size"}
    ours, plain = both(cls(6, 5, **options))
    x = torch.randn(4, 3, 6)
    with torch.no_grad():
        output, state = ours(x)
        same((output, state), plain(x))
        same(ours(x, state), plain(x, state))
        same(ours(x[0]), plain(x[0]))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_recurrent_with_packed_sequences(cls: type[nn.RNNBase]) -> None:
    ours, plain = both(cls(6, 5, batch_first=True))
    x = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 4, 6), [4, 2, 1], batch_first=True)
    with torch.no_grad():
        same(ours(x)[0].data, plain(x)[0].data)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_recurrent_survives_moves_and_flattening(cls: type[nn.RNNBase]) -> None:
    ours, plain = both(cls(6, 5))
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    ours.flatten_parameters()
    ours.double().to("cpu")
    assert ours.weight_ih_l0.dtype == torch.float64
    with torch.no_grad():
        same(ours(x)[0], plain.double()(x)[0])


def test_recurrent_passes_gradients_to_its_input_and_biases() -> None:
    ours, plain = both(nn.LSTM(6, 5))
    x = torch.randn(4, 3, 6)
    gradients = []
    for module in (ours, plain):
        leaf = x.clone().requires_grad_()
        module(leaf)[0].square().sum().backward()
        gradients.append((leaf.grad, module.bias_ih_l0.grad, module.bias_hh_l0.grad))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_some_weights_of_a_recurrent_layer_may_stay_floats() -> None:
    lstm = nn.LSTM(6, 5).eval()
    quantize(lstm, LexibitConfig(scheme="linear", exclude=["weight_hh_l0"]), progress=False)
    assert isinstance(lstm, Quantized)
    assert isinstance(lstm.weight_hh_l0, nn.Parameter)
    x = torch.randn(4, 3, 6)
    with torch.no_grad():
        expected = lstm(x)
        dequantize(lstm)
        assert type(lstm) is nn.LSTM
        same(lstm(x), expected)


@pytest.mark.parametrize("make", [lambda: nn.Linear(11, 7), lambda: Conv1D(7, 11)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_treats_a_quantized_layer_like_a_float_one(make: Any, dtype: torch.dtype) -> None:
    """Under autocast, what comes from attention is bfloat16 and what comes from a norm is float32."""
    ours, plain = both(make())
    x = torch.randn(3, 11).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(x)
        result = ours(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)


def test_autocast_passes_gradients() -> None:
    ours, plain = both(nn.Linear(11, 7))
    gradients = []
    for module in (ours, plain):
        torch.manual_seed(0)
        x = torch.randn(3, 11, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x)
        out.float().sum().backward()
        gradients.append((x.grad, module.bias.grad))
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_autocast_compiles_like_it_runs() -> None:
    ours, _ = both(nn.Linear(11, 7))
    model = nn.Sequential(nn.Linear(11, 11), ours, nn.Linear(7, 3)).eval()
    # the backend traces, which is where dtypes can disagree, and leaves out the slow code generation
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 11).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            result = compiled(x)
            expected = model(x)
        assert result.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(result, expected)


def test_half_precision_models_give_half_precision_results() -> None:
    ours, plain = both(nn.Linear(11, 7))
    ours.bfloat16()
    plain.bfloat16()
    x = torch.randn(3, 11, dtype=torch.bfloat16)
    assert ours(x).dtype == torch.bfloat16
    same(ours(x), plain(x))
