"""The STS task on hand-made files, and against scikit-free arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from lexibit import LexibitConfig, LexibitError, quantize, tasks
from lexibit.tasks import base
from lexibit.tasks.sts import embed

STS = tasks.task("sts")


def rows(count: int, seed: int = 0) -> list[tuple[str, str, float]]:
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(f"w{word}" for word in rng.integers(5, 97, rng.integers(2, 9)))

    return [(sentence(), sentence(), round(float(rng.uniform(0, 5)), 2)) for _ in range(count)]


def write(folder: Path, examples: list[tuple[str, str, float]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"news\tfile\t2015\t{i}\t{score}\t{a}\t{b}" for i, (a, b, score) in enumerate(examples)]
    (folder / "sts-dev.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# data ------------------------------------------------------------------------------------------------


def test_examples_come_from_the_folder_or_its_sub_folder(tmp_path: Path) -> None:
    examples = rows(5)
    assert STS.load(write(tmp_path / "a", examples)) == examples
    write(tmp_path / "b" / "STS-B", examples)
    assert STS.load(tmp_path / "b") == examples


def test_quotes_are_text_and_more_columns_are_left_alone(tmp_path: Path) -> None:
    line = 'news\tfile\t2015\t0\t3.0\tHe said "no.\t"Yes\thttps://elsewhere\n'
    (tmp_path / "sts-dev.csv").write_text(line * 3, encoding="utf-8")
    assert STS.load(tmp_path) == [('He said "no.', '"Yes', 3.0)] * 3


def test_a_limit_takes_a_sample_by_seed_in_the_files_order(tmp_path: Path) -> None:
    folder, examples = write(tmp_path, rows(50)), rows(50)
    sample = STS.load(folder, limit=10, seed=1)
    assert len(sample) == 10
    assert [examples.index(example) for example in sample] == sorted(map(examples.index, sample))
    assert sample == STS.load(folder, limit=10, seed=1)
    assert sample != STS.load(folder, limit=10, seed=2)
    assert STS.load(folder, limit=80) == examples


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\tb\n", r"sts-dev\.csv: row 1 has 2 columns, not 7: genre, file, year, id, score, sentence1, "),
        ("n\tf\ty\t0\t1.0\ta\tb\nn\tf\ty\t1\thigh\ta\tb\n", r"sts-dev\.csv: row 2 has the score 'high', not"),
        ("n\tf\ty\t0\tnan\ta\tb\n", r"sts-dev\.csv: row 1 has the score 'nan', not a number: take the file"),
        ("", "0 dev examples are too few for sts: give 3 or more"),
        ("n\tf\ty\t0\t1.0\ta\tb\n" * 2, "2 dev examples are too few for sts: give 3 or more"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "sts-dev.csv").write_text(text, encoding="utf-8")
    with pytest.raises(LexibitError, match=said):
        STS.load(tmp_path)


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LexibitError, match=r"no sts-dev\.csv or STS-B/sts-dev\.csv in it"):
        STS.load(tmp_path)


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    assert "sts" in list(tasks.names())
    with pytest.raises(LexibitError, match="unknown task 'stss': did you mean 'sts'"):
        tasks.task("stss")
    with pytest.raises(LexibitError, match=r"'sts' measures models, and trains none: choose one of .*sts-b"):
        tasks.trainable("sts")


# scores ----------------------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_tokens_and_has_length_one(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    texts = ["w5 w6 w7 w8 w9", "w10", "w5 w6"]
    found = embed(model, tokenizer, texts, batch_size=2)
    for text, vector in zip(texts, found, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_the_score_is_the_rank_correlation(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, tokenizer, examples = tiny_model("bert"), tiny_tokenizer(), rows(40)
    score = STS.measure(tokenizer, examples, seed=3)(model)
    assert STS.scores(STS.outcomes(model, tokenizer, examples), seconds=score.seconds, seed=3) == [score]
    first, second = (embed(model, tokenizer, [example[side] for example in examples]) for side in (0, 1))
    ranks = [rankdata(values) for values in ((first * second).sum(1), [score for *_, score in examples])]
    assert score.value == pytest.approx(100 * np.corrcoef(ranks)[0, 1], abs=0.5)
    assert (score.metric, score.examples, score.seed) == ("Spearman x 100", 40, 3)
    assert score.low < score.value < score.high
    assert score.seconds > 0


def test_the_interval_depends_on_the_seed_alone_and_narrows_with_examples(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(base, "RESAMPLES", 100)
    model, tokenizer = tiny_model("bert"), tiny_tokenizer()
    few, again, many = (STS.measure(tokenizer, rows(count))(model) for count in (30, 30, 200))
    assert (few.low, few.high) == (again.low, again.high)
    assert many.high - many.low < few.high - few.low


def test_a_quantized_model_is_scored_without_dropout_and_left_in_its_mode(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(base, "RESAMPLES", 20)
    model = tiny_model("bert").train()
    quantize(model, LexibitConfig("kmeans", 4), progress=False)
    measure = STS.measure(tiny_tokenizer(), rows(20))
    assert measure(model).value == measure(model).value
    assert model.training


def test_long_texts_are_cut_and_a_missing_padding_token_is_no_trouble(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    long = " ".join(["w7"] * 300)
    for name in ("bert", "roberta-qa", "llama"):
        model, tokenizer = tiny_model(name), tiny_tokenizer()
        tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
        found = embed(model, tokenizer, [long, "w5", ""])
        assert found.shape == (3, 24)
        assert found.isfinite().all()


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sts-dev.csv").write_bytes("n\tf\ty\t0\t1.0\tcaf\u00e9\tb\n".encode("latin-1"))
    with pytest.raises(LexibitError, match=r"sts-dev\.csv: cannot be read as csv in UTF-8"):
        STS.load(tmp_path)
    (tmp_path / "sts-dev.csv").write_text("n\tf\ty\t0\t1.0\t" + "a" * 200_000 + "\tb\n")
    with pytest.raises(LexibitError, match=r"sts-dev\.csv: cannot be read"):
        STS.load(tmp_path)


@pytest.mark.parametrize("name", ["bert-mlm", "albert-mlm", "distilbert-classifier", "gpt2", "llama-tied"])
def test_a_model_with_a_head_embeds_with_the_model_below_it(
    name: str, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    torch.testing.assert_close(
        embed(model, tokenizer, ["w5 w6 w7"]), embed(model.base_model, tokenizer, ["w5 w6 w7"])
    )


def test_a_model_of_encoder_and_decoder_embeds_with_its_encoder(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, tokenizer = tiny_model("marian"), tiny_tokenizer()
    found = embed(model, tokenizer, ["w5 w6 w7"])
    with torch.inference_mode():
        inputs = tokenizer("w5 w6 w7", return_tensors="pt")
        hidden = model.model.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    mean = hidden[0].mean(0)
    torch.testing.assert_close(found[0], mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_a_model_without_hidden_states_is_refused(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: Any
) -> None:
    model = tiny_model("bert")
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask: torch.zeros(5, 2))
    with pytest.raises(LexibitError, match="BertModel gives no hidden states to embed sentences with"):
        embed(model, tiny_tokenizer(), ["w5"])


def test_the_splits_of_the_benchmark_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path, rows(5))
    (folder / "sts-dev.csv").rename(folder / "sts-train.csv")
    assert STS.load(folder, "train") == rows(5)
    with pytest.raises(LexibitError, match=r"no sts-dev\.csv"):
        STS.load(folder)


def test_the_hub_has_two_splits() -> None:
    with pytest.raises(LexibitError, match="unknown split of sts on the hub 'test': known: dev, train"):
        STS.load(None, "test")
