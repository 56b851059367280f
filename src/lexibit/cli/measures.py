"""The options that say what a model's damage is measured on: text, or a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from lexibit import checkpoint, tasks
from lexibit.errors import LexibitError
from lexibit.fidelity import Reference

Text = Annotated[Path | None, typer.Option(help="Measure on a text file, one text a line.")]
TaskName = Annotated[str | None, typer.Option(help=f"Measure on a task: {', '.join(tasks.names())}.")]
Data = Annotated[Path | None, typer.Option(help="The folder with the task's data; the hub if not given.")]
Limit = Annotated[
    int | None,
    typer.Option(
        help="Texts, and examples of the task, at most: 100 texts and all examples if not given.", min=1
    ),
]
BatchSize = Annotated[int, typer.Option(help="Texts at a time.", min=1)]
Compute = Annotated[
    str,
    typer.Option(
        help="What products of quantized models are computed with: float32, bfloat16, or int8 (fastest)."
    ),
]

_TEXTS = 100


@dataclass(frozen=True)
class Measures:
    """What was asked for: the float model's outputs on text, a score on a task, or both."""

    reference: Reference | None
    score: Callable[[PreTrainedModel], tasks.Score] | None


def measures(
    folder: Path,
    model: PreTrainedModel,
    *,
    text: Path | list[str] | None,
    task: str | None,
    data: Path | None,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> Measures:
    """Prepare them, with the tokenizer in the model's folder."""
    reference, score = None, None
    if text is not None:
        texts = text if isinstance(text, list) else checkpoint.read_texts(text, limit or _TEXTS)
        tokenizer = checkpoint.load_tokenizer(folder)
        reference = Reference(model, tokenizer, texts[: limit or _TEXTS], batch_size=batch_size)
    if data is not None and task is None:
        raise LexibitError("--data has the data of a task: name it with --task")
    if task is not None:
        chosen = tasks.task(task)
        examples = chosen.load(data, limit=limit, seed=seed)
        tokenizer = checkpoint.load_tokenizer(folder)
        score = chosen.measure(tokenizer, examples, batch_size=batch_size, seed=seed)
    return Measures(reference, score)
