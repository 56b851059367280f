"""Objectives against an independent calculation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lexibit import LexibitError, tasks
from lexibit.search.objective import on_task


@pytest.fixture
def words(tmp_path: Path) -> Path:
    lines = [f"{'yes' if number % 3 else 'no'}\tw{10 + number} w{20 + number}" for number in range(20)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(["label\ttext", *lines]) + "\n")
        (tmp_path / f"{split}.txt").write_text("\n".join(line.partition("\t")[2] for line in lines) + "\n")
    return tmp_path


def test_the_loss_is_the_mean_over_examples(words: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    task, tokenizer = tasks.trainable("classification"), tiny_tokenizer()
    model = tiny_model("bert-classifier", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    examples = task.load(words, "train")
    measured = on_task("loss", task, model, tokenizer, examples, batch_size=6)
    model.train()
    found = measured(model)
    assert model.training
    losses = []
    model.eval()
    for example in examples:
        inputs = tokenizer(*example.texts, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        losses.append(F.cross_entropy(logits, torch.tensor([int(example.label == "yes")])))
    assert found == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert measured(model) == found
    metric = on_task("metric", task, model, tokenizer, examples)
    assert metric(model) == -task.scores(task.outcomes(model, tokenizer, examples))[0].value
    assert metric.name == "-accuracy x 100"
    with pytest.raises(LexibitError, match="unknown objective 'los': did you mean 'loss'"):
        on_task("los", task, model, tokenizer, examples)


@pytest.mark.parametrize(("name", "model"), [("causal-lm", "gpt2"), ("masked-lm", "bert-mlm")])
def test_of_language_models_it_is_the_logarithm_of_the_perplexity(
    words: Path, tiny_model: Any, tiny_tokenizer: Any, name: str, model: str
) -> None:
    task, tokenizer, made = tasks.trainable(name), tiny_tokenizer(), tiny_model(model)
    examples = task.load(words, "train")
    found = on_task("loss", task, made, tokenizer, examples)(made)
    (score,) = task.scores(task.outcomes(made, tokenizer, examples))
    assert torch.tensor(found).exp() == pytest.approx(score.value, rel=1e-5)
