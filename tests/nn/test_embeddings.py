"""Embeddings in one go: as their parts one after the other, or left to them."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

import lexibit
from lexibit import LexibitConfig, ops
from lexibit.nn.embeddings import FusedEmbeddings
from lexibit.nn.fused import unfuse
from lexibit.ops import native

pytestmark = pytest.mark.skipif(
    not any(native.supports("encoder", name) for name in native.available()),
    reason="no kernels for embeddings on this CPU",
)

SIZES = {"vocab_size": 100, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
WIDE = SIZES | {"hidden_size": 72, "intermediate_size": 64}
MODELS = {
    "albert": lambda **c: AlbertModel(AlbertConfig(**WIDE | {"embedding_size": 40} | c)),
    "bert": lambda **c: BertModel(BertConfig(**WIDE | c)),
    "camembert": lambda **c: CamembertModel(CamembertConfig(**WIDE | c)),
    "distilbert": lambda **c: DistilBertModel(
        DistilBertConfig(
            vocab_size=100, n_layers=1, n_heads=2, dim=64, hidden_dim=64, max_position_embeddings=40, **c
        )
    ),
    "electra": lambda **c: ElectraModel(ElectraConfig(**WIDE | {"embedding_size": 48} | c)),
    "roberta": lambda **c: RobertaModel(RobertaConfig(**WIDE | c)),
    "xlm-roberta": lambda **c: XLMRobertaModel(XLMRobertaConfig(**WIDE | c)),
}


@cache
def quantized(kind: str, scheme: str = "linear", outliers: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    config = LexibitConfig(scheme=scheme, bits=4, groups="row", outliers=outliers)
    lexibit.quantize(model, config, progress=False)
    return model


def embeddings(kind: str, **how: object) -> FusedEmbeddings:
    model = copy.deepcopy(quantized(kind, **how))
    lexibit.optimize(model)
    assert isinstance(model.embeddings, FusedEmbeddings)
    return model.embeddings


def plain(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    unfuse(module)
    assert not isinstance(module, FusedEmbeddings)
    return module


def ids(texts: int, tokens: int) -> Tensor:
    return torch.randint(3, 100, (texts, tokens), generator=torch.Generator().manual_seed(texts * tokens))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the kernels."""
    made: list[int] = []
    real = native.Embeddings.__call__
    monkeypatch.setattr(native.Embeddings, "__call__", lambda *given: made.append(1) or real(*given))
    return made


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("texts", "tokens"), [(1, 1), (1, 16), (3, 21), (5, 30)])
def test_they_are_as_their_parts_one_after_the_other(
    kind: str, texts: int, tokens: int, calls: list[int]
) -> None:
    module = embeddings(kind)
    with torch.inference_mode():
        expected = plain(module)(input_ids=ids(texts, tokens))
        assert not calls
        near(module(input_ids=ids(texts, tokens)), expected)
        assert calls == [1]
        near(module(ids(texts, tokens)), expected)
        near(module(ids(texts, tokens).int()), expected)
        near(module(ids(tokens, texts).t()), plain(module)(ids(tokens, texts).t()))
    assert calls == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["roberta", "camembert", "xlm-roberta"])
def test_padding_has_a_position_of_its_own(kind: str) -> None:
    module, given = embeddings(kind), ids(3, 21)
    given[1, 9:] = given[2, :5] = module.padding_idx
    with torch.inference_mode():
        near(module(input_ids=given), plain(module)(input_ids=given))


@pytest.mark.parametrize("kind", ["bert", "albert", "roberta", "electra"])
def test_kinds_of_tokens_may_be_given(kind: str, calls: list[int]) -> None:
    module = embeddings(kind)
    kinds = torch.zeros(2, 9, dtype=torch.long)
    kinds[:, 5:] = module.token_type_embeddings.num_embeddings - 1
    with torch.inference_mode():
        found = module(input_ids=ids(2, 9), token_type_ids=kinds)
        near(found, plain(module)(input_ids=ids(2, 9), token_type_ids=kinds))
    assert calls == [1]


@pytest.mark.parametrize("scheme", ["kmeans", "lq", "binary"])
def test_any_levels_will_do(scheme: str, calls: list[int]) -> None:
    module = embeddings("bert", scheme=scheme)
    with torch.inference_mode():
        near(module(input_ids=ids(2, 9)), plain(module)(input_ids=ids(2, 9)))
    assert calls == [1]


def test_results_do_not_depend_on_threads() -> None:
    module, found, before = embeddings("bert"), [], torch.get_num_threads()
    given = ids(40, 40)
    try:
        with torch.inference_mode():
            for threads in (1, 2, 8):
                torch.set_num_threads(threads)
                found.append(module(input_ids=given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("part", ["word", "token_type", "position"])
def test_a_row_that_is_not_there_is_an_error(part: str) -> None:
    module = embeddings("bert")
    given = {"input_ids": ids(2, 9)}
    if part == "word":
        given["input_ids"][1, 3] = 100
    elif part == "token_type":
        given["token_type_ids"] = torch.full((2, 9), -1)
    else:
        module.position_ids[0, 4] = 40
        given["token_type_ids"] = torch.zeros(2, 9, dtype=torch.long)
    row = {"word": "row 100 of 100", "token_type": "row -1 of 2", "position": "row 40 of 40"}[part]
    with torch.inference_mode(), pytest.raises(IndexError, match=row):
        module(**given)


@pytest.mark.parametrize(
    "case", ["positions", "vectors", "training", "outliers", "reference", "hook", "long", "none", "gradient"]
)
def test_what_the_kernels_do_not_take_is_left_to_the_parts(case: str, calls: list[int]) -> None:
    module = embeddings("bert", outliers=0.01 if case == "outliers" else 0.0)
    module.dropout.p = 0.0
    given: dict[str, Tensor] = {"input_ids": ids(2, 9)}
    if case == "positions":
        given["position_ids"] = torch.arange(9, 0, -1)[None]
    if case == "vectors":
        given = {"inputs_embeds": torch.randn(2, 9, 72)}
    if case == "training":
        module.train()
    if case == "hook":
        module.LayerNorm.register_forward_hook(lambda *call: 2 * call[2])
    kernels = "reference" if case == "reference" else native.chosen().name
    with torch.inference_mode(case != "gradient"), ops.kernels(kernels):
        if case == "long":
            with pytest.raises(RuntimeError):
                module(input_ids=ids(1, 41))
        elif case == "none":
            with pytest.raises(AttributeError):
                module()
        else:
            near(module(**given), plain(module)(**given))
            assert module(**given).requires_grad == (case == "gradient")
    assert not calls


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        ("bert", 0, {"strange": None}),
        ("bert", 1, {"input_ids": ids(2, 9)}),
        ("distilbert", 0, {"token_type_ids": torch.zeros(2, 9, dtype=torch.long)}),
        ("albert", 0, {"past_key_values_length": 0}),
    ],
)
def test_what_is_no_argument_is_an_error(kind: str, given: int, named: dict[str, object]) -> None:
    module = embeddings(kind)
    words = {} if given else {"input_ids": ids(2, 9)}
    for one in (module, plain(module)):
        with torch.inference_mode(), pytest.raises(TypeError):
            one(*given * [ids(2, 9)], **words | named)


def changed(change: str, module: nn.Module) -> None:
    if change == "norm":
        module.LayerNorm.weight.data = torch.randn(72)
    elif change == "epsilon":
        module.LayerNorm.eps = 10.0
    elif change == "levels":
        codebook = module.word_embeddings.weight_codebook
        codebook.levels = 3 * codebook.levels
    elif change == "in place":
        module.word_embeddings.weight_codebook.levels.mul_(3)
    elif change == "embedding":
        module.position_embeddings = nn.Embedding(40, 72)
    elif change == "own positions":
        module.position_ids = module.position_ids.flip(1)
    elif change == "own kinds":
        module.token_type_ids = torch.ones_like(module.token_type_ids)
    elif change == "dropout":
        module.dropout = nn.Sequential(nn.Dropout(0.0), nn.ReLU()).eval()
    elif change == "hook":
        module.position_embeddings.register_forward_hook(lambda *call: -call[2])
    elif change == "forward":
        module.token_type_embeddings.forward = lambda given: torch.ones(*given.shape, 72)
    elif change == "strides":
        module.LayerNorm.weight.requires_grad_(False).as_strided_((72,), (0,))
    elif change == "gaps":
        module.LayerNorm.bias = nn.Parameter(torch.randn(144)[::2])
    elif change == "other module":
        module.extra = nn.Linear(3, 3)
        module.LayerNorm.weight.data.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        *("norm", "epsilon", "levels", "in place", "embedding", "own positions", "own kinds", "dropout"),
        *("hook", "forward", "strides", "gaps", "other module"),
    ],
)
def test_what_is_changed_counts(change: str) -> None:
    module = embeddings("bert")
    module.LayerNorm.weight.data = torch.linspace(1, 2, 72)
    with torch.inference_mode():
        before = module(input_ids=ids(2, 9))
        torch.manual_seed(1)
        changed(change, module)
        found = module(input_ids=ids(2, 9))
        near(found, plain(module)(input_ids=ids(2, 9)))
    assert not torch.allclose(found, before, atol=1e-3)


def test_they_are_copied_and_pickled() -> None:
    module = embeddings("bert")
    with torch.inference_mode():
        expected = module(input_ids=ids(2, 9))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert isinstance(other, FusedEmbeddings)
            assert torch.equal(other(input_ids=ids(2, 9)), expected)


def test_a_number_that_is_none_makes_its_row_so() -> None:
    module = embeddings("bert")
    with torch.inference_mode():
        good = module(input_ids=ids(2, 9))
        module.word_embeddings.weight_codebook.levels[int(ids(2, 9)[1, 3])] = float("nan")
        found = module(input_ids=ids(2, 9))
    bad = (ids(2, 9) == ids(2, 9)[1, 3])[..., None].expand_as(found)
    assert found[bad].isnan().all()
    assert torch.equal(found[~bad], good[~bad])


def test_what_is_not_quantized_is_left_alone() -> None:
    model = BertModel(BertConfig(**WIDE)).eval()
    lexibit.quantize(
        model, LexibitConfig(bits=4, scheme="linear", exclude=["*position_embeddings*"]), progress=False
    )
    lexibit.optimize(model)
    assert not isinstance(model.embeddings, FusedEmbeddings)
    lexibit.optimize(model, compute="float32")
    model = copy.deepcopy(quantized("bert"))
    lexibit.optimize(model)
    lexibit.optimize(model, compute="float32")
    assert not isinstance(model.embeddings, FusedEmbeddings)
