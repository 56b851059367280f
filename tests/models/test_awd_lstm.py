"""The AWD-LSTM against plain LSTMs of PyTorch, and in codes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lexibit import LexibitConfig, LexibitError, dequantize, models, quantize
from lexibit.models.awd_lstm import (
    AWDLSTMConfig,
    AWDLSTMForCausalLM,
    WeightDropLSTM,
    locked_dropout,
    word_tokenizer,
)
from lexibit.nn import codebooks

DROPOUTS = ("embedding", "input", "hidden", "output", "weight")
WORDS = 31


def make(seed: int = 0, **changes: Any) -> AWDLSTMForCausalLM:
    """A tiny model; without dropout, AR and TAR unless they are asked for."""
    values = {"vocab_size": WORDS, "embedding_size": 12, "hidden_size": 20, "num_hidden_layers": 3}
    values |= {f"{name}_dropout": 0.0 for name in DROPOUTS}
    values |= {"activation_regularization": 0.0, "temporal_regularization": 0.0, "bptt": 7}
    torch.manual_seed(seed)
    return AWDLSTMForCausalLM(AWDLSTMConfig(**values | changes))


def some_ids(batch: int = 3, words: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(0, WORDS, (batch, words), generator=torch.Generator().manual_seed(seed))


class Plain(nn.Module):
    """The same computation from nothing but PyTorch's own modules, weights copied."""

    def __init__(self, model: AWDLSTMForCausalLM) -> None:
        super().__init__()
        self.embedding = copy.deepcopy(model.embed_tokens)
        self.lstms = nn.ModuleList()
        for layer in model.layers:
            lstm = nn.LSTM(layer.input_size, layer.hidden_size, batch_first=True)
            lstm.load_state_dict(layer.state_dict())
            self.lstms.append(lstm)
        self.bias = nn.Parameter(model.lm_head.bias.detach().clone())

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        for lstm in self.lstms:
            x, _ = lstm(x)
        return x @ self.embedding.weight.t() + self.bias, x


# the float model -------------------------------------------------------------------------------------


def test_it_is_a_stack_of_lstms_with_a_tied_softmax() -> None:
    model = make()
    assert [(layer.input_size, layer.hidden_size) for layer in model.layers] == [(12, 20), (20, 20), (20, 12)]
    assert model.lm_head.weight is model.embed_tokens.weight
    torch.testing.assert_close(model(some_ids()).logits, Plain(model)(some_ids())[0])


def test_gradients_are_those_of_plain_lstms_with_the_papers_two_terms() -> None:
    model = make(activation_regularization=2.0, temporal_regularization=1.0).train()
    plain, ids = Plain(model), some_ids()
    model(ids, labels=ids).loss.backward()
    logits, hidden = plain(ids)
    nats = -F.log_softmax(logits, -1)[:, :-1].gather(2, ids[:, 1:, None]).mean()
    slow = ((hidden[:, 1:] - hidden[:, :-1]) ** 2).mean()
    (nats + 2 * (hidden**2).mean() + slow).backward()
    torch.testing.assert_close(model.embed_tokens.weight.grad, plain.embedding.weight.grad)
    torch.testing.assert_close(model.lm_head.bias.grad, plain.bias.grad)
    for layer, lstm in zip(model.layers, plain.lstms, strict=True):
        for name, parameter in lstm.named_parameters():
            torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad)


def test_gradients_through_weight_dropout_agree_with_finite_differences() -> None:
    layer = WeightDropLSTM(3, 4, 0.5).double().train()
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = layer.weight_hh_l0.detach().clone().requires_grad_()

    def of(x: Tensor, weight: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same weights are dropped
        return torch.func.functional_call(layer, {"weight_hh_l0": weight}, (x,))[0]

    assert torch.autograd.gradcheck(of, (x, weight))


def test_the_loss_is_the_next_words_surprise_whichever_way_labels_are_given() -> None:
    model, ids = make().eval(), some_ids(2, 8)
    inside = model(ids, labels=ids).loss
    beyond = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
    by_hand = [
        -F.log_softmax(model(ids[row : row + 1, : place + 1]).logits[0, -1], -1)[ids[row, place + 1]]
        for row in range(2)
        for place in range(7)
    ]
    torch.testing.assert_close(inside, torch.stack(by_hand).mean())
    torch.testing.assert_close(beyond, inside)


def test_in_evaluation_nothing_is_dropped_or_added_to_the_loss() -> None:
    bare = make().eval()
    full = make(
        **{f"{name}_dropout": 0.5 for name in DROPOUTS},
        activation_regularization=2.0,
        temporal_regularization=1.0,
    ).eval()
    ids = some_ids()
    assert torch.equal(bare(ids).logits, full(ids).logits)
    assert torch.equal(bare(ids, labels=ids).loss, full(ids, labels=ids).loss)
    assert not torch.equal(full.train()(ids).logits, bare(ids).logits)


def test_a_chunk_of_one_word_has_a_loss() -> None:
    model = make(temporal_regularization=1.0).train()
    assert model(some_ids(2, 1), shift_labels=some_ids(2, 1)).loss.isfinite()


def test_new_weights_are_the_papers() -> None:
    model = make(hidden_size=100)
    assert 0.09 < model.embed_tokens.weight.abs().max() <= 0.1
    assert not model.lm_head.bias.any()
    for layer in model.layers:
        for parameter in layer.parameters():
            assert 0.8 < parameter.abs().max() * layer.hidden_size**0.5 <= 1


# state -----------------------------------------------------------------------------------------------


def test_chunks_with_a_carried_state_are_one_long_text() -> None:
    model, ids = make().eval(), some_ids(2, 20)
    whole = model(ids).logits
    parts, state = [], None
    for part in ids.split([7, 3, 10], 1):
        output = model(part, state=state)
        parts.append(output.logits)
        state = output.state
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    for _ in range(2):  # a reset forgets what was before
        inside = [model(part, reset=index == 0).logits for index, part in enumerate(ids.split(5, 1))]
        torch.testing.assert_close(torch.cat(inside, 1), whole)


def test_the_carried_state_is_left_alone_by_other_calls_and_can_be_forgotten() -> None:
    model, ids = make().eval(), some_ids(2, 10)
    first, second = ids.split(5, 1)
    model(first, reset=torch.tensor(True))
    model(some_ids(4, 3, seed=7))  # an evaluation in the middle of an epoch
    torch.testing.assert_close(model(second, reset=torch.tensor(False)).logits, model(ids).logits[:, 5:])
    model.forget()
    torch.testing.assert_close(model(second, reset=False).logits, model(second).logits)


def test_no_gradient_flows_from_one_chunk_to_the_one_before() -> None:
    model = make().train()
    model(some_ids(2, 5), reset=True)
    output = model(some_ids(2, 5), labels=some_ids(2, 5), reset=False)
    output.loss.backward()  # would fail if it went into the first chunk's graph a second time
    assert not any(part.requires_grad for layer in model._carried or () for part in layer)


# dropout ---------------------------------------------------------------------------------------------


def test_weight_dropout_is_an_lstm_with_a_dropped_matrix_the_same_for_all_words() -> None:
    layer, x = WeightDropLSTM(5, 6, 0.4).train(), torch.randn(3, 8, 5)
    before = layer.weight_hh_l0.detach().clone()
    torch.manual_seed(3)
    found, _ = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(before, 0.4)
    assert 0.2 < (dropped == 0).float().mean() < 0.6
    plain = nn.LSTM(5, 6, batch_first=True)
    plain.load_state_dict(layer.state_dict() | {"weight_hh_l0": dropped})
    torch.testing.assert_close(found, plain(x)[0])
    assert torch.equal(layer.weight_hh_l0, before)


def test_locked_dropout_drops_the_same_features_of_all_words_of_a_sequence() -> None:
    torch.manual_seed(0)
    found = locked_dropout(torch.ones(50, 9, 40), 0.25, training=True)
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert not torch.equal(found[0], found[1])
    assert found.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (found == 0).float().mean() == pytest.approx(0.25, abs=0.05)
    x = torch.randn(2, 3, 4)
    assert locked_dropout(x, 0.25, training=False) is x


def test_embedding_dropout_drops_words_everywhere() -> None:
    model, ids = make(embedding_dropout=0.5).train(), some_ids(4, 60)
    torch.manual_seed(0)
    vectors = model._embedded(ids)
    kept = vectors.abs().sum(-1) > 0
    for word in ids.unique():
        assert kept[ids == word].unique().numel() == 1
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(vectors[kept], 2 * model.embed_tokens(ids)[kept])


# folders ---------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_by_the_auto_classes(tmp_path: Path) -> None:
    model, tokenizer = models.create("awd-lstm", ["a b c\nb <unk> b\n"], {"hidden_size": 8}, seed=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    back, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(back) is AWDLSTMForCausalLM
    assert back.config.hidden_size == 8
    assert back.lm_head.weight is back.embed_tokens.weight
    ids = torch.tensor([words("b zzz\na <unk> c \n", add_special_tokens=False)["input_ids"]])
    assert words.convert_ids_to_tokens(ids[0]) == ["b", "<unk>", "<eos>", "a", "<unk>", "c", "<eos>"]
    assert torch.equal(back.eval()(ids).logits, model.eval()(ids).logits)


# in codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "bits"), [("kmeans", 2), ("linear", 3), ("binary", 2)])
def test_all_matrices_are_in_codes_once_and_come_back_bit_for_bit(
    tmp_path: Path, scheme: str, bits: int
) -> None:
    model, ids = make().eval(), some_ids()
    before = model(ids).logits
    plan = quantize(model, LexibitConfig(scheme, bits), progress=False)
    assert [weight.names for weight in plan.weights] == [
        ["embed_tokens.weight", "lm_head.weight"],
        *([f"layers.{n}.weight_{of}_l0"] for n in range(3) for of in ("ih", "hh")),
    ]
    assert all(kept.reason.startswith("1 axis") for kept in plan.kept)
    assert model.lm_head.weight_codebook is model.embed_tokens.weight_codebook
    found = model(ids).logits
    assert not torch.equal(found, before)
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(back(ids).logits, found)
    assert back.lm_head.weight_codebook is back.embed_tokens.weight_codebook
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * sum(p.numel() for p in make().parameters())
    dequantize(back)
    torch.testing.assert_close(back(ids).logits, found)
    assert back.lm_head.weight is back.embed_tokens.weight


def test_a_model_in_codes_trains_as_the_float_model_of_its_values_with_all_its_dropout() -> None:
    model = make(**{f"{name}_dropout": 0.3 for name in DROPOUTS}, activation_regularization=2.0)
    quantize(model, LexibitConfig("kmeans", 3), progress=False)
    plain = copy.deepcopy(model)
    dequantize(plain)
    levels = {name: weight.train_levels() for name, weight in codebooks(model).items()}
    ids, losses = some_ids(), []
    for one in (model, plain):
        one.train()
        torch.manual_seed(4)
        loss = one(ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    for name, weight in codebooks(model).items():
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        codes = weight.unpacked_codes().long()
        sums = torch.zeros(8).index_add_(0, codes.flatten(), gradient.flatten())
        torch.testing.assert_close(levels[name].grad, sums[None], rtol=1e-3, atol=1e-5)


# made from nothing -----------------------------------------------------------------------------------


def test_the_tokenizer_knows_the_words_by_their_frequency() -> None:
    text = ["the cat saw the dog\n", "the <unk> saw <unk> a b c\n"]
    tokenizer = word_tokenizer(text)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert words == ["<unk>", "<eos>", "the", "saw", "a", "b", "c", "cat", "dog"]
    few = word_tokenizer(text, 4)
    assert few.convert_ids_to_tokens(few("the cat\nsaw\n")["input_ids"]) == [
        "the",
        "<unk>",
        "<eos>",
        "saw",
        "<eos>",
    ]
    with pytest.raises(LexibitError, match="the training text holds no words"):
        word_tokenizer(["\n", "  "])


def test_the_same_seed_makes_the_same_model_and_leaves_the_global_one_alone() -> None:
    settings = {"embedding_size": "16", "hidden_size": 8, "weight_dropout": 0, "vocab_size": 4}
    torch.manual_seed(9)
    (one, _), (two, _), (three, tokenizer) = (
        models.create("awd-lstm", ["a b c d\n"], settings, seed=seed) for seed in (1, 1, 2)
    )
    after = torch.rand(1)
    torch.manual_seed(9)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(one.layers[0].weight_ih_l0, two.layers[0].weight_ih_l0)
    assert not torch.equal(one.layers[0].weight_ih_l0, three.layers[0].weight_ih_l0)
    assert (one.config.embedding_size, one.config.weight_dropout, len(tokenizer)) == (16, 0.0, 4)
    assert one.config.eos_token_id == tokenizer.eos_token_id == 1


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("awd-lstn", {}, "unknown model 'awd-lstn': did you mean 'awd-lstm'"),
        (
            "awd-lstm",
            {"hiden_size": 3},
            "unknown setting of awd-lstm 'hiden_size': did you mean 'hidden_size'",
        ),
        ("awd-lstm", {"hidden_size": "many"}, "hidden_size must be a whole number, not 'many'"),
        ("awd-lstm", {"hidden_size": 2.5}, r"hidden_size must be a whole number, not 2\.5"),
        ("awd-lstm", {"hidden_size": True}, "hidden_size must be a whole number, not True"),
        ("awd-lstm", {"weight_dropout": [1]}, r"weight_dropout must be a number, not \[1\]"),
        ("awd-lstm", {"hidden_size": 0}, "hidden_size must be 1 or more, not 0"),
        ("awd-lstm", {"input_dropout": 1}, r"input_dropout must be 0 to less than 1, not 1\.0"),
        ("awd-lstm", {"weight_dropout": "nan"}, "weight_dropout must be 0 to less than 1, not nan"),
        ("awd-lstm", {"temporal_regularization": -1}, r"must be 0 or more, not -1\.0"),
    ],
)
def test_a_wrong_model_or_setting_is_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LexibitError, match=said):
        models.create(name, ["a b\n"], settings)


def test_the_models_have_names_and_classes() -> None:
    assert "awd-lstm" in models.names()
    assert models.CLASSES["AWDLSTMForCausalLM"] is AWDLSTMForCausalLM
