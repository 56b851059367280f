"""A tiny study: a model of two layers, and texts of which those that hold a word are 'yes'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 48), ("dev", 40)):
        lines = ["label\ttext"]
        for index in range(count):
            words = [f"w{word}" for word in rng.integers(10, 97, rng.integers(3, 7))]
            if index % 2:
                words[0] = "w7"
            lines.append(f"{'yes' if index % 2 else 'no'}\t{' '.join(words)}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    transformers.BertModel(tiny_model("bert").config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tiny: Path, texts: Path) -> dict[str, Any]:
    """Fields of a study of ten cells: a float model, and two schemes of two widths, before and after."""
    return {
        "models": {"tiny": str(tiny)},
        "tasks": ["classification"],
        "data": str(texts),
        "schemes": {
            "linear": {"scheme": "linear"},
            "k-means": {"scheme": "kmeans", "option": {"init": "k-means++"}},
        },
        "bits": [2, 3],
        "finetune": {"max_steps": 3},
        "tune": {"max_steps": 2},
    }


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """A function that writes a study to a file."""

    def to_file(fields: dict[str, Any], name: str = "tiny.yaml") -> Path:
        file = tmp_path / name
        file.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        return file

    return to_file
