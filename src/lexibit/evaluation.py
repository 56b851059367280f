"""How good a model in a folder is on a task, alone or against another."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from lexibit import checkpoint, tasks
from lexibit.errors import unknown
from lexibit.nn import codebooks
from lexibit.ops import COMPUTE
from lexibit.optimize import optimize
from lexibit.tasks import Difference, Score
from lexibit.tasks.metrics import Outcomes


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        task, split: on what.
        data: the folder of the data; None for the hub.
        limit, seed: of the sample of examples.
        compute: what the products of quantized models were computed with.
        scores: by model, as it was named, the score by every metric.
        signature: what else the scores depend on, like sacreBLEU's signature.
        differences: of the first model's scores less the second's, if there are two.
    """

    task: str
    split: str
    data: str | None
    limit: int | None
    seed: int
    compute: str
    scores: dict[str, list[Score]]
    signature: str | None = None
    differences: list[Difference] = field(default_factory=list)


def evaluate(
    model: str | Path,
    task: str,
    data: str | Path | None = None,
    *,
    split: str = "dev",
    against: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    compute: str = "float32",
    progress: bool = True,
) -> Evaluation:
    """Measure a model on a task, and how it differs from another on the same examples.

    Args:
        model: a folder or a hub name, float or quantized.
        task: its name.
        data: a local folder; the hub if not given.
        split: which examples.
        against: another model.
        limit: a sample of so many examples; all if not given.
        batch_size: texts at a time.
        seed: of the sample, the intervals and the test.
        compute: what the products of quantized models are computed with (see :func:`lexibit.optimize`).
        progress: whether to draw a progress bar on the terminal.

    Raises:
        LexibitError: no such model, task or data, or a model that is not for the task.
    """
    if compute not in COMPUTE:
        raise unknown("compute", compute, COMPUTE)
    chosen = tasks.task(task)
    examples = chosen.load(None if data is None else Path(data), split, limit=limit, seed=seed)
    outcomes: list[Outcomes] = []
    scores: dict[str, list[Score]] = {}
    for source in [model] if against is None else [model, against]:
        folder = checkpoint.find(source)
        loaded, tokenizer = checkpoint.load_model(folder), checkpoint.load_tokenizer(folder)
        if compute != "float32" and (codebooks(loaded) or not outcomes):
            optimize(loaded, compute)
        start = time.perf_counter()
        outcomes.append(
            chosen.outcomes(loaded, tokenizer, examples, batch_size=batch_size, progress=progress)
        )
        seconds = time.perf_counter() - start
        name = str(source) if str(source) not in scores else f"{source} (again)"
        scores[name] = chosen.scores(outcomes[-1], seconds=seconds, seed=seed)
    differences = chosen.differences(*outcomes, seed=seed) if len(outcomes) > 1 else []
    where = None if data is None else str(data)
    return Evaluation(task, split, where, limit, seed, compute, scores, chosen.signature, differences)
