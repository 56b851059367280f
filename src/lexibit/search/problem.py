"""A model whose weights' importances are searched: what it comes to with some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from glob import escape

from torch import nn
from transformers import PreTrainedModel

from lexibit.config import LexibitConfig, Recipe
from lexibit.errors import LexibitError, unknown
from lexibit.importance import Magnitude
from lexibit.nn import codebooks
from lexibit.ops import COMPUTE
from lexibit.optimize import optimize
from lexibit.plan import Plan, PlannedWeight
from lexibit.replay import Replay, trace
from lexibit.search.codes import Codes
from lexibit.search.layers import Layer, blocks, layers
from lexibit.search.space import NONE, spelling


@dataclass(frozen=True)
class Setting:
    """What a search decides for a layer.

    Attributes:
        importance: of its weights.
        bits: of a code; as configured if not given.
    """

    importance: Magnitude = NONE
    bits: int | None = None


Assignment = Mapping[str, Setting]
"""The setting of each layer, by its name; of layers that are not named it is that without importance."""


class Problem:
    """A float model, how it is to be quantized but for importances, and what is to become small.

    Args:
        model: the float model; between calls it is as it was.
        config: how it is quantized, without importances.
        objective: measures a model, less is better, by the same calls of it in the same order every time.
        reuse: whether codes, and what unchanged layers give, are kept. Values are the same without.
        compute: what products with weights in codes are computed with (see :func:`lexibit.optimize`).

    Attributes:
        layers: in the order in which they run, as far as that was seen, or else the model's own.
        float_value: the objective of the float model.

    Raises:
        LexibitError: the model is quantized already, or has an importance already.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: LexibitConfig,
        objective: Callable[[PreTrainedModel], float],
        *,
        reuse: bool = True,
        compute: str = "float32",
    ) -> None:
        if compute not in COMPUTE:
            raise unknown("compute", compute, COMPUTE)
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
        self.model, self.config, self._objective, self._reuse = model, config, objective, reuse
        self._compute = compute
        row = [module for _, module in blocks(model)] if reuse else []
        users = {use.module for weight in plan.weights for use in weight.uses}
        values: list[float] = []
        seen = trace(model, row, users, lambda: values.append(objective(model)))
        self.float_value = values[0]
        self._row = row if seen is not None and self._replayable(row) else []
        self._replay, self._settled = Replay(self._row), dict[str, Setting | None]()
        self._codes = Codes(config)
        found = layers(plan)
        # what is read without a call, at a time that nobody knows, counts as read at once
        seen = seen or {}
        self._position = {
            layer.name: min(seen.get(use.module, 0) for weight in layer.weights for use in weight.uses)
            for layer in found
        }
        self.layers = sorted(found, key=lambda layer: self._position[layer.name])

    def _replayable(self, row: Sequence[nn.Module]) -> bool:
        """Whether the model gives the same if all of its row is replayed, of which only outputs are kept."""
        replay = Replay(row)
        try:
            replay.advance(len(row), lambda: self._objective(self.model))
            with replay.replaying():
                return self._objective(self.model) == self.float_value
        except Exception:  # whatever a model does that looks into its layers
            return False

    def value(self, settings: Assignment, changing: str | None = None, *, only: bool = False) -> float:
        """The objective with some settings.

        Args:
            settings: of the layers.
            changing: the layer of which the caller will try more settings: what runs in front of it is kept
                from now on, for as long as the settings there stay.
            only: whether layers that are not named stay in full precision.

        Raises:
            LexibitError: a weight that cannot be quantized so.
        """
        if self._in_front(self._replay.first, settings, only) != self._settled:
            self._replay, self._settled = Replay(self._row), {}
        with self.quantized(settings, only=only):
            if changing is not None and self._replay.first < self._position[changing]:
                self._replay.advance(self._position[changing], lambda: self._objective(self.model))
                self._settled = self._in_front(self._replay.first, settings, only)
            with self._replay.replaying():
                return self._objective(self.model)

    @contextmanager
    def quantized(self, settings: Assignment, *, only: bool = False) -> Iterator[None]:
        """The model quantized with some settings inside; the float model afterwards."""
        if not self._reuse:
            self._codes = Codes(self.config)
        wanted = [
            (weight, _recipe(weight, settings.get(layer.name, _PLAIN)))
            for layer in self.layers
            for weight in layer.weights
            if layer.name in settings or not only
        ]
        with self._codes.installed(wanted):
            if not wanted:
                yield
                return
            optimize(self.model, self._compute)
            try:
                yield
            finally:
                optimize(self.model, "float32")

    def _in_front(self, first: int, settings: Assignment, only: bool) -> dict[str, Setting | None]:
        """The settings of what runs in front of a block; None for full precision."""
        return {
            layer.name: settings.get(layer.name, None if only else _PLAIN)
            for layer in self.layers
            if self._position[layer.name] < first
        }

    def nbytes(self, layer: Layer, setting: Setting) -> int:
        """All that is stored of a layer with a setting."""
        return sum(weight.by(_recipe(weight, setting)).bytes_after for weight in layer.weights)

    def bits_per_weight(self, settings: Assignment) -> float:
        """The mean stored bits of a weight with some settings, every byte counted."""
        stored = sum(self.nbytes(layer, settings.get(layer.name, _PLAIN)) for layer in self.layers)
        return 8 * stored / max(sum(layer.size for layer in self.layers), 1)

    def result(self, settings: Assignment) -> LexibitConfig:
        """The configuration that quantizes the model with these settings."""
        config = self.config.to_dict()
        rules = dict(config.pop("rules", None) or {})
        for layer in self.layers:
            for weight in layer.weights:
                recipe = _recipe(weight, settings.get(layer.name, _PLAIN))
                if recipe != weight.recipe:
                    # all of it, behind the user's own rules: so none of them counts
                    rules.pop(escape(weight.name), None)
                    rules[escape(weight.name)] = asdict(recipe)
        config.pop("quant_method", None)
        return LexibitConfig(**config, rules=rules)


_PLAIN = Setting()


def _recipe(weight: PlannedWeight, setting: Setting) -> Recipe:
    """How a weight is quantized with a setting, of which importance counts if its scheme has a use for it."""
    recipe = weight.recipe if setting.bits is None else replace(weight.recipe, bits=setting.bits)
    if not recipe.fitting().weighs:
        return recipe
    return replace(recipe, importance=spelling(setting.importance))
