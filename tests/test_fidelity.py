"""Fidelity of weights and outputs, against the same numbers worked out in plain numpy."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

import lexibit
from lexibit import LexibitConfig, LexibitError, Recipe, Reference, quantize, quantize_tensor
from lexibit.fidelity import neighbour_overlap, output_fidelity, weight_errors
from lexibit.nn import codebooks

TEXTS = ["w5 w6 w7 w8 w9", "w10", "w11 w12 w13", "w14 w15 w16 w17 w18 w19 w20", "w21 w22"]


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_weight_errors_are_the_sums_over_all_elements(rows, columns, bits, seed):
    original = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = quantize_tensor(original, Recipe(scheme="linear", bits=bits))
    (found,) = weight_errors({"w": weight}, {"w": original, "other": torch.ones(1)})
    w, q = original.numpy().astype(float), weight.decode().numpy().astype(float)
    assert found.name == "w"
    assert found.relative == pytest.approx(((w - q) ** 2).sum() / (w**2).sum(), rel=1e-9, abs=1e-15)
    assert found.largest == pytest.approx(np.abs(w - q).max(), rel=1e-9, abs=1e-15)


def test_weights_that_codes_can_hold_exactly_have_no_error():
    original = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
    (found,) = weight_errors({"w": quantize_tensor(original, Recipe(bits=2))}, {"w": original})
    assert (found.relative, found.largest) == (0.0, 0.0)


def test_an_all_zero_or_empty_weight_has_a_finite_error():
    for shape in [(2, 3), (0, 3)]:
        zero = torch.zeros(shape)
        (found,) = weight_errors({"w": quantize_tensor(zero, Recipe(scheme="linear"))}, {"w": zero})
        assert (found.relative, found.largest) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("original", "said"), [({"v": torch.ones(2, 3)}, "no weight w"), ({"w": torch.ones(3, 2)}, r"\[3, 2\]")]
)
def test_a_weight_that_the_original_does_not_have_is_refused(original, said):
    weight = quantize_tensor(torch.ones(2, 3), Recipe(scheme="linear"))
    with pytest.raises(LexibitError, match=said):
        weight_errors({"w": weight}, original)


# outputs ---------------------------------------------------------------------------------------------


def both(tiny_model, name, bits=3):
    floats, model = tiny_model(name), tiny_model(name)
    lexibit.quantize(model, LexibitConfig(scheme="linear", bits=bits), progress=False)
    assert codebooks(model)
    assert not codebooks(floats)
    return model, floats


def rows_of(model, tokenizer, take):
    """The output vectors of every text on its own, without any padding."""
    found = []
    for text in TEXTS:
        given = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = given["input_ids"]
        with torch.inference_mode():
            found.append(take(model(**given)).reshape(-1, take(model(**given)).shape[-1]).numpy())
    return np.concatenate(found).astype(float)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "last_hidden_state"),
        ("bert-mlm", "logits"),
        ("bert-classifier", "logits"),
        ("gpt2", "logits"),
        ("marian", "logits"),
    ],
)
def test_output_fidelity_is_what_numpy_finds_text_by_text(tiny_model, tiny_tokenizer, name, kind):
    model, floats = both(tiny_model, name)
    result = output_fidelity(model, floats, tiny_tokenizer(), TEXTS, batch_size=2)
    ours, theirs = (rows_of(m, tiny_tokenizer(), lambda out: getattr(out, kind)) for m in (model, floats))
    # every token, and the two that the tokenizer adds, or one row a text
    tokens = sum(len(text.split()) + 2 for text in TEXTS)
    assert result.rows == len(ours) == (len(TEXTS) if name == "bert-classifier" else tokens)
    assert result.output == kind
    assert result.texts == len(TEXTS)
    assert result.cosine == pytest.approx(cosine(ours, theirs).mean(), abs=1e-5)
    assert result.worst_cosine == pytest.approx(cosine(ours, theirs).min(), abs=1e-5)
    assert result.cosine < 0.9999
    expected = ((ours - theirs) ** 2).sum() / (theirs**2).sum()
    assert result.relative == pytest.approx(expected, rel=1e-3)
    if kind == "logits":
        assert result.agreement == pytest.approx((ours.argmax(1) == theirs.argmax(1)).mean())
    else:
        assert result.agreement is None
    assert all(seconds > 0 for seconds in result.seconds)


def test_the_start_and_end_logits_of_question_answering_are_compared_on_tokens_without_padding(
    tiny_model, tiny_tokenizer
):
    model, floats = both(tiny_model, "roberta-qa")
    result = output_fidelity(model, floats, tiny_tokenizer(), TEXTS, batch_size=2)
    one = output_fidelity(model, floats, tiny_tokenizer(), TEXTS, batch_size=1)
    assert result.output == "logits"
    assert one.rows == result.rows == 2 * len(TEXTS)
    # what else is in the batch must not count
    assert result.cosine == pytest.approx(one.cosine, abs=1e-5)
    assert result.relative == pytest.approx(one.relative, rel=1e-3)
    assert result.agreement == pytest.approx(one.agreement)


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "gpt2"])
def test_identical_models_have_cosine_one_and_no_error(tiny_model, tiny_tokenizer, name):
    result = output_fidelity(tiny_model(name), tiny_model(name), tiny_tokenizer(), TEXTS)
    assert result.cosine == pytest.approx(1, abs=1e-6)
    assert result.worst_cosine == pytest.approx(1, abs=1e-6)
    assert result.relative == 0
    assert result.agreement in (1.0, None)


def test_more_bits_keep_outputs_nearer(tiny_model, tiny_tokenizer):
    found = [
        output_fidelity(*both(tiny_model, "bert", bits), tiny_tokenizer(), TEXTS) for bits in (2, 4, 6, 8)
    ]
    cosines = [result.cosine for result in found]
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.999 > 0.95 > cosines[0]


def test_texts_are_cut_to_the_asked_length(tiny_model, tiny_tokenizer):
    model, floats = both(tiny_model, "bert")
    result = output_fidelity(model, floats, tiny_tokenizer(), ["w5 " * 30, "w6"], max_length=6)
    assert result.rows == 6 + 3


def test_texts_longer_than_the_model_takes_are_cut_or_refused_by_name(tiny_model, tiny_tokenizer):
    model, floats = both(tiny_model, "bert")
    # one row a position, or an error that says what to change
    try:
        found = output_fidelity(model, floats, tiny_tokenizer(), ["w5 " * 60], max_length=128).rows
    except LexibitError as error:
        found = str(error)
    assert found == floats.config.max_position_embeddings or re.search("max.length", str(found))


def test_no_text_is_refused(tiny_model, tiny_tokenizer):
    model = tiny_model("bert")
    with pytest.raises(LexibitError, match="no text"):
        output_fidelity(model, model, tiny_tokenizer(), [])


def test_outputs_that_cannot_be_compared_are_refused():
    class Silent(torch.nn.Module):
        config, device = SimpleNamespace(is_encoder_decoder=False), torch.device("cpu")

        def forward(self, **_):
            return SimpleNamespace(loss=0)

    def tokenizer(texts, **_):
        ids = torch.ones(len(texts), 2, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": ids})

    tokenizer.pad_token, tokenizer.model_max_length = "[PAD]", 10
    with pytest.raises(LexibitError, match="no logits or hidden states"):
        output_fidelity(Silent(), Silent(), tokenizer, ["w5"])


# neighbours ------------------------------------------------------------------------------------------


def brute_force_overlap(ours, theirs, count):
    near = []
    for embeddings in (ours, theirs):
        near.append([])
        for i, one in enumerate(embeddings):
            others = [j for j in range(len(embeddings)) if j != i]
            others.sort(key=lambda j: -cosine(one, embeddings[j]))
            near[-1].append(set(others[:count]))
    return np.mean([len(a & b) / count for a, b in zip(*near, strict=True)])


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 20), st.integers(1, 3), st.integers(0, 999))
def test_neighbour_overlap_is_what_brute_force_finds(n, count, seed):
    rng = np.random.default_rng(seed)
    theirs = rng.normal(size=(n, 5))
    ours = np.concatenate([theirs + rng.normal(size=(n, 5)), rng.normal(size=(n, 2)) / 4], axis=1)
    found = neighbour_overlap(torch.tensor(ours), torch.tensor(theirs), count)
    assert found == pytest.approx(brute_force_overlap(ours, theirs, count), abs=1e-6)


def test_equal_embeddings_of_any_length_have_the_same_neighbours():
    embeddings = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    lengths = torch.rand(30, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert neighbour_overlap(embeddings * lengths, embeddings) == 1.0


def test_neighbours_that_have_nothing_in_common_overlap_nowhere():
    # four points: pairs by the first two axes, other pairs by the last two
    ours = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    theirs = ours[[0, 2, 1, 3]]
    assert neighbour_overlap(ours, theirs, 1) == 0.0
    assert neighbour_overlap(ours, ours, 1) == 1.0


# a reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "roberta-qa", "gpt2", "marian"])
def test_a_reference_tells_of_a_model_what_running_both_tells(tiny_model, tiny_tokenizer, name):
    original, tokenizer, texts = tiny_model(name), tiny_tokenizer(), ["w5 w6 w7", "w9", "w20 w21 w22 w23"]
    reference = Reference(original, tokenizer, texts, batch_size=2)
    ours = copy.deepcopy(original)
    quantize(ours, LexibitConfig("linear", 3), progress=False)
    both, kept = output_fidelity(ours, original, tokenizer, texts, batch_size=2), reference.fidelity(ours)
    assert replace(both, seconds=(0, 0)) == replace(kept, seconds=(0, 0))
    same = reference.fidelity(original)
    assert (same.cosine, same.relative) == (pytest.approx(1), 0)


def test_models_are_compared_without_dropout_and_left_in_their_modes(tiny_model, tiny_tokenizer):
    model = tiny_model("bert").train()
    model.encoder.eval()
    reference = Reference(model, tiny_tokenizer(), ["w5 w6 w7"])
    assert reference.fidelity(model).relative == 0
    assert (model.training, model.encoder.training) == (True, False)


def test_a_reference_on_no_text_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(LexibitError, match="no text to compare on"):
        Reference(tiny_model("bert"), tiny_tokenizer(), [])
