"""Every scheme side by side on one model: error, size, and what becomes of the model's outputs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lexibit.config import LexibitConfig, Recipe
from lexibit.errors import LexibitError, unknown
from lexibit.fidelity import Reference
from lexibit.fitting import Quantizing, installed
from lexibit.groups import matrix_shape
from lexibit.importance import names as importance_names
from lexibit.importance import parse
from lexibit.levels import LevelForm
from lexibit.nn import codebooks
from lexibit.packing import MAX_BITS, MIN_BITS
from lexibit.plan import Plan, PlannedWeight, check_importances, storages
from lexibit.progress import progress_bar
from lexibit.schemes import does_not_weigh, scheme
from lexibit.tasks import Score
from lexibit.weight import CodebookWeight, WeightSpec, bits_per_weight

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"  # the kind of all weights together

_ORIGIN_BITS = 32  # stored for each extra channel


@dataclass(frozen=True)
class Contender:
    """A scheme in the comparison.

    Attributes:
        name: what the table calls it.
        scheme, options: as in a recipe.
        own: the groups of its paper, or of its kind of baseline; one line of the table each.
    """

    name: str
    scheme: str
    own: tuple[str, ...] = ("matrix",)
    options: Mapping[str, Any] = field(default_factory=dict)


CONTENDERS = (
    Contender("linear", "linear", ("matrix", "blocks:128")),
    Contender("k-means, paper's recipe", "kmeans", options={"init": "k-means++"}),
    Contender("k-means", "kmeans", ("matrix", "row")),
    Contender("LQ", "lq"),
    Contender("ACIQ", "aciq"),
    Contender("MSE clip", "mse"),
    Contender("KL clip", "kl"),
    Contender("min-max, affine", "lq", ("row",), {"affine": True}),
    Contender("MSE clip, affine", "mse", ("row",), {"affine": True}),
    Contender("OCS", "ocs"),
    Contender("OCS, MSE clip", "ocs", options={"clip": "mse"}),
    Contender("greedy codes", "binary", ("row",), {"method": "greedy"}),
    Contender("refined codes", "binary", ("row",), {"method": "refined"}),
    Contender("alternating codes", "binary", ("row",)),
)


def compare_schemes(
    model: nn.Module | Mapping[str, Tensor],
    bits: Sequence[int] = (2, 3, 4),
    *,
    equal: bool = True,
    overhead: float = 0.05,
    schemes: Iterable[str] | None = None,
    importance: str | None = None,
    levels_dtype: str = "float16",
    seed: int = 0,
    reference: Reference | None = None,
    score: Callable[[PreTrainedModel], Score] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Quantize a model by every scheme, and lay what comes out side by side.

    Args:
        model: a float model, as it was afterwards; or the tensors of a file, of which only errors and sizes
            are known.
        bits: widths of a code.
        equal: every scheme with the same budget of stored bits, ``k (1 + overhead)`` a weight, of which it
            spends what its codes leave on as small groups as it can pay, or OCS on as many extra channels. If
            not, each in the form of its paper, with the stored bits that takes.
        overhead: what ``equal`` allows beyond the codes, as a share of their bits.
        schemes: which, by their names; all if not given.
        importance: of schemes that weigh errors, as in a recipe.
        levels_dtype: how levels are stored.
        seed: of every random choice.
        reference: the model's own outputs on text, to measure the distance to.
        score: measures the model on a task; more is better.
        progress: whether to draw a progress bar on the terminal.

    Returns:
        A line for every scheme, width and kind of weight (and for all kinds together): its ``bits``,
        ``kind``, ``name``, ``scheme``, ``options``, ``groups``; mean ``group_size`` in weights; ``weights``,
        ``bytes`` and ``stored_bits`` a weight; ``mse`` and ``relative_error`` of the weights; ``mean_scale``,
        the mean scaling factor of binary codes or the mean step of a uniform grid; ``cosine`` and
        ``output_error`` of the outputs when that kind is quantized and no other; ``score``, ``score_low``,
        ``score_high``, ``metric``, ``examples``, ``score_seed`` and ``score_seconds`` when all are. Of all
        kinds together also ``seconds`` that quantizing took, and ``config``: the :class:`LexibitConfig`, as
        JSON, that does the same again. A scheme that cannot work with a width has no line for it. With a
        score, the first line is the float model's.

    Raises:
        LexibitError: a model that is quantized already, or has nothing to quantize; an unknown scheme; an
            overhead or importance that cannot be; widths that none of the schemes works with; outputs asked
            of what is no transformers model.
    """
    import pandas as pd

    contenders = _chosen(schemes)
    for k in bits:
        if isinstance(k, bool) or not isinstance(k, int) or not MIN_BITS <= k <= MAX_BITS:
            raise LexibitError(f"bits must be whole numbers from {MIN_BITS} to {MAX_BITS}, not {k!r}")
    if not 0 <= overhead <= 1:
        raise LexibitError(f"overhead must be from 0 to 1, as a share of the codes' bits, not {overhead}")
    if isinstance(model, nn.Module) and codebooks(model):
        raise LexibitError("the model is quantized already: give the float model")
    if not isinstance(model, PreTrainedModel) and not (reference is None and score is None):
        raise LexibitError("outputs and scores need a model of transformers: leave reference and score out")
    config = LexibitConfig(seed=seed)
    plan = Plan.of(model, config) if isinstance(model, nn.Module) else Plan.of_tensors(model, config)
    if not plan.weights:
        raise LexibitError("nothing to quantize: see its plan")
    names = (
        [use.name for _, uses in storages(model) for use in uses] if isinstance(model, nn.Module) else model
    )
    _check_importance(importance, contenders, equal, plan, names)
    recipes = [
        _Recipes(k, contender, groups, overhead, levels_dtype, importance)
        for k in dict.fromkeys(bits)
        for contender, groups in _lines(contenders, equal)
    ]
    runs = [recipe for recipe in recipes if recipe.possible]
    if not runs:
        asked = ", ".join(map(str, bits))
        raise LexibitError(f"none of the schemes works with bits {asked}: choose more bits, or other schemes")
    rows: list[dict[str, Any]] = []
    if score is not None and isinstance(model, PreTrainedModel):
        size = 8 * model.dtype.itemsize
        name = str(model.dtype).removeprefix("torch.")
        rows.append({"bits": size, "kind": ALL, "name": name, "stored_bits": size} | _scored(score(model)))
    with progress_bar(progress) as bar:
        for recipe in bar.track(runs, description="schemes"):
            start = time.perf_counter()
            packed = _quantize(plan, model, recipe, config)
            seconds = time.perf_counter() - start
            made = json.dumps(_config(packed, config).to_dict())
            kinds = list(dict.fromkeys(planned.kind for planned, _ in packed))
            for kind in [*kinds, ALL] if len(kinds) > 1 else [ALL]:
                chosen = [(p, w) for p, w in packed if kind in (p.kind, ALL)]
                row = recipe.columns() | {"kind": kind} | _weights(chosen, model)
                if isinstance(model, PreTrainedModel) and (reference is not None or score is not None):
                    with installed(chosen):
                        if reference is not None:
                            fidelity = reference.fidelity(model)
                            row |= {"cosine": fidelity.cosine, "output_error": fidelity.relative}
                        if score is not None and kind == ALL:
                            row |= _scored(score(model))
                rows.append(row | ({"seconds": seconds, "config": made} if kind == ALL else {}))
    return pd.DataFrame(rows)


def _chosen(schemes: Iterable[str] | None) -> list[Contender]:
    known = {contender.scheme for contender in CONTENDERS}
    wanted = known if schemes is None else set(schemes)
    for name in sorted(wanted - known):
        raise unknown("scheme to compare", name, known)
    if not wanted:
        raise LexibitError(f"no scheme to compare: name some of {', '.join(sorted(known))}")
    return [contender for contender in CONTENDERS if contender.scheme in wanted]


def left_out(bits: int, schemes: Iterable[str] | None = None) -> list[str]:
    """The names of what cannot work with a width, and so has no line in the comparison."""
    names = [
        contender.name
        for contender, groups in _lines(_chosen(schemes), equal=False)
        if not _Recipes(bits, contender, groups, 0.0, "float32", None).possible
    ]
    return list(dict.fromkeys(names))


def _check_importance(
    text: str | None, contenders: list[Contender], equal: bool, plan: Plan, names: Iterable[str]
) -> None:
    """Refuse an importance that means nothing, names other weights, or has no scheme to use it."""
    if text is None:
        return
    weighing = [c for c in contenders if scheme(c.scheme, c.options).weighs]
    if not weighing:
        raise does_not_weigh(contenders[0].scheme)
    source = parse(text)
    if isinstance(source, Path):
        users = [weight.by(Recipe(weighing[0].scheme, importance=text)) for weight in plan.weights]
        check_importances(importance_names(source), names, users, str(source))
    elif source.mask and equal:
        raise LexibitError(
            f"importance {text!r}: a mask takes a bit a weight, which an equal budget does not have: leave "
            "mask out, or compare each scheme in its own form (equal=False, --own)"
        )


def _lines(contenders: list[Contender], equal: bool) -> list[tuple[Contender, str]]:
    """Every contender with its groups; empty for those that the budget decides."""
    return [(contender, groups) for contender in contenders for groups in ([""] if equal else contender.own)]


@dataclass(frozen=True)
class _Recipes:
    """The recipe of one line of the table, for any weight."""

    bits: int
    contender: Contender
    groups: str
    overhead: float
    levels_dtype: str
    importance: str | None

    @property
    def possible(self) -> bool:
        """Whether the scheme works with this width."""
        try:
            scheme(self.contender.scheme, self.contender.options).check_bits(self.bits)
        except LexibitError:
            return False
        return True

    def columns(self) -> dict[str, Any]:
        """What the table says of it."""
        return {
            "bits": self.bits,
            "name": self.contender.name,
            "scheme": self.contender.scheme,
            "options": json.dumps(dict(self.contender.options)),
            "groups": self.groups or "equal bits",
        }

    def of(self, planned: PlannedWeight) -> PlannedWeight:
        """A weight of a plan, to be quantized by this."""
        fitting = scheme(self.contender.scheme, self.contender.options)
        recipe = Recipe(
            self.contender.scheme,
            self.bits,
            self.groups or "matrix",
            dict(self.contender.options),
            self.levels_dtype,
            self.importance if fitting.weighs else None,
        )
        made = planned.by(recipe)
        return made if self.groups else planned.by(self._paid(recipe, made.spec))

    def _paid(self, recipe: Recipe, spec: WeightSpec) -> Recipe:
        """The recipe with as small groups, or as many extra channels, as the stored bits allow."""
        rows, columns = matrix_shape(spec.shape)
        if rows * columns == 0:
            return recipe
        budget = self.overhead * self.bits  # beyond the codes, a weight
        width = 8 * spec.form.width(self.bits) * spec.levels_bytes
        if any(spec.extra):
            axis = 0 if spec.extra[0] else 1
            channels, length = (rows, columns) if axis == 0 else (columns, rows)
            count = (budget * rows * columns - width) // (self.bits * length + _ORIGIN_BITS)
            return replace(recipe, options={**(recipe.options or {}), "ratio": max(count, 0) / channels})
        size = math.ceil(width / budget) if budget else rows * columns
        if size <= columns:
            return replace(recipe, groups=f"columns:{math.ceil(columns / (columns // size))}")
        most = rows * columns / size  # groups
        height = next((h for h in range(size // columns, rows) if math.ceil(rows / h) <= most), rows)
        return replace(recipe, groups=f"rows:{height}")


def _quantize(
    plan: Plan, model: nn.Module | Mapping[str, Tensor], recipe: _Recipes, config: LexibitConfig
) -> list[tuple[PlannedWeight, CodebookWeight]]:
    quantizing = Quantizing(config, len(plan.weights), False)
    for planned in plan.weights:
        quantizing.add(recipe.of(planned), _value(planned, model))
    return quantizing.results()


def _config(packed: list[tuple[PlannedWeight, CodebookWeight]], config: LexibitConfig) -> LexibitConfig:
    """The configuration that quantizes every weight as it was: the commonest recipe, and rules for others."""
    recipes = [planned.recipe for planned, _ in packed]
    common = max(recipes, key=recipes.count)
    rules = {
        escape(planned.name): asdict(planned.recipe) for planned, _ in packed if planned.recipe != common
    }
    return LexibitConfig(**asdict(common), rules=rules, seed=config.seed)


def _value(planned: PlannedWeight, model: nn.Module | Mapping[str, Tensor]) -> Tensor:
    """The float weight."""
    if isinstance(model, nn.Module):
        return planned.uses[0].module.get_parameter(planned.uses[0].parameter)
    return model[planned.name]


def _weights(
    packed: list[tuple[PlannedWeight, CodebookWeight]], model: nn.Module | Mapping[str, Tensor]
) -> dict[str, Any]:
    """Errors and sizes of some weights together."""
    squared = total = scales = 0.0
    count = scale_count = groups = 0
    for planned, weight in packed:
        value = _value(planned, model).detach().double()
        squared += (weight.decode().double() - value).square().sum().item()
        total += value.square().sum().item()
        count += value.numel()
        groups += weight.spec.groups.count
        if weight.spec.form is not LevelForm.TABLE:
            scale = weight.levels if weight.spec.form is LevelForm.BINARY else weight.levels[:, :1]
            scales += scale.double().abs().sum().item()
            scale_count += scale.numel()
    specs = [weight.spec for _, weight in packed]
    return {
        "group_size": count / max(groups, 1),
        "weights": count,
        "bytes": sum(spec.nbytes for spec in specs),
        "stored_bits": bits_per_weight(specs),
        "mse": squared / max(count, 1),
        "relative_error": squared / total if total else float(squared > 0),
        "mean_scale": scales / scale_count if scale_count else math.nan,
    }


def _scored(score: Score) -> dict[str, Any]:
    return {
        "metric": score.metric,
        "score": score.value,
        "score_low": score.low,
        "score_high": score.high,
        "examples": score.examples,
        "score_seed": score.seed,
        "score_seconds": score.seconds,
    }


def score_of(line: Mapping[str, Any]) -> Score:
    """The score in a line of the comparison."""
    return Score(
        metric=line["metric"],
        value=line["score"],
        low=line["score_low"],
        high=line["score_high"],
        examples=int(line["examples"]),
        seed=int(line["score_seed"]),
        seconds=line["score_seconds"],
    )
