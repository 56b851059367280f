"""A model whose weights' importances are searched: what it comes to with some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from glob import escape

from transformers import PreTrainedModel

from lexibit.config import LexibitConfig, Recipe
from lexibit.errors import LexibitError
from lexibit.importance import Magnitude
from lexibit.nn import codebooks
from lexibit.plan import Plan, PlannedWeight
from lexibit.schemes import does_not_weigh
from lexibit.search.codes import Codes
from lexibit.search.layers import blocks, layers
from lexibit.search.replay import Replay, trace
from lexibit.search.space import NONE, spelling

Assignment = Mapping[str, Magnitude]
"""The importance in each layer, by its name; in layers that are not named every weight counts alike."""


class Problem:
    """A float model, how it is to be quantized but for importances, and what is to become small.

    Args:
        model: the float model; between calls it is as it was.
        config: how it is quantized, without importances.
        objective: measures a model, less is better, by the same calls of it in the same order every time.
        reuse: whether codes, and what unchanged layers give, are kept. Values are the same without.

    Attributes:
        layers: in the order in which they run.
        float_value: the objective of the float model.

    Raises:
        LexibitError: the model is quantized already, has an importance already, or its schemes have no use
            for any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: LexibitConfig,
        objective: Callable[[PreTrainedModel], float],
        *,
        reuse: bool = True,
    ) -> None:
        if codebooks(model):
            raise LexibitError("the model is quantized already: give the float model")
        plan = Plan.of(model, config)
        if not plan.weights:
            raise LexibitError(f"nothing to quantize in {type(model).__name__}: see its plan")
        if named := next((one for one in plan.weights if one.recipe.importance is not None), None):
            raise LexibitError(
                f"{named.name} has the importance {named.recipe.importance!r} already, and importances are "
                "what is searched: leave it out"
            )
        if not any(one.recipe.fitting().weighs for one in plan.weights):
            raise does_not_weigh(plan.weights[0].recipe.scheme)
        self.model, self.config, self._objective, self._reuse = model, config, objective, reuse
        row = [module for _, module in blocks(model)] if reuse else []
        users = {use.module for weight in plan.weights for use in weight.uses}
        values: list[float] = []
        seen = trace(row, users, lambda: values.append(objective(model)))
        self.float_value = values[0]
        self._row = row if seen is not None else []
        self._replay, self._settled = Replay(self._row), dict[str, Magnitude]()
        self._codes = Codes(config)
        found = layers(plan)
        # what is read without a call, at a time that nobody knows, counts as read at once
        seen = seen or {}
        self._position = {
            layer.name: min(seen.get(use.module, 0) for weight in layer.weights for use in weight.uses)
            for layer in found
        }
        self.layers = sorted(found, key=lambda layer: self._position[layer.name])

    def value(self, importances: Assignment, changing: str | None = None) -> float:
        """The objective with some importances.

        Args:
            importances: of the layers.
            changing: the layer of which the caller will try more importances: what runs in front of it is
                kept from now on, for as long as the importances there stay.

        Raises:
            LexibitError: a weight that cannot be quantized so.
        """
        if self._in_front(self._replay.first, importances) != self._settled:
            self._replay, self._settled = Replay(self._row), {}
        with self.quantized(importances):
            if changing is not None and self._replay.first < self._position[changing]:
                self._replay.advance(self._position[changing], lambda: self._objective(self.model))
                self._settled = self._in_front(self._replay.first, importances)
            with self._replay.replaying():
                return self._objective(self.model)

    @contextmanager
    def quantized(self, importances: Assignment) -> Iterator[None]:
        """The model quantized with some importances inside; the float model afterwards."""
        if not self._reuse:
            self._codes = Codes(self.config)
        wanted = [
            (weight, _recipe(weight, importances.get(layer.name, NONE)))
            for layer in self.layers
            for weight in layer.weights
        ]
        with self._codes.installed(wanted):
            yield

    def _in_front(self, first: int, importances: Assignment) -> dict[str, Magnitude]:
        """The importances of what runs in front of a block."""
        return {
            layer.name: importances.get(layer.name, NONE)
            for layer in self.layers
            if self._position[layer.name] < first
        }

    def result(self, importances: Assignment) -> LexibitConfig:
        """The configuration that quantizes the model with these importances."""
        settings = self.config.to_dict()
        rules = dict(settings.pop("rules", None) or {})
        for layer in self.layers:
            for weight in layer.weights:
                said = _recipe(weight, importances.get(layer.name, NONE)).importance
                if said is not None:
                    # behind the user's own rules, of which those that match still count
                    rules[escape(weight.name)] = dict(rules.pop(escape(weight.name), {})) | {
                        "importance": said
                    }
        settings.pop("quant_method", None)
        return LexibitConfig(**settings, rules=rules)


def _recipe(weight: PlannedWeight, importance: Magnitude) -> Recipe:
    """How a weight is quantized with an importance, if its scheme has a use for one."""
    if not weight.recipe.fitting().weighs:
        return weight.recipe
    return replace(weight.recipe, importance=spelling(importance))
