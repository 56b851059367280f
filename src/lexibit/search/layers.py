"""A model's layers, in order: the weights that are searched together, and the modules that run in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from lexibit.naming import layer_of
from lexibit.plan import Plan, PlannedWeight
from lexibit.replay import chains


@dataclass(frozen=True)
class Layer:
    """Weights that are searched together.

    Attributes:
        name: what they have in common, like ``bert.encoder.layer.3``.
        weights: of the plan.
    """

    name: str
    weights: tuple[PlannedWeight, ...]

    @property
    def weighs(self) -> bool:
        """Whether a scheme of theirs has a use for importances."""
        return any(weight.recipe.fitting().weighs for weight in self.weights)

    @property
    def size(self) -> int:
        """How many numbers they hold."""
        return sum(prod(weight.spec.shape) for weight in self.weights)


def layers(plan: Plan) -> list[Layer]:
    """The layers of a plan, in the model's order.

    A layer is what stands under one number (``encoder.layer.3``, ``rnns.0``), or, of weights without a
    number, one module's (``embeddings``, ``pooler``). A weight that is used in several places counts where it
    is used first.
    """
    found: dict[str, list[PlannedWeight]] = {}
    for weight in plan.weights:
        found.setdefault(layer_of(weight.name), []).append(weight)
    return [Layer(name, tuple(weights)) for name, weights in found.items()]


def blocks(model: nn.Module) -> Sequence[tuple[str, nn.Module]]:
    """The modules of a model that may run one after another, each on what the one before it gave.

    These are the modules of its one list of layers. A model with several, an encoder-decoder, or one whose
    layers are shared, has none here.
    """
    found = chains(model)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return found[0] if len(found) == 1 and not encoder_decoder else []
