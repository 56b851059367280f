"""Weights in codes, quantized once for every recipe, and put into the model in turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from lexibit.config import LexibitConfig, Recipe
from lexibit.fitting import Quantizing, installed
from lexibit.plan import PlannedWeight
from lexibit.weight import CodebookWeight

_KEPT = 1 << 30  # bytes of codes that are kept, the latest used


class Codes:
    """A model's weights in codes by recipe, made when they are first asked for.

    Codes depend on the weight, the recipe and the seed alone. The latest used are kept, as many as fit a
    gigabyte; what was dropped is made again.

    Args:
        config: its seed counts.
        kept: bytes of codes that are kept.
    """

    def __init__(self, config: LexibitConfig, kept: int = _KEPT) -> None:
        self._config, self._limit = config, kept
        self._made: OrderedDict[tuple[str, str], CodebookWeight] = OrderedDict()
        self.quantized = 0
        """How many weights were quantized, which is how often nothing was there yet."""

    def of(
        self, wanted: Iterable[tuple[PlannedWeight, Recipe]]
    ) -> list[tuple[PlannedWeight, CodebookWeight]]:
        """Some weights in codes, those that are missing made in threads."""
        planned = [weight.by(recipe) for weight, recipe in wanted]
        keys = [(weight.name, repr(weight.recipe)) for weight in planned]
        missing = [(key, weight) for key, weight in zip(keys, planned, strict=True) if key not in self._made]
        if missing:
            quantizing = Quantizing(self._config, len(missing), False)
            for _, weight in missing:
                use = weight.uses[0]
                quantizing.add(weight, use.module.get_parameter(use.parameter))
            for (key, _), (_, made) in zip(missing, quantizing.results(), strict=True):
                self._made[key] = made
                self.quantized += 1
        found = []
        for key, weight in zip(keys, planned, strict=True):
            self._made.move_to_end(key)
            found.append((weight, self._made[key]))
        while sum(made.nbytes for made in self._made.values()) > self._limit and len(self._made) > len(found):
            self._made.popitem(last=False)
        return found

    @contextmanager
    def installed(self, wanted: Iterable[tuple[PlannedWeight, Recipe]]) -> Iterator[None]:
        """The model with these weights in codes inside; with its float weights afterwards."""
        with torch.no_grad(), installed(self.of(wanted)):
            yield
