"""Which weights mind being quantized: one at a time, and what it does to the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.fidelity import OutputFidelity, Reference, weight_error
from lexibit.fitting import installed, quantize_planned
from lexibit.nn import codebooks
from lexibit.plan import Plan
from lexibit.progress import progress_bar
from lexibit.tasks import Score


@dataclass(frozen=True)
class Ranking:
    """The damage that each weight does, the worst first.

    Attributes:
        weights: one after the other.
        float_score: of the float model, if there was a task.
    """

    weights: list[Sensitivity]
    float_score: Score | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one weight, and no other, does.

    Attributes:
        name: the weight.
        kind: what it does, as in the plan.
        weights: how many numbers it holds.
        nbytes: its bytes when stored.
        bits_per_weight: its stored bits divided by its numbers.
        error: ``|W - W^|^2 / |W|^2``.
        output_error: ``|A - B|^2 / |A|^2`` of the model's outputs A and B, if there was text.
        cosine: their mean cosine, if there was text.
        score: the model's score, if there was a task.
        drop: how much lower that is than the float model's, if there was a task.
    """

    name: str
    kind: str
    weights: int
    nbytes: int
    bits_per_weight: float
    error: float
    output_error: float | None = None
    cosine: float | None = None
    score: float | None = None
    drop: float | None = None


def sensitivity(
    model: PreTrainedModel,
    config: LexibitConfig | None = None,
    *,
    reference: Reference | None = None,
    score: Callable[[PreTrainedModel], Score] | None = None,
    progress: bool = True,
) -> Ranking:
    """Quantize one weight at a time, see what becomes of the model, and rank the damage.

    Args:
        model: a float model; as it was afterwards.
        config: how each weight is quantized, and which; k-means with 4 bits if not given.
        reference: the model's own outputs on text, to measure the distance to.
        score: measures the model on a task; more is better.
        progress: whether to draw a progress bar on the terminal.

    Returns:
        Every weight of the plan, the one whose quantization does most damage first: by the drop of the
        score if there is one, and by the distance of the outputs; NaN is the worst.

    Raises:
        LexibitError: neither a reference nor a score, a model that is quantized already, or from the plan.
    """
    config = config or LexibitConfig()
    if reference is None and score is None:
        raise LexibitError("give text or a task to measure the damage on")
    if codebooks(model):
        raise LexibitError("the model is quantized already: load the float model to quantize anew")
    plan = Plan.of(model, config)
    if not plan.weights:
        raise LexibitError(f"nothing to quantize in {type(model).__name__}: see its plan")
    before = None if score is None else score(model)
    if before is not None and not math.isfinite(before.value):
        raise LexibitError(f"the float model's score is {before.value}: there is nothing to compare with")
    found = []
    with progress_bar(progress) as bar:
        for planned in bar.track(plan.weights, description="one weight at a time"):
            value = planned.uses[0].module.get_parameter(planned.uses[0].parameter)
            weight = quantize_planned(planned, value, seed=config.seed)
            fidelity: OutputFidelity | None = None
            after = None
            with installed([(planned, weight)]):
                if reference is not None:
                    fidelity = reference.fidelity(model)
                if score is not None:
                    after = score(model).value
            found.append(
                Sensitivity(
                    name=planned.name,
                    kind=planned.kind,
                    weights=value.numel(),
                    nbytes=weight.nbytes,
                    bits_per_weight=weight.bits_per_weight,
                    error=weight_error(planned.name, weight, value).relative,
                    output_error=None if fidelity is None else fidelity.relative,
                    cosine=None if fidelity is None else fidelity.cosine,
                    score=after,
                    drop=None if after is None or before is None else before.value - after,
                )
            )
    found.sort(key=lambda one: (_worst_first(one.drop), _worst_first(one.output_error)))
    return Ranking(found, before)


def _worst_first(damage: float | None) -> float:
    if damage is None:
        return 0.0
    return -math.inf if math.isnan(damage) else -damage
