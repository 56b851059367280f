"""A real ALBERT, whose twelve layers are one: quantized and tuned once, stored once, shared ever after."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AlbertForMaskedLM

from lexibit import LexibitConfig, checkpoint, tasks
from lexibit.nn import codebooks
from lexibit.tuning import parameter_groups, trained_levels

DATA = Path(os.environ.get("LEXIBIT_TEST_DATA", Path(__file__).parents[2] / "shared"))
ALBERT = DATA / "models" / "rxnmapper-albert-smiles"


@pytest.fixture
def reactions() -> list[str]:
    if not ALBERT.is_dir():
        pytest.skip("no rxnmapper-albert-smiles here: LEXIBIT_TEST_DATA names the folder that holds models/")
    lines = (ALBERT / "eval_reactions.txt").read_text(encoding="utf-8").splitlines()
    # short ones, for a test
    return sorted(lines, key=len)[:64]


def test_its_shared_layers_stay_one_from_quantizing_to_loading_what_was_tuned(
    reactions: list[str], tmp_path: Path
) -> None:
    config = LexibitConfig("kmeans", 3)
    checkpoint.quantize_to(ALBERT, tmp_path / "packed", config, progress=False)
    model, tokenizer = checkpoint.load_quantized(tmp_path / "packed"), checkpoint.load_tokenizer(ALBERT)
    task = tasks.trainable("masked-lm")
    features = task.features(model, tokenizer, reactions)
    batch = task.collate(model, tokenizer)([features[index] for index in range(32)])
    before = model(**batch).loss.item()
    codes = {name: weight.codes.clone() for name, weight in codebooks(model).items()}
    with trained_levels(model) as levels:
        assert len(levels) == len(codes)
        optimizer = torch.optim.Adam(parameter_groups(model, 1e-4))
        for _ in range(4):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    assert model(**batch).loss.item() < before
    model.save_pretrained(tmp_path / "tuned")
    loaded = AlbertForMaskedLM.from_pretrained(tmp_path / "tuned")
    found = codebooks(loaded)
    # one matrix of each kind for all twelve layers, called in each
    shared = [name for name in found if "albert_layers" in name]
    assert sorted(name.rpartition("albert_layers.0.")[2] for name in shared) == [
        "attention.dense.weight",
        "attention.key.weight",
        "attention.query.weight",
        "attention.value.weight",
        "ffn.weight",
        "ffn_output.weight",
    ]
    calls: list[int] = []
    loaded.albert.encoder.albert_layer_groups[0].albert_layers[0].ffn.register_forward_hook(
        lambda *_: calls.append(1)
    )
    assert loaded(**batch).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert len(calls) == loaded.config.num_hidden_layers == 12
    assert all(torch.equal(weight.codes, codes[name]) for name, weight in found.items())
    # stored once: 3 bits a weight and the levels, what is not quantized, and the file's own header
    file = tmp_path / "tuned" / "model.safetensors"
    assert file.stat().st_size == (tmp_path / "packed" / "model.safetensors").stat().st_size
    weights = sum(weight.shape.numel() for weight in found.values())
    kept = (
        sum(parameter.numel() for parameter in AlbertForMaskedLM.from_pretrained(ALBERT).parameters())
        - weights
    )
    assert file.stat().st_size == pytest.approx(weights * 3 / 8 + 4 * kept, rel=0.1)
