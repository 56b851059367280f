"""Causal language modelling against probabilities multiplied one by one, and on real text."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lexibit import LexibitConfig, LexibitError, checkpoint, models, quantize, tasks
from lexibit.tasks import causal, lm
from lexibit.tasks.chunks import Chunks
from lexibit.tasks.metrics import PERPLEXITY

LM, WIKITEXT, PTB = (tasks.trainable(name) for name in ("causal-lm", "wikitext-2", "ptb"))
DATA = Path(os.environ.get("LEXIBIT_TEST_DATA", Path(__file__).parents[3] / "shared"))
WINDOW = 40  # of the tiny models


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread: several that wait for each other at every word of a tiny LSTM take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def words(tiny_tokenizer: Any) -> Any:
    """A tokenizer whose texts begin with [CLS]."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "[CLS]"
    return tokenizer


def passages(*counts: int, seed: int = 0) -> list[str]:
    """Texts of so many words."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(5, 97, count)) + "\n" for count in counts]


def one_by_one(model: Any, ids: list[int], window: int) -> list[float]:
    """The surprise of all ids but the first: each by a call of its own, from its window's tokens so far."""
    found = []
    with torch.inference_mode():
        for place in range(1, len(ids)):
            start = (place - 1) // window * window
            logits = model(input_ids=torch.tensor([ids[start:place]])).logits[0, -1]
            found.append(-float(F.log_softmax(logits.double(), -1)[ids[place]]))
    return found


# files -----------------------------------------------------------------------------------------------


def test_lines_are_read_as_they_are_plain_or_compressed(tmp_path: Path) -> None:
    text = "one\x85still one\u2028and on\n\n two \r\nthree"
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "dev.txt.gz").write_bytes(gzip.compress(text.encode() + b"\n"))
    wanted = ["one\x85still one\u2028and on", "", " two ", "three"]
    assert LM.lines(tmp_path, "train") == LM.lines(tmp_path, "dev") == wanted
    assert LM.load(tmp_path, "dev") == ["\n".join(wanted) + "\n"]


def test_passages_are_whole_lines_and_a_limit_takes_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "PASSAGE", 5)
    (tmp_path / "dev.txt").write_text("a b\nc\n\nd e f g h i\nj\n", encoding="utf-8")
    wanted = ["a b\nc\n", "\nd e f g h i\n", "j\n"]  # ends of lines count
    assert LM.load(tmp_path) == wanted
    assert LM.load(tmp_path, limit=2, seed=5) == wanted[:2]
    assert LM.load(tmp_path, limit=9) == LM.texts(wanted) == wanted


@pytest.mark.parametrize(
    ("task", "files", "split"),
    [
        (WIKITEXT, "WikiText-2/wiki.train.tokens", "train"),
        (WIKITEXT, "wiki.train.shuffled_articles.tokens.gz", "train"),
        (WIKITEXT, "wikitext-2/wiki.valid.tokens", "dev"),
        (WIKITEXT, "wiki.test.tokens", "test"),
        (PTB, "simple-examples/data/ptb.train.txt", "train"),
        (PTB, "ptb.valid.txt", "dev"),
        (PTB, "ptb.test.txt.gz", "test"),
        (LM, "valid.txt", "dev"),
    ],
)
def test_files_are_found_by_their_official_names(tmp_path: Path, task: Any, files: str, split: str) -> None:
    file = tmp_path / files
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(b" a b \n") if files.endswith(".gz") else b" a b \n")
    assert task.load(tmp_path, split) == [" a b \n"]


def test_missing_or_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LexibitError, match=r"no dev\.txt or valid\.txt or val\.txt \(or \.gz\) in it"):
        LM.load(tmp_path)
    with pytest.raises(LexibitError, match="unknown split of ptb 'valid'"):
        PTB.load(tmp_path, "valid")
    with pytest.raises(LexibitError, match=r"ptb: no data set on the hub: name with --data .*ptb\.test\.txt"):
        PTB.load(None, "test")
    for empty in (b"", b"\n  \n"):
        (tmp_path / "dev.txt").write_bytes(empty)
        with pytest.raises(LexibitError, match=r"dev\.txt: holds no text"):
            LM.load(tmp_path)
    (tmp_path / "dev.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(LexibitError, match=r"dev\.txt: cannot be read as text in UTF-8"):
        LM.load(tmp_path)
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"text " * 100)[:-20])
    with pytest.raises(LexibitError, match=r"train\.txt\.gz: cannot be read"):
        LM.load(tmp_path, "train")


def test_rows_of_the_hub_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows(*of: Any) -> list[dict[str, str]]:
        asked.append(of)
        return [{"text": ""}, {"text": " = A = \n"}]

    monkeypatch.setattr(lm.tables, "from_hub", rows)
    assert WIKITEXT.load(None, "dev") == ["\n = A = \n"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1", "validation")]


# perplexity ------------------------------------------------------------------------------------------


def test_perplexity_is_exp_of_the_mean_surprise_and_less_is_better() -> None:
    outcomes = np.array([[3.0, 2.0], [5.0, 6.0]])
    assert PERPLEXITY.of(outcomes) == pytest.approx(math.exp(1.0))
    assert not PERPLEXITY.higher
    assert PERPLEXITY.of(np.array([[1e9, 1.0]])) == math.inf
    assert math.isnan(PERPLEXITY.of(np.zeros((2, 2))))


@pytest.mark.parametrize(("name", "batch_size"), [("gpt2", 1), ("gpt2", 2), ("llama", 64), ("llama-tied", 3)])
def test_every_token_is_predicted_once_from_its_window(
    tiny_model: Any, words: Any, name: str, batch_size: int
) -> None:
    model, texts = tiny_model(name), passages(30, 81, 1, 17)
    ids = [1, *(int(word.removeprefix("w")) for text in texts for word in text.split())]
    nats = one_by_one(model, ids, WINDOW)
    found = LM.outcomes(model, words, texts, batch_size=batch_size)
    assert found[:, 1].tolist() == [30, 81, 1, 17]
    sums = [sum(part) for part in np.split(nats, np.cumsum([30, 81, 1]))]
    assert found[:, 0] == pytest.approx(sums, rel=1e-4)
    (score,) = LM.scores(found)
    assert score.value == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert score.low < score.value < score.high


def test_a_text_of_whole_windows_has_no_rest(tiny_model: Any, words: Any) -> None:
    model, texts = tiny_model("gpt2"), passages(2 * WINDOW)
    ids = words(texts[0], add_special_tokens=False)["input_ids"]
    assert LM.outcomes(model, words, texts)[0, 0] == pytest.approx(
        sum(one_by_one(model, [1, *ids], WINDOW)), rel=1e-4
    )


def test_without_a_first_token_the_first_of_the_text_is_context_only(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model, texts = tiny_model("gpt2"), passages(30, 20)
    ids = [int(word.removeprefix("w")) for text in texts for word in text.split()]
    found = LM.outcomes(model, tiny_tokenizer(), texts)
    assert found[:, 1].tolist() == [29, 20]
    assert found[:, 0].sum() == pytest.approx(sum(one_by_one(model, ids, WINDOW)), rel=1e-4)
    # the words, and an end of a line each, but the first word
    assert WIKITEXT.outcomes(model, tiny_tokenizer(), texts)[:, 1].tolist() == [30, 21]


def test_words_are_counted_whatever_the_tokens(tiny_model: Any, words: Any) -> None:
    model, texts = tiny_model("gpt2"), [" w7 w8 \n \n w9 \n", "w10 \n"]
    alphabet = {letter: number for number, letter in enumerate(["w", "1", "0", "7", "8", "9", " ", "\n"], 5)}
    backend = Tokenizer(BPE({"[UNK]": 3, "[BOS]": 4} | alphabet, [], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[BOS]", unk_token="[UNK]")
    by_word, by_letter = (WIKITEXT.outcomes(model, one, texts) for one in (words, letters))
    assert by_word[:, 1].tolist() == by_letter[:, 1].tolist() == [6, 2]
    assert LM.outcomes(model, letters, texts)[:, 1].tolist() == [len(text) for text in texts]
    assert by_letter[:, 0] == pytest.approx(LM.outcomes(model, letters, texts)[:, 0])


def test_a_quantized_model_is_measured_without_dropout_and_left_in_its_mode(
    tiny_model: Any, words: Any
) -> None:
    model, texts = tiny_model("gpt2").train(), passages(50)
    quantize(model, LexibitConfig("kmeans", 4), progress=False)
    first, second = (LM.measure(words, texts)(model) for _ in range(2))
    assert first.value == second.value
    assert model.training
    (difference,) = LM.differences(*(LM.outcomes(model, words, passages(30, 40, 50)) for _ in range(2)))
    assert (difference.value, difference.p) == (0, 1)


def test_memory_is_bounded_by_few_windows_at_a_time(
    tiny_model: Any, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts, shapes = tiny_model("gpt2"), passages(500), []
    model.register_forward_hook(lambda module, inputs, output: shapes.append(output.logits.shape))
    whole = LM.outcomes(model, words, texts)
    monkeypatch.setattr(causal, "LOGITS", 3 * WINDOW * 97)
    monkeypatch.setattr(lm, "_COPIED", 97 * 7)
    shapes.clear()
    assert LM.outcomes(model, words, texts) == pytest.approx(whole)
    assert max(shape[0] for shape in shapes) == 3


# a model that carries its state ----------------------------------------------------------------------


def made(texts: list[str], **settings: Any) -> Any:
    small = {"embedding_size": 8, "hidden_size": 12, "num_hidden_layers": 2, "bptt": 5} | settings
    return models.create("awd-lstm", texts, small)


def test_a_carried_state_sees_all_that_came_before(tmp_path: Path) -> None:
    texts = passages(20, 13)
    model, tokenizer = made(texts)
    found = WIKITEXT.outcomes(model, tokenizer, texts)
    ids = [tokenizer.eos_token_id, *(i for text in texts for i in tokenizer(text)["input_ids"])]
    assert found[:, 1].tolist() == [21, 14] == [len(tokenizer(text)["input_ids"]) for text in texts]
    nats = one_by_one(model.eval(), ids, len(ids))
    assert found[:, 0] == pytest.approx([sum(nats[:21]), sum(nats[21:])], rel=1e-4)


def test_columns_begin_from_zeros(tmp_path: Path) -> None:
    texts = passages(120, 41)
    model, tokenizer = made(texts, evaluation_columns=3)
    ids = [tokenizer.eos_token_id, *(i for text in texts for i in tokenizer(text)["input_ids"])]
    # 163 words in three columns of 55, the last with two fewer
    nats = one_by_one(model.eval(), ids, 55)
    found = WIKITEXT.outcomes(model, tokenizer, texts, batch_size=1)
    assert found[:, 0] == pytest.approx([sum(nats[:121]), sum(nats[121:])], rel=1e-4)


def test_chunks_go_on_from_each_other_and_differ_between_epochs() -> None:
    tokens = torch.arange(4 * 500 + 3)
    chunks = Chunks(tokens, columns=4, bptt=30)
    assert chunks.ordered
    seen, lengths = set(), []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        chunks.seed, chunks.epoch = seed, epoch
        features = list(chunks)
        assert len(features) == len(chunks)
        assert [bool(feature["reset"]) for feature in features] == [True, *[False] * (len(features) - 1)]
        whole = torch.cat([feature["input_ids"] for feature in features], 1)
        following = torch.cat([feature["shift_labels"] for feature in features], 1)
        assert torch.equal(whole, tokens[:2000].view(4, 500))
        assert torch.equal(following, whole + 1)
        seen.add(tuple(feature["input_ids"].shape[1] for feature in features))
        lengths.append(sorted(feature["input_ids"].shape[1] for feature in features))
        assert features[3]["input_ids"].equal(chunks[3]["input_ids"])
    assert len(seen) == 3
    assert lengths[0] == lengths[1] == lengths[2]
    assert 20 < np.median(lengths[0]) < 40
    assert [len(feature["input_ids"]) for feature in chunks[1:3]] == [4, 4]


def test_chunk_lengths_are_the_papers() -> None:
    lengths = np.array(
        [chunk["input_ids"].shape[1] for chunk in Chunks(torch.arange(200001), columns=1, bptt=70)]
    )
    half = lengths < 52
    assert 0.03 < half.mean() < 0.08
    assert lengths[~half].mean() == pytest.approx(70, abs=1)
    assert lengths[~half].std() == pytest.approx(5, abs=0.5)
    assert lengths[half].mean() == pytest.approx(35, abs=2)


def test_features_of_a_model_that_carries_its_state_are_its_chunks() -> None:
    texts = passages(120)
    model, tokenizer = made(texts, batch_columns=3)
    features = LM.features(model, tokenizer, texts)
    assert isinstance(features, Chunks)
    collate = LM.collate(model, tokenizer)
    batch = collate([features[0]])
    assert batch["input_ids"].shape[0] == 3
    assert batch["input_ids"][0, 0] == tokenizer.eos_token_id
    assert model.train()(**batch).loss.isfinite()
    with pytest.raises(LexibitError, match="2 chunks in a batch"):
        collate([features[0], features[1]])
    model.config.batch_columns = 200
    with pytest.raises(LexibitError, match=r"too few to be read in 200 columns: .* smaller batch_columns"):
        LM.features(model, tokenizer, texts)


# training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_windows_for_training_are_the_text_and_the_loss_leaves_padding_out(
    tiny_model: Any, words: Any, name: str
) -> None:
    model, texts = tiny_model(name), passages(60, 30)
    words.pad_token, words.eos_token = None, "[SEP]"
    features = LM.features(model, words, texts)
    ids = [token for feature in features for token in feature["input_ids"]]
    assert ids == [1, *words("".join(texts), add_special_tokens=False)["input_ids"]]
    assert [len(feature["labels"]) for feature in features] == [WINDOW, WINDOW, 91 - 2 * WINDOW]
    batch = LM.collate(model, words)([dict(feature) for feature in features[1:]])
    with torch.inference_mode():
        together = model(**batch).loss
        alone = [model(**{k: torch.tensor([v]) for k, v in feature.items()}) for feature in features[1:]]
    weights = [len(feature["input_ids"]) - 1 for feature in features[1:]]
    wanted = sum(w * float(one.loss) for w, one in zip(weights, alone, strict=True)) / sum(weights)
    assert float(together) == pytest.approx(wanted, rel=1e-4)


def test_a_folder_gives_its_causal_model(float_folder: Any) -> None:
    assert type(LM.model(float_folder("gpt2"), [])).__name__ == "GPT2LMHeadModel"


# what cannot be measured -----------------------------------------------------------------------------


def test_models_that_predict_no_next_token_are_refused(tiny_model: Any, words: Any) -> None:
    texts = passages(20)
    for name in ("bert-mlm", "albert-mlm", "distilbert-mlm"):
        with pytest.raises(LexibitError, match=r"looks ahead, .* with the task masked-lm"):
            LM.outcomes(tiny_model(name), words, texts)
        with pytest.raises(LexibitError, match="looks ahead"):
            LM.features(tiny_model(name), words, texts)
    for name in ("bert", "bert-classifier", "gpt2-classifier", "marian", "roberta-qa"):
        with pytest.raises(LexibitError, match="gives no logits of 97 tokens at every place"):
            LM.outcomes(tiny_model(name), words, texts)


def test_too_little_text_and_another_models_tokenizer_are_refused(
    tiny_model: Any, tiny_tokenizer: Any, words: Any
) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(LexibitError, match="causal-lm: the text has 1 token for this tokenizer"):
        LM.outcomes(model, tiny_tokenizer(), ["w7\n"])
    assert LM.outcomes(model, words, ["w7\n"])[0, 1] == 1
    words.add_tokens(["new"])
    with pytest.raises(LexibitError, match="gives the token 97, and GPT2LMHeadModel knows 97"):
        LM.outcomes(model, words, ["w7 new\n"])


def test_a_model_that_diverged_is_refused(tiny_model: Any, words: Any) -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(LexibitError, match="GPT2LMHeadModel gives NaN instead of likelihoods"):
        LM.outcomes(model, words, passages(20))


# real text -------------------------------------------------------------------------------------------


def real(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {'/'.join(parts)} here: LEXIBIT_TEST_DATA names the folder that holds it")
    return path


def test_wikitext_has_as_many_words_as_published() -> None:
    folder = real("data", "WikiText-2", "wiki.test.tokens").parents[1]
    for split, words in (("dev", 217_646), ("test", 245_569)):
        texts = WIKITEXT.load(folder, split)
        assert sum(len(text.split()) + text.count("\n") for text in texts) == words
        assert all(len(text.split()) + text.count("\n") >= causal.PASSAGE for text in texts[:-1])


def test_stories_are_no_surprise_to_a_model_of_stories() -> None:
    folder = real("models", "stories260K")
    model, tokenizer = checkpoint.load_float(folder), checkpoint.load_tokenizer(folder)
    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One "
        "day, she saw a big tree. She wanted to climb it, but her mom said no.\n"
    )
    ids = [1, *tokenizer(story, add_special_tokens=False)["input_ids"]]
    with torch.inference_mode():
        logits = F.log_softmax(model(input_ids=torch.tensor([ids[:-1]])).logits[0].double(), -1)
    wanted = math.exp(-float(logits.gather(1, torch.tensor(ids[1:])[:, None]).mean()))
    (score,) = LM.scores(LM.outcomes(model, tokenizer, [story]))
    assert score.value == pytest.approx(wanted, rel=1e-5)
    assert wanted < 3


def test_an_awd_lstm_made_from_a_slice_of_wikitext_measures_it() -> None:
    folder = real("data", "WikiText-2", "wiki.test.tokens").parents[1]
    texts = WIKITEXT.load(folder, "test", limit=4)
    model, tokenizer = made(texts, bptt=20)
    (score,) = WIKITEXT.scores(WIKITEXT.outcomes(model, tokenizer, texts))
    # new weights know nothing but how many words there are
    assert score.value == pytest.approx(len(tokenizer), rel=0.05)
    assert score.examples == 4
