"""A Transformer made from nothing: its sizes, its tokenizer, and what it is saved as."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lexibit import LexibitConfig, LexibitError, quantize
from lexibit.models import transformer
from lexibit.nn import codebooks

TEXTS = ["Two young men run through the grass.", "Zwei junge M\u00e4nner laufen durch das Gras."] * 3
SMALL = {"vocab_size": 300, "d_model": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "positions": 20}


def make(texts=TEXTS, seed=0, **changes):
    return transformer.create(texts, SMALL | changes, seed)


def test_the_sizes_are_those_of_the_settings_or_the_defaults():
    model, tokenizer = make()
    config = model.config
    assert (config.encoder_layers, config.decoder_layers, config.d_model) == (2, 2, 32)
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (2, 2)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim, config.max_position_embeddings) == (48, 48, 20)
    assert config.vocab_size == len(tokenizer) <= 300
    assert tokenizer.model_max_length == 20

    model, _ = transformer.create(TEXTS, {}, 0)
    config = model.config
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (256, 3, 3)
    assert (config.encoder_attention_heads, config.decoder_ffn_dim, config.dropout) == (4, 1024, 0.1)


def test_the_texts_may_be_read_once():
    _, tokenizer = make(iter(TEXTS))
    assert tokenizer.get_vocab() == make()[1].get_vocab()


def test_both_languages_and_the_output_share_one_matrix():
    model, _ = make()
    shared = model.get_input_embeddings().weight
    for other in (
        model.get_output_embeddings(),
        model.model.encoder.embed_tokens,
        model.model.decoder.embed_tokens,
    ):
        assert other.weight is shared
    # 2 layers of each side: attention 4 (d d + d), feed-forward, norms; embedding; positions
    d, f = 32, 48
    attention, feedforward, norm = 4 * (d * d + d), 2 * d * f + d + f, 2 * d
    expected = 2 * (attention + feedforward + 2 * norm) + 2 * (2 * attention + feedforward + 3 * norm)
    expected += model.config.vocab_size * d + 2 * 20 * d
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Two men run.",
        "M\u00e4nner \u2013 \u6f22\u5b57 \U0001f600!",
        "two  spaces,\ta tab\nand a line",
        "",
        " ",
    ],
)
def test_every_text_comes_back_from_its_tokens(text):
    _, tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix(" ")


def test_words_of_the_texts_are_one_token():
    _, tokenizer = make(vocab_size=400)
    assert len(tokenizer("Two young men run")["input_ids"]) == 5
    assert len(tokenizer("Gras")["input_ids"]) == 2


def test_the_seed_alone_decides_and_leaves_no_trace():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    (first, tokens), (again, same), (other, _) = make(seed=4), make(seed=4), make(seed=5)
    assert torch.equal(torch.rand(3), expected)
    assert tokens.backend_tokenizer.to_str() == same.backend_tokenizer.to_str()
    for key, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert not torch.equal(first.model.shared.weight, other.model.shared.weight)


def test_a_saved_model_is_loaded_by_transformers_and_goes_on_alike(tmp_path):
    model, tokenizer = make()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(model)
    batch = [tokenizer(TEXTS, text_target=TEXTS[::-1], padding=True, return_tensors="pt")]
    batch.append(words(TEXTS, text_target=TEXTS[::-1], padding=True, return_tensors="pt"))
    assert {key: value.tolist() for key, value in batch[0].items()} == {
        key: value.tolist() for key, value in batch[1].items()
    }
    assert words.model_max_length == 20
    with torch.inference_mode():
        torch.testing.assert_close(again.eval()(**batch[1]).logits, model.eval()(**batch[0]).logits)
        first, second = (
            one.generate(**words("Two men", return_tensors="pt"), num_beams=2, max_new_tokens=8)
            for one in (model, again)
        )
    assert torch.equal(first, second)


def test_a_position_of_the_target_does_not_see_what_is_behind_it():
    model, tokenizer = make()
    source = tokenizer("Two men", return_tensors="pt")
    target = torch.tensor([[0, 5, 6, 7, 8]])
    changed = target.clone()
    changed[0, 3:] = 9
    with torch.inference_mode():
        one, other = (model.eval()(**source, decoder_input_ids=ids).logits for ids in (target, changed))
    torch.testing.assert_close(one[:, :3], other[:, :3])
    assert not torch.allclose(one[:, 3:], other[:, 3:])


def test_all_its_matrices_are_quantized_and_the_embedding_once():
    model, _ = make()
    matrices = {parameter.data_ptr() for parameter in model.parameters() if parameter.dim() == 2}
    quantize(model, LexibitConfig("kmeans", 3), progress=False)
    positions = 2  # sinusoids that are not trained
    assert len({id(weight) for weight in codebooks(model).values()}) >= len(matrices) - positions


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"d_model": 30, "heads": 4},
            "d_model must be an even number for each of 4 heads, which 30 is not: give",
        ),
        ({"layers": 0}, "layers must be 1 or more, not 0"),
        ({"heads": 0}, "heads must be 1 or more, not 0"),
        ({"positions": 1}, "positions must be 2 or more, not 1"),
        ({"dropout": 1.0}, r"dropout must be 0 to less than 1, not 1\.0"),
        ({"dropout": float("nan")}, "dropout must be 0 to less than 1, not nan"),
        ({"vocab_size": 100}, "vocab_size must be 258 or more, not 100"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, said):
    with pytest.raises(LexibitError, match=f"transformer: {said}"):
        make(**settings)


@pytest.mark.parametrize("texts", [[], [""], [" ", "\n"]])
def test_texts_without_words_are_refused(texts):
    with pytest.raises(
        LexibitError, match="transformer: the training text is empty: its tokenizer is made from it"
    ):
        make(texts)


def test_every_setting_has_a_default():
    assert set(SMALL) | {"dropout"} == set(transformer.SETTINGS)
