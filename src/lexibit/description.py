"""What there is to tell of each weight in codes, as plain JSON values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lexibit import checkpoint, format, importance
from lexibit.checkpoint.source import weight_files
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError, no_codes
from lexibit.fidelity import weight_error
from lexibit.hub import read_config
from lexibit.importance import Magnitude
from lexibit.naming import in_order, kind_of, layer_of
from lexibit.plan import matches
from lexibit.weight import CodebookWeight

BINS = 60
# A histogram covers all but so large a share of the weights at each end: a few outliers would make all else
# one bar. How many lie outside is told.
_TAIL = 0.0005
_BAND = (0.5, 0.05, 0.95)


def describe(folder: Path, against: Path | None = None) -> list[dict[str, Any]]:
    """What there is to tell of each weight in codes, in the model's order.

    Args:
        folder: quantized; a folder or a safetensors file.
        against: the float model that it was made from; without it there are no errors and no histograms.

    Returns:
        For each weight, JSON values: ``name``, ``layer``, ``kind`` (:mod:`lexibit.naming`), ``shape``,
        ``scheme``, ``bits`` of a code, ``groups`` (how many), ``stored_bits`` a weight, levels and all;
        ``importance``, ``{"E", "C", "P"}`` or None; ``relative_error``, ``|W - W^|^2 / |W|^2``, and
        ``largest_error``, ``max |W - W^|``, or None; ``histogram`` of the float weights or None
        (:func:`histogram`); ``levels``, ascending (:func:`spread_of_levels`).

    Raises:
        LexibitError: there are no weights in codes, or the float model is another.
    """
    floats: dict[str, Tensor] = {}
    if against is not None:
        packed, floats = checkpoint.beside_floats(folder, against)
    else:
        stored = format.read(weight_files(folder))
        packed = {name: weight for name, weight in stored.items() if isinstance(weight, CodebookWeight)}
    if not packed:
        raise no_codes(folder)
    for name in packed:
        if against is not None and name not in floats:
            raise LexibitError(f"{against}: has no weight {name}: give the float model that it was made from")
    config = _config(folder)
    return [_one(name, packed[name], floats.get(name), config) for name in sorted(packed, key=in_order)]


def _one(
    name: str, weight: CodebookWeight, original: Tensor | None, config: LexibitConfig | None
) -> dict[str, Any]:
    error = None if original is None else weight_error(name, weight, original)
    return {
        "name": name,
        "layer": layer_of(name),
        "kind": kind_of(name),
        "shape": list(weight.spec.shape),
        "scheme": weight.spec.scheme,
        "bits": weight.spec.bits,
        "groups": weight.spec.groups.count,
        "stored_bits": round(weight.bits_per_weight, 4),
        "importance": _importance(name, config),
        "relative_error": error and _number(error.relative),
        "largest_error": error and _number(error.largest),
        "histogram": None if original is None else histogram(original),
        "levels": spread_of_levels(weight.table()),
    }


def histogram(weights: Tensor) -> dict[str, Any] | None:
    """How many weights have which value.

    Args:
        weights: any shape.

    Returns:
        ``low`` and ``high``, the ends of ``len(counts)`` bins of one width, beyond which lies at most about
        one weight in a thousand: ``below`` and ``above`` are their numbers; ``not_finite``, how many are no
        numbers. None if no weight is a finite number.
    """
    values = weights.detach().float().cpu().numpy().ravel()
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    last = finite.size - 1
    places = [math.floor(last * _TAIL), math.ceil(last * (1 - _TAIL))]
    low, high = (float(value) for value in np.partition(finite, places)[places])
    low, high = _number(low), _number(high)
    if not low < high:
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    counts, _ = np.histogram(finite, bins=BINS, range=(low, high))
    return {
        "low": low,
        "high": high,
        "counts": counts.tolist(),
        "below": int((finite < low).sum()),
        "above": int((finite > high).sum()),
        "not_finite": int(values.size - finite.size),
    }


def spread_of_levels(table: Tensor) -> list[dict[str, float]]:
    """Where the groups' levels lie, however many groups there are.

    Args:
        table: ``[groups, levels]``.

    Returns:
        For the smallest level of each group, the next, ...: its ``median`` over the groups, and ``low`` and
        ``high``, between which it is in 90 % of them.
    """
    ordered: NDArray[np.float32] = table.detach().float().cpu().sort(dim=1).values.numpy()
    if not ordered.size:
        return []
    median, low, high = np.quantile(ordered, _BAND, axis=0)
    return [
        {"median": _number(middle), "low": _number(least), "high": _number(most)}
        for middle, least, most in zip(median, low, high, strict=True)
    ]


def _number(value: float) -> Any:
    """A number in six digits, which is all that can be seen of it; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _config(folder: Path) -> LexibitConfig | None:
    asked = read_config(folder).get("quantization_config") if folder.is_dir() else None
    return LexibitConfig(**asked) if asked else None


def _importance(name: str, config: LexibitConfig | None) -> dict[str, float] | None:
    """What the configuration says of a weight's importance, if that is by magnitude."""
    if config is None:
        return None
    recipe = config.recipe(*(pattern for pattern in config.rules if matches(pattern, name)))
    weighing = None if recipe.importance is None else importance.parse(recipe.importance)
    if not isinstance(weighing, Magnitude):
        return None
    return {"E": weighing.E, "C": weighing.C, "P": weighing.P}
