"""What a search is held to: the model it began with, and scores on examples that it never saw."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, cast

from safetensors.torch import save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lexibit.plan import storages
from lexibit.search.modes import Found
from lexibit.search.problem import Problem
from lexibit.tasks import Examples, Task


def held_out(
    problem: Problem,
    found: Found,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Scores on examples that nothing was chosen by.

    Args:
        problem: the model.
        found: what was found.
        task: what it was searched on.
        tokenizer: the model's own.
        examples: other than those of the search.
        batch_size: texts at a time.

    Returns:
        ``scores`` of the float model (``float``), with the settings before (``start``) and as it was
        ``found``, and the ``differences`` of the last from the second, by a paired test.
    """
    outcomes = {}
    for name, settings in (("float", None), ("start", found.before), ("found", found.settings)):
        with nullcontext() if settings is None else problem.quantized(settings):
            outcomes[name] = task.outcomes(problem.model, tokenizer, examples, batch_size=batch_size)
    seed = problem.config.seed
    scores = {name: [asdict(one) for one in task.scores(rows, seed=seed)] for name, rows in outcomes.items()}
    gain = task.differences(outcomes["found"], outcomes["start"], seed=seed)
    return {"scores": scores, "differences": [asdict(one) for one in gain]}


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells a model, with its configuration and its tokenizer, from others, in hexadecimal digits."""
    found = hashlib.sha256(model.config.to_json_string().encode())
    found.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    if tokenizer.is_fast:
        found.update(cast(Any, tokenizer).backend_tokenizer.to_str().encode())
    for parameter, uses in storages(model):
        found.update(uses[0].name.encode())
        found.update(save({"": parameter.detach().contiguous()}))
    return found.hexdigest()
