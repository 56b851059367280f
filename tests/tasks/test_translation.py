"""Translation: files, translations against a plain loop, and BLEU against sacreBLEU's own."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from transformers import T5Config, T5ForConditionalGeneration

from lexibit import LexibitConfig, LexibitError, quantize, tasks
from lexibit.models import transformer
from lexibit.tasks import tables
from lexibit.tasks.metrics import BLEU
from lexibit.tasks.multi30k import Multi30k
from lexibit.tasks.translation import Example

DATA = Path(os.environ.get("LEXIBIT_TEST_DATA", Path(__file__).parents[3] / "shared")) / "data"
TASK = tasks.task("multi30k")
PAIRS = [
    Example("Two dogs run .", "Zwei Hunde laufen."),
    Example("A man, in blue\u2028sits.", "Ein Mann in Blau sitzt \u2013 so."),
    Example("Girls", "M\u00e4dchen"),
]


def write(folder, name, pairs, end="\n", ending=""):
    folder.mkdir(parents=True, exist_ok=True)
    for side, language in enumerate(("en", "de")):
        text = "".join(pair[side] + end for pair in pairs).encode()
        file = folder / f"{name}.{language}{ending}"
        file.write_bytes(gzip.compress(text) if ending else text)
    return folder


class Given(Multi30k):
    """The task with translations that are given."""

    def __init__(self, found):
        self.found = found

    def translations(self, model, tokenizer, examples, **_):
        return self.found


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """One thread: several that wait for each other at every token of a tiny model take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(_one_thread):
    """A tiny Transformer and its tokenizer, which learned to translate some made-up sentences."""
    rng = np.random.default_rng(0)
    english = ["one", "two", "red", "dog", "cat", "runs"]
    german = dict(zip(english, ["ein", "zwei", "rot", "Hund", "Katze", "l\u00e4uft"], strict=True))
    sentences = [[english[word] for word in rng.integers(0, 6, rng.integers(1, 5))] for _ in range(40)]
    pairs = [Example(" ".join(words), " ".join(german[word] for word in words)) for words in sentences]
    model, tokenizer = transformer.create(
        TASK.texts(pairs),
        {"d_model": 32, "layers": 1, "heads": 2, "ffn_dim": 64, "positions": 24, "dropout": 0},
        0,
    )
    batch = TASK.collate(model, tokenizer)(list(TASK.features(model, tokenizer, pairs)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model, tokenizer, pairs


# data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("split", "name"), [("train", "train"), ("dev", "val"), ("test", "test_2016_flickr")]
)
def test_lines_are_read_as_pairs_also_compressed(tmp_path, split, name, end, ending):
    write(tmp_path / "a", name, PAIRS, end, ending)
    write(tmp_path / "b" / "Multi30k", name, PAIRS, end, ending)
    assert TASK.load(tmp_path / "a", split) == TASK.load(tmp_path / "b", split) == PAIRS
    assert TASK.texts(PAIRS)[:3] == ["Two dogs run .", "Zwei Hunde laufen.", PAIRS[1].source]


def test_the_last_line_needs_no_end(tmp_path):
    (tmp_path / "val.en").write_text("a\nb", encoding="utf-8")
    (tmp_path / "val.de").write_text("\ufeffc\nd\n", encoding="utf-8")
    assert TASK.load(tmp_path) == [("a", "c"), ("b", "d")]


def test_the_hub_has_columns_of_languages(monkeypatch):
    asked = []
    monkeypatch.setattr(tables, "from_hub", lambda *where: asked.append(where) or [{"en": "a", "de": "b"}])
    assert TASK.load(None, "test") == [Example("a", "b")]
    assert asked == [("bentrevett/multi30k", None, "test")]


def test_files_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(
        LexibitError, match=r"no val\.en \(or \.gz\) in it, nor in its folder Multi30k: multi30k"
    ):
        TASK.load(tmp_path)
    (tmp_path / "val.en").write_text("")
    with pytest.raises(
        LexibitError, match=r"val\.en: no val\.de \(or \.gz\) beside it: add the translations"
    ):
        TASK.load(tmp_path)
    (tmp_path / "val.de").write_text("")
    with pytest.raises(LexibitError, match="0 dev examples are too few for multi30k: give 1 or more"):
        TASK.load(tmp_path)
    (tmp_path / "val.en").write_text("a\nb\n")
    (tmp_path / "val.de").write_text("a\nb\nc\n")
    with pytest.raises(
        LexibitError, match=r"val\.de: has 3 lines, and val\.en has 2: they must be translations"
    ):
        TASK.load(tmp_path)
    for name, line in (("en", 2), ("de", 3)):
        lines = {"en": ["a", "b", "c"], "de": ["a", "b", "c"]}
        lines[name][line - 1] = " "
        for language, found in lines.items():
            (tmp_path / f"val.{language}").write_text("\n".join(found))
        with pytest.raises(
            LexibitError, match=rf"val\.{name}: line {line} is empty: take it out of both files"
        ):
            TASK.load(tmp_path)
    (tmp_path / "val.de").write_bytes("M\u00e4dchen".encode("latin-1"))
    with pytest.raises(LexibitError, match=r"val\.de: cannot be read as text in UTF-8"):
        TASK.load(tmp_path)
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(b"a" * 100)[:-12])
    (tmp_path / "train.de").write_text("a")
    with pytest.raises(LexibitError, match=r"train\.en\.gz: cannot be read as text in UTF-8"):
        TASK.load(tmp_path, "train")
    with pytest.raises(LexibitError, match="unknown split 'flickr': known: dev, test, train"):
        TASK.load(tmp_path, "flickr")


def test_the_real_data_has_its_known_size():
    if not (DATA / "Multi30k").is_dir():
        pytest.skip("no Multi30k here: LEXIBIT_TEST_DATA names the folder that holds data/Multi30k")
    assert [len(TASK.load(DATA, split)) for split in ("train", "dev", "test")] == [29000, 1014, 1000]


# BLEU ------------------------------------------------------------------------------------------------


def sentences(count, seed=0):
    """Translations, some near to their references and some far."""
    rng = np.random.default_rng(seed)
    words = ["der", "Hund,", "l\u00e4uft", "rot.", "(ein)", "Mann", "1,000.5", "zwei-drei", "&amp;"]
    references = [[words[word] for word in rng.integers(0, 9, rng.integers(1, 15))] for _ in range(count)]
    found = [
        " ".join(word if rng.random() < rate else str(rng.choice(words)) for word in reference)
        for reference, rate in zip(references, rng.random(count), strict=True)
    ]
    return found, [" ".join(reference) for reference in references]


@pytest.mark.parametrize("count", [1, 2, 50])
def test_the_metric_over_rows_is_the_score_of_the_corpus(count):
    for seed in range(20):
        found, references = sentences(count, seed)
        found[0] = "" if seed == 0 else found[0]
        outcomes = Given(found).outcomes(None, None, [Example("", reference) for reference in references])
        expected = sacrebleu.corpus_bleu(found, [references])
        assert BLEU.of(outcomes) == pytest.approx(expected.score, abs=1e-9)
        # of a part of the rows too, as in the bootstrap
        part = np.random.default_rng(seed).integers(0, count, count)
        expected = sacrebleu.corpus_bleu([found[i] for i in part], [[references[i] for i in part]])
        assert BLEU.of(outcomes[part]) == pytest.approx(expected.score, abs=1e-9)


def test_known_scores_are_0_and_100():
    examples = [Example("", "ein Hund l\u00e4uft durch das Gras .")] * 2
    for found, score in (([example.target for example in examples], 100), (["", "Katzen"], 0)):
        (result,) = TASK.scores(Given(found).outcomes(None, None, examples))
        assert (result.metric, result.value) == ("sacreBLEU", pytest.approx(score))


def test_the_signature_is_that_of_what_is_counted():
    metric = sacrebleu.BLEU()
    metric.corpus_score(["a b"], [["a c"]])
    assert TASK.signature == str(metric.get_signature())
    assert TASK.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


# translations ----------------------------------------------------------------------------------------


def test_a_trained_model_translates_and_a_plain_loop_says_the_same(tiny):
    model, tokenizer, pairs = tiny
    model.train()
    found = TASK.translations(model, tokenizer, pairs, batch_size=7)
    assert model.training
    assert found == TASK.translations(model, tokenizer, pairs, batch_size=64)
    model.eval()
    for text, pair in zip(found, pairs[:15], strict=False):
        with torch.inference_mode():
            ids = model.generate(
                **tokenizer(pair.source, return_tensors="pt"), num_beams=4, max_new_tokens=24, do_sample=False
            )
        assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert BLEU.of(TASK.outcomes(model, tokenizer, pairs)) > 90


def test_a_quantized_model_translates_as_well_or_worse(tiny, tmp_path):
    model, tokenizer, pairs = tiny
    model.save_pretrained(tmp_path)
    scores = []
    for bits in (8, 1):
        again = type(model).from_pretrained(tmp_path)
        quantize(again, LexibitConfig("kmeans", bits), progress=False)
        scores.append(BLEU.of(TASK.outcomes(again, tokenizer, pairs[:10])))
    assert scores[0] > 90 > scores[1]


def test_translations_and_sources_have_no_more_tokens_than_the_model_takes(tiny, monkeypatch, caplog):
    model, tokenizer, _ = tiny
    endless = "dog " * 60
    (feature,) = TASK.features(model, tokenizer, [Example(endless, endless)])
    assert len(feature["input_ids"]) == len(feature["labels"]) == 24
    generate, found = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **inputs: found.append(generate(**inputs)) or found[-1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)  # no translation ends by itself
    monkeypatch.setattr(model.generation_config, "max_length", 10)
    TASK.translations(model, tokenizer, [Example(endless, "")])
    monkeypatch.setattr("lexibit.tasks.translation.TOKENS", 12)
    TASK.translations(model, tokenizer, [Example(endless, "")])
    assert [ids.shape[1] for ids in found] == [25, 13]
    assert "max_length" not in caplog.text


def test_a_model_that_names_a_prefix_gets_it():
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
            task_specific_params={"translation_en_to_de": {"prefix": "translate English to German: "}},
        )
    )  # fmt: skip
    _, tokenizer = transformer.create(["a dog", "ein Hund"], {"d_model": 16, "heads": 2}, 0)
    (feature,) = TASK.features(model, tokenizer, [Example("a dog", "ein Hund")])
    assert tokenizer.decode(feature["input_ids"]) == "translate English to German: a dog</s>"
    assert tokenizer.decode(feature["labels"]) == "ein Hund</s>"
    assert len(TASK.translations(model, tokenizer, [Example("a dog", "ein Hund")])) == 1


def test_a_model_that_does_not_translate_is_refused(tiny_model, tiny_tokenizer):
    for name in ("gpt2", "bert-mlm"):
        with pytest.raises(
            LexibitError, match="is no encoder-decoder that generates text, which multi30k needs"
        ):
            TASK.outcomes(tiny_model(name), tiny_tokenizer(), PAIRS)


# training --------------------------------------------------------------------------------------------


def test_a_batch_has_the_loss_of_its_sentences_without_padding(tiny):
    model, tokenizer, pairs = tiny
    features = list(TASK.features(model, tokenizer, pairs[:5]))
    batch = TASK.collate(model, tokenizer)(features)
    assert (batch["labels"] == -100).any()
    model.eval()
    tokens = [len(feature["labels"]) for feature in features]
    losses = [
        model(**{key: torch.tensor(value)[None] for key, value in one.items()}).loss for one in features
    ]
    expected = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_is_loaded_with_its_weights(tiny, tmp_path):
    model, _, pairs = tiny
    model.save_pretrained(tmp_path)
    again = TASK.model(tmp_path, pairs)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)
