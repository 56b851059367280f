"""Masked language modelling against probabilities worked out text by text, and on a real ALBERT."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lexibit import LexibitConfig, LexibitError, checkpoint, quantize, tasks
from lexibit.tasks import lm

MASKED = tasks.trainable("masked-lm")
DATA = Path(os.environ.get("LEXIBIT_TEST_DATA", Path(__file__).parents[3] / "shared"))
PAD, CLS, SEP, UNK, MASK = range(5)  # of the tiny tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread: several that wait for each other in tiny models take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lines(*counts: int, seed: int = 0) -> list[str]:
    """Texts of so many words."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in rng.integers(5, 97, count)) for count in counts]


def seen_by(model: Any) -> list[dict[str, torch.Tensor]]:
    """What the model will be given."""
    seen: list[dict[str, torch.Tensor]] = []
    model.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    return seen


def test_examples_are_the_lines_with_text_and_a_limit_is_a_sample(tmp_path: Path) -> None:
    (tmp_path / "dev.txt").write_text("a b\n\n  \nc d e\nf\n", encoding="utf-8")
    assert MASKED.load(tmp_path) == ["a b", "c d e", "f"]
    assert len(MASKED.load(tmp_path, limit=2, seed=1)) == 2
    with pytest.raises(LexibitError, match=r"no train\.txt"):
        MASKED.load(tmp_path, "train")


@pytest.mark.parametrize("name", ["bert-mlm", "albert-mlm", "distilbert-mlm", "roberta-mlm"])
def test_the_surprise_of_the_masked_tokens_is_counted(
    tiny_model: Any, tiny_tokenizer: Any, name: str
) -> None:
    model, texts = tiny_model(name), lines(3, 30, 1, 12, 30)
    seen = seen_by(model)
    found = MASKED.outcomes(model, tiny_tokenizer(), texts, batch_size=2)
    originals = {tuple(row): index for index, row in enumerate(ids_of(texts))}
    wanted = np.zeros((len(texts), 2))
    rows = [
        row[mask.bool()]
        for given in seen
        for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]
    for row in rows:
        (index,) = (
            number
            for ids, number in originals.items()
            if len(ids) == len(row) and all(a in (b, MASK) for a, b in zip(row.tolist(), ids, strict=True))
        )
        ids = torch.tensor(ids_of(texts)[index])
        masked = row == MASK
        with torch.inference_mode():
            logits = F.log_softmax(model(input_ids=row[None]).logits[0].double(), -1)
        wanted[index] = -float(logits[masked].gather(1, ids[masked][:, None]).sum()), masked.sum()
    assert wanted[:, 1].tolist() == [1, 4, 1, 2, 4]
    assert found == pytest.approx(wanted, rel=1e-4)
    (score,) = MASKED.scores(found)
    assert score.value == pytest.approx(math.exp(wanted[:, 0].sum() / 12), rel=1e-4)


def ids_of(texts: list[str]) -> list[list[int]]:
    return [[CLS, *(int(word.removeprefix("w")) for word in text.split()), SEP] for text in texts]


def test_masks_depend_on_the_place_among_the_examples_alone(
    tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = tiny_model("albert-mlm"), lines(*range(2, 38))
    np.random.seed(1)
    first = MASKED.outcomes(model, tiny_tokenizer(), texts, batch_size=64)
    np.random.seed(2)
    assert MASKED.outcomes(model, tiny_tokenizer(), texts, batch_size=1) == pytest.approx(first, rel=1e-5)
    monkeypatch.setattr(lm, "LOGITS", 97 * 60)
    seen = seen_by(model)
    assert MASKED.outcomes(model, tiny_tokenizer(), texts) == pytest.approx(first, rel=1e-5)
    assert max(given["input_ids"].numel() for given in seen) <= 60
    assert MASKED.outcomes(model, tiny_tokenizer(), texts[:5])[:, 0] == pytest.approx(first[:5, 0], rel=1e-5)


def test_long_lines_are_cut_and_a_quantized_model_is_measured(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("bert-mlm").train()
    quantize(model, LexibitConfig("kmeans", 4), progress=False)
    found = MASKED.outcomes(model, tiny_tokenizer(), lines(300, 5))
    assert found[:, 1].tolist() == [6, 1]  # of 38 words between [CLS] and [SEP]
    assert np.isfinite(found).all()
    assert model.training


# training --------------------------------------------------------------------------------------------


def test_training_masks_as_the_paper_says_and_anew_in_every_epoch(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tokenizer, texts = tiny_tokenizer(), lines(*[36] * 300)
    features = MASKED.features(tiny_model("bert-mlm"), tokenizer, texts)
    originals = ids_of(texts)
    counts = {"masked": 0, "kept": 0, "other": 0}
    for feature, ids in zip(features, originals, strict=True):
        labels, given = np.array(feature["labels"]), np.array(feature["input_ids"])
        chosen = labels != -100
        assert chosen.sum() == round(0.15 * 36)
        assert not chosen[[0, -1]].any()
        assert (labels[chosen] == np.array(ids)[chosen]).all()
        assert (given[~chosen] == np.array(ids)[~chosen]).all()
        counts["masked"] += (given[chosen] == MASK).sum()
        counts["kept"] += (given[chosen] == labels[chosen]).sum()
        counts["other"] += ((given[chosen] != MASK) & (given[chosen] != labels[chosen])).sum()
    total = 300 * 5
    assert counts["masked"] / total == pytest.approx(0.8, abs=0.04)
    assert counts["kept"] / total == pytest.approx(0.1, abs=0.03)
    assert counts["other"] / total == pytest.approx(0.1, abs=0.03)
    first = features[7]
    assert features[7] == first
    features.epoch = 1
    assert features[7] != first
    features.epoch, features.seed = 0, 1
    assert features[7] != first
    features.seed = 0
    assert features[7] == first
    assert not getattr(features, "ordered", False)


@pytest.mark.parametrize("name", ["albert-mlm", "distilbert-mlm"])
def test_batches_have_a_loss_of_the_masked_tokens(tiny_model: Any, tiny_tokenizer: Any, name: str) -> None:
    model, tokenizer, texts = tiny_model(name), tiny_tokenizer(), lines(10, 30, 1)
    features = MASKED.features(model, tokenizer, texts)
    batch = MASKED.collate(model, tokenizer)(list(features))
    output = model(**batch)
    where = batch["labels"] != -100
    assert where.sum() == 2 + 4 + 1
    wanted = F.cross_entropy(output.logits[where], batch["labels"][where])
    torch.testing.assert_close(output.loss, wanted)


def test_a_folder_gives_its_masked_model(float_folder: Any) -> None:
    assert type(MASKED.model(float_folder("albert-mlm"), [])).__name__ == "AlbertForMaskedLM"


# what cannot be measured -----------------------------------------------------------------------------


def test_wrong_models_and_texts_are_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(LexibitError, match="gives no logits of 97 tokens at every place"):
        MASKED.outcomes(tiny_model("bert-classifier"), tokenizer, ["w5 w6"])
    model = tiny_model("bert-mlm")
    with torch.no_grad():
        model.cls.predictions.bias[3] = math.nan
    with pytest.raises(LexibitError, match="BertForMaskedLM gives NaN instead of likelihoods"):
        MASKED.outcomes(model, tokenizer, ["w5 w6"])
    tokenizer.add_tokens(["new"])
    with pytest.raises(LexibitError, match="gives the token 97, and BertForMaskedLM knows 97"):
        MASKED.outcomes(model, tokenizer, ["w5 new"])
    tokenizer.mask_token = None
    with pytest.raises(LexibitError, match=r"tokenizer of BertForMaskedLM has no mask token: .* causal-lm"):
        MASKED.outcomes(model, tokenizer, ["w5 w6"])


def test_lines_without_tokens_count_nothing(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, tokenizer = tiny_model("bert-mlm"), tiny_tokenizer()
    found = MASKED.outcomes(model, tokenizer, ["", "w5 w6"])
    assert found[0].tolist() == [0, 0]
    assert found[1, 1] == 1
    assert len(MASKED.features(model, tokenizer, ["", "w5 w6"])) == 1
    with pytest.raises(LexibitError, match="the training text has no tokens"):
        MASKED.features(model, tokenizer, [""])


def test_a_real_albert_knows_its_reactions(tmp_path: Path) -> None:
    folder = DATA / "models" / "rxnmapper-albert-smiles"
    if not folder.exists():
        pytest.skip("no rxnmapper-albert-smiles here: LEXIBIT_TEST_DATA names the folder that holds models/")
    shutil.copy(folder / "eval_reactions.txt", tmp_path / "dev.txt")
    examples = MASKED.load(tmp_path, limit=4)
    model, tokenizer = checkpoint.load_float(folder), checkpoint.load_tokenizer(folder)
    (score,) = MASKED.scores(MASKED.outcomes(model, tokenizer, examples))
    assert 1 < score.value < 2  # of 591 tokens
    quantize(model, LexibitConfig("kmeans", 4), progress=False)
    (coarse,) = MASKED.scores(MASKED.outcomes(model, tokenizer, examples))
    assert score.value < coarse.value < 4
