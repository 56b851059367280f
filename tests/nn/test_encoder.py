"""A layer of an encoder in one go: as its parts one after the other, or left to them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

import lexibit
from lexibit import LexibitConfig, LexibitError, ops
from lexibit.nn import codebooks
from lexibit.nn.encoder import FusedEncoder, FusedLayer
from lexibit.nn.fused import unfuse
from lexibit.ops import native

pytestmark = pytest.mark.skipif(
    not any(native.supports("encoder", name) for name in native.available()),
    reason="no kernels for a whole layer on this CPU",
)

SIZES = {"vocab_size": 100, "intermediate_size": 160, "num_hidden_layers": 2}
ENCODERS = {
    "bert": lambda **c: BertModel(BertConfig(**SIZES | {"hidden_size": 96, "num_attention_heads": 3} | c)),
    "bert, 16 wide": lambda **c: BertModel(
        BertConfig(**SIZES | {"hidden_size": 64, "num_attention_heads": 4} | c)
    ),
    "bert, 48 wide": lambda **c: BertModel(
        BertConfig(**SIZES | {"hidden_size": 96, "num_attention_heads": 2} | c)
    ),
    "roberta": lambda **c: RobertaModel(
        RobertaConfig(**SIZES | {"hidden_size": 128, "num_attention_heads": 2} | c)
    ),
    "distilbert": lambda **c: DistilBertModel(
        DistilBertConfig(n_layers=2, dim=64, n_heads=2, hidden_dim=160, vocab_size=100, **c)
    ),
    "albert": lambda **c: AlbertModel(
        AlbertConfig(**SIZES | {"hidden_size": 64, "num_attention_heads": 2, "embedding_size": 32} | c)
    ),
}


@cache
def quantized(kind: str, outliers: float, **config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = ENCODERS[kind](**config).eval()
    for parameter in model.parameters():
        # biases and norms that do something
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    lexibit.quantize(model, LexibitConfig(bits=4, groups="row", outliers=outliers), progress=False)
    return model


def optimized(kind: str, outliers: float = 0.0, **config: object) -> PreTrainedModel:
    model = copy.deepcopy(quantized(kind, outliers, **config))
    lexibit.optimize(model)
    return model


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FusedLayer)]


def one_by_one(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for module in model.modules():
        unfuse(module)
    assert not layers(model)
    return model


def near(found: Tensor, expected: Tensor) -> None:
    """As near as numbers come that are now and then rounded to the byte beside."""
    assert nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.9995
    assert (found - expected).abs().mean() < 0.01 * expected.abs().mean()


def calls_of_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call is for, from now on."""
    calls: list[int] = []
    real = native.encode
    monkeypatch.setattr(
        native, "encode", lambda layers, *given: calls.append(len(layers)) or real(layers, *given)
    )
    return calls


def inputs(texts: int, tokens: int) -> Tensor:
    return torch.randint(3, 100, (texts, tokens), generator=torch.Generator().manual_seed(texts * tokens))


@pytest.fixture(params=ENCODERS, scope="module")
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return optimized(request.param)


@pytest.mark.parametrize(("texts", "tokens"), [(1, 1), (1, 5), (2, 4), (1, 16), (3, 21), (2, 70)])
def test_a_layer_is_as_its_parts_one_after_the_other(model: PreTrainedModel, texts: int, tokens: int) -> None:
    assert layers(model)
    ids, plain = inputs(texts, tokens), one_by_one(model)
    with torch.inference_mode():
        near(model(ids).last_hidden_state, plain(ids).last_hidden_state)


def test_padding_counts_for_nothing(model: PreTrainedModel) -> None:
    ids = inputs(3, 21)
    mask = torch.ones_like(ids)
    mask[1, 9:], mask[2, 1:] = 0, 0
    with torch.inference_mode():
        found = model(ids, attention_mask=mask).last_hidden_state
        near(found[mask.bool()], one_by_one(model)(ids, attention_mask=mask).last_hidden_state[mask.bool()])
        ids[1, 9:] = 7
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state[mask.bool()], found[mask.bool()])


def test_a_text_of_padding_alone_is_as_module_by_module(model: PreTrainedModel) -> None:
    ids, mask = inputs(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1] = 0
    with torch.inference_mode():
        found = model(ids, attention_mask=mask).last_hidden_state
        near(found, one_by_one(model)(ids, attention_mask=mask).last_hidden_state)


@pytest.mark.parametrize("groups", ["columns:64", "row"])
def test_queries_and_keys_may_have_groups_of_their_own(groups: str) -> None:
    torch.manual_seed(0)
    model = ENCODERS["bert"](hidden_size=192, num_attention_heads=3).eval()
    rules = {"*.query.weight": {"groups": groups}, "*.value.weight": {"bits": 2}}
    lexibit.quantize(model, LexibitConfig(bits=4, groups="row", rules=rules), progress=False)
    lexibit.optimize(model)
    with torch.inference_mode():
        near(model(inputs(2, 9)).last_hidden_state, one_by_one(model)(inputs(2, 9)).last_hidden_state)


@pytest.mark.parametrize("kind", ["bert", "albert"])
@pytest.mark.parametrize(("texts", "tokens"), [(1, 1), (1, 5), (3, 21), (2, 70)])
def test_outliers_are_added_inside(
    kind: str, texts: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = optimized(kind, outliers=0.02), inputs(texts, tokens)
    plain, without = one_by_one(model), copy.deepcopy(model)
    for weight in codebooks(without).values():
        assert weight.outliers is not None
        weight.outliers.zero_()
    calls = calls_of_kernels(monkeypatch)
    with torch.inference_mode():
        found = model(ids).last_hidden_state
        assert calls
        near(found, plain(ids).last_hidden_state)
        assert nn.functional.cosine_similarity(found, without(ids).last_hidden_state, dim=-1).min() < 0.999


def test_outliers_behind_the_end_are_told() -> None:
    model = optimized("bert", outliers=0.02)
    model.encoder.layer[1].output.dense.weight_codebook.gaps.fill_(65000)
    with torch.inference_mode(), pytest.raises(IndexError, match="outliers behind the last weight"):
        model(inputs(1, 5))


def test_the_kernels_are_called_once_for_all_layers(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of_kernels(monkeypatch)
    with torch.inference_mode():
        model(inputs(2, 8), attention_mask=torch.ones(2, 8))
    # ALBERT has one layer, and asks it again and again
    assert calls == ([1, 1] if isinstance(model, AlbertModel) else [2])


def test_what_stands_between_layers_is_asked_for() -> None:
    model, x = optimized("bert"), inputs(2, 8)
    first, second = model.encoder.layer
    with torch.inference_mode():
        alone = first(model.embeddings(x))
        assert torch.equal(model(x).last_hidden_state, second(alone))
        seen = []
        handle = second.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
        model(x)
        assert torch.equal(seen[0], alone)
        handle.remove()
        second.forward = lambda given, *others, **more: given
        assert torch.equal(model(x).last_hidden_state, alone)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_an_encoder_returns_what_its_class_does(kind: str) -> None:
    model = optimized(kind)
    plain = one_by_one(model)
    encoders = [
        next(one for one in m.modules() if type(one).__name__.endswith(("Encoder", "Transformer")))
        for m in (model, plain)
    ]
    x = torch.randn(2, 8, model.config.hidden_size)
    with torch.inference_mode():
        found, expected = (encoder(x) for encoder in encoders)
        copied = pickle.loads(pickle.dumps(encoders[0]))
        assert torch.equal(copied(x).last_hidden_state, found.last_hidden_state)
    assert isinstance(encoders[0], FusedEncoder)
    assert isinstance(copied, FusedEncoder)
    assert not isinstance(encoders[1], FusedEncoder)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    near(found.last_hidden_state, expected.last_hidden_state)


def test_layers_may_be_taken_out_and_put_in() -> None:
    model, x = optimized("bert"), inputs(2, 8)
    with torch.inference_mode():
        first, second = model.encoder.layer
        start = model.embeddings(x)
        model.encoder.layer = nn.ModuleList([second])
        assert torch.equal(model(x).last_hidden_state, second(start))
        model.encoder.layer = nn.ModuleList([second, first, second])
        assert torch.equal(model(x).last_hidden_state, second(first(second(start))))
        model.encoder.layer = nn.ModuleList([])
        assert torch.equal(model(x).last_hidden_state, start)


def test_positions_that_are_given_are_no_matter_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, positions = optimized("bert"), torch.arange(8, 0, -1)[None]
    calls = calls_of_kernels(monkeypatch)
    with torch.inference_mode():
        found = model(inputs(2, 8), position_ids=positions).last_hidden_state
        assert calls == [2]
        near(found, one_by_one(model)(inputs(2, 8), position_ids=positions).last_hidden_state)


def test_outliers_behind_the_end_of_a_later_layer_leave_all_as_it_was() -> None:
    model, x = optimized("bert", outliers=0.02), torch.randn(2, 8, 96)
    model.encoder.layer[1].output.dense.weight_codebook.gaps.fill_(65000)
    given = x.clone()
    with torch.inference_mode(), pytest.raises(IndexError, match="outliers behind the last weight"):
        model.encoder(x)
    assert torch.equal(x, given)


def test_results_do_not_depend_on_threads_or_on_the_batch() -> None:
    model = optimized("bert", hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    ids, found = inputs(4, 40), []
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            for threads in (1, 2, 8):
                torch.set_num_threads(threads)
                found.append(model(ids).last_hidden_state)
            alone = model(ids[2:3]).last_hidden_state
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(alone[0], found[0][2])


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_hidden_states_and_attentions_can_still_be_asked_for(kind: str) -> None:
    model = optimized(kind, attn_implementation="eager")
    plain = one_by_one(model)
    with torch.inference_mode():
        found, expected = (
            one(inputs(2, 8), output_attentions=True, output_hidden_states=True) for one in (model, plain)
        )
    assert len(found.attentions) == len(expected.attentions) == 2
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    near(found.hidden_states[1], expected.hidden_states[1])


def test_who_hooks_into_a_layer_is_called() -> None:
    model = optimized("bert")
    seen = []
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.inference_mode():
        model(inputs(2, 8))
    assert [one.shape for one in seen] == [(2, 8, 96)]


def test_a_layer_that_was_given_another_part_uses_it() -> None:
    model, changed = optimized("bert"), optimized("bert")
    changed.encoder.layer[0].output.dense = nn.Linear(160, 96)
    with torch.inference_mode():
        found = changed(inputs(2, 8)).last_hidden_state
        assert not torch.allclose(found, model(inputs(2, 8)).last_hidden_state, atol=0.1)
        near(found, one_by_one(changed)(inputs(2, 8)).last_hidden_state)


@pytest.mark.parametrize("case", ["kernels", "bfloat16", "training", "mask of heads", "width"])
def test_what_the_kernels_do_not_take_is_left_to_the_parts(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "encode", lambda *given: pytest.fail("called"))
    width = {"hidden_size": 160, "num_attention_heads": 2} if case == "width" else {}
    model = optimized("bert", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, **width)
    layer, x, mask = model.encoder.layer[0], torch.randn(2, 8, 160 if width else 96), None
    if case == "bfloat16":
        layer.to(torch.bfloat16)
        x = x.bfloat16()
    if case == "training":
        model.train()
    if case == "mask of heads":
        mask = torch.ones(2, 3, 8, 8, dtype=torch.bool)
    with torch.inference_mode(), ops.kernels("reference" if case == "kernels" else native.chosen().name):
        assert layer(x, mask).shape == x.shape


def test_there_is_no_gradient_and_it_is_said() -> None:
    model = optimized("bert")
    with pytest.raises(LexibitError, match="no gradient"):
        model(inputs(2, 8)).last_hidden_state.sum().backward()


def test_a_bad_number_makes_its_text_nan_and_no_other() -> None:
    layer, x = optimized("bert").encoder.layer[0], torch.randn(3, 20, 96)
    with torch.inference_mode():
        good = layer(x)
        x[1, 4, 7] = float("nan")
        found = layer(x)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], good[::2])


def test_layers_are_copied_and_pickled() -> None:
    layer, x = optimized("bert").encoder.layer[0], torch.randn(2, 8, 96)
    with torch.inference_mode():
        expected = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert isinstance(other, FusedLayer)
            assert torch.equal(other(x), expected)


def test_a_class_in_front_of_a_fused_one_stays() -> None:
    model, x = optimized("bert"), inputs(2, 8)
    fused = type(model.encoder)

    class Doubled(fused):  # type: ignore[misc, valid-type]
        def forward(self, *given: object, **more: object) -> object:
            found = super().forward(*given, **more)
            found.last_hidden_state *= 2
            return found

    with torch.inference_mode():
        expected = 2 * model(x).last_hidden_state
        model.encoder.__class__ = Doubled
        for one in (model, copy.deepcopy(model)):
            assert type(one.encoder) is Doubled
            assert torch.equal(one(x).last_hidden_state, expected)
        lexibit.optimize(model)
        assert torch.equal(model(x).last_hidden_state, expected)


def test_a_decoder_and_a_strange_layer_are_left_alone() -> None:
    assert not layers(optimized("bert", is_decoder=True))

    class BertLayer(nn.Module):
        pass

    strange = nn.Sequential(nn.Linear(8, 8), BertLayer())
    lexibit.quantize(strange, LexibitConfig(bits=4), progress=False)
    lexibit.optimize(strange)
    assert not layers(strange)


def test_many_threads_may_call_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = optimized("bert")
    texts = [inputs(count, 12) for count in (1, 2, 3, 4)] * 5
    name = native.chosen().name

    def run(ids: Tensor) -> Tensor:
        with torch.inference_mode(), ops.kernels(name):
            return model(ids).last_hidden_state

    expected = list(map(run, texts))
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, texts), expected))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory in use")
def test_much_memory_is_given_back() -> None:
    def resident() -> int:
        (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in one)
        return int(line.split()[1]) << 10

    layer = optimized("bert").encoder.layer[0]
    with torch.inference_mode():
        layer(torch.randn(2, 8, 96))
        before, x = resident(), torch.randn(512, 64, 96)
        found = layer(x)
        # it takes more than 80 MB beside these
        assert resident() - before < x.nbytes + found.nbytes + (48 << 20)


def test_shapes_that_do_not_fit_are_torchs_errors() -> None:
    layer = optimized("bert").encoder.layer[0]
    with torch.inference_mode(), pytest.raises(RuntimeError):
        layer(torch.randn(2, 8, 80))


def changed(change: str, model: PreTrainedModel) -> None:
    layer = model.encoder.layer[0]
    if change == "activation":
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    elif change == "attention":
        layer.attention.self = type("Mine", (type(layer.attention.self),), {})(model.config).eval()
    elif change == "norm with gaps":
        layer.output.LayerNorm.weight = nn.Parameter(torch.randn(192)[::2])
    elif change == "bias with gaps":
        layer.output.dense.bias = nn.Parameter(torch.randn(192)[::2])
    elif change == "dropout":
        layer.output.dropout = nn.Dropout(1.0).train()
    elif change == "hook":
        layer.output.dropout.register_forward_hook(lambda *call: call[2] * 2)
    elif change == "own forward":
        layer.output.dropout.forward = lambda x: x * 2
    elif change == "data":
        layer.output.LayerNorm.weight.data = torch.randn(96)
    elif change == "in place":
        layer.output.dense.weight_codebook.levels.mul_(3)
    elif change == "buffer":
        codebook = layer.output.dense.weight_codebook
        codebook.levels = 3 * codebook.levels
    elif change == "state":
        state = {name: 3 * one if "levels" in name else one for name, one in layer.state_dict().items()}
        layer.load_state_dict(state)
    elif change == "scaling":
        layer.attention.self.scaling = 5.0
    elif change == "hooks replaced":
        layer.output.dropout._forward_hooks = OrderedDict()
        layer.output.dropout.register_forward_hook(lambda *call: call[2] * 2)
    elif change == "norm without bias":
        layer.output.LayerNorm.bias = None
    elif change == "epsilon":
        layer.output.LayerNorm.eps = 10.0


@pytest.mark.parametrize(
    "change",
    [
        *("activation", "attention", "norm with gaps", "bias with gaps", "dropout", "hook", "own forward"),
        *("data", "in place", "buffer", "state", "scaling", "epsilon", "hooks replaced"),
        "norm without bias",
    ],
)
def test_what_is_changed_inside_counts(change: str) -> None:
    model = optimized("bert")
    with torch.inference_mode():
        before = model(inputs(2, 8)).last_hidden_state
        torch.manual_seed(1)
        changed(change, model)
        found = model(inputs(2, 8)).last_hidden_state
        near(found, one_by_one(model)(inputs(2, 8)).last_hidden_state)
    assert nn.functional.cosine_similarity(found, before, dim=-1).min() < 0.999


def test_a_bias_that_is_trained_says_that_there_is_no_gradient() -> None:
    model = optimized("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("dense.bias")
    with pytest.raises(LexibitError, match="no gradient"):
        model(inputs(2, 8)).last_hidden_state.sum().backward()


def test_another_attention_is_called() -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []
    AttentionInterface.register("mine", lambda *a, **k: calls.append(1) or sdpa_attention_forward(*a, **k))
    model = optimized("bert")
    model.set_attn_implementation("mine")
    with torch.inference_mode():
        model(inputs(2, 8))
    assert len(calls) == 2
