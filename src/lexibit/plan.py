"""Which weights are quantized, and how: worked out before any work, and shown.

The plan walks storages, not names: a weight that a model uses in several places (tied embeddings,
shared layers) is one entry with all its names, quantized once and stored once. The same plan serves the
quantizer, the saver, the loader and the reporter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lexibit import importance
from lexibit.config import LexibitConfig, Recipe
from lexibit.errors import LexibitError, unknown
from lexibit.groups import Groups, matrix_shape
from lexibit.importance import Magnitude
from lexibit.ops import native
from lexibit.schemes import does_not_weigh
from lexibit.weight import WeightSpec, bits_per_weight

# Modules that turn hidden states into a task's answer, by the names that transformers gives them.
HEADS = frozenset(
    {
        "classifier",
        "score",
        "qa_outputs",
        "pre_classifier",
        "classification_head",
        "seq_relationship",
        "sop_classifier",
        "logits_proj",
        "sequence_summary",
    }
)

# What each module does with its matrices, and their names in it (a regular expression).
KINDS: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("linear", "weight"),
    nn.Embedding: ("embedding", "weight"),
    Conv1D: ("conv1d", "weight"),
    nn.LSTM: ("recurrent", r"weight_(ih|hh|hr)_l\d+(_reverse)?"),
    nn.GRU: ("recurrent", r"weight_(ih|hh)_l\d+(_reverse)?"),
}


@dataclass(frozen=True)
class Use:
    """One place where a model uses a parameter.

    Attributes:
        module: the module; a bare ``nn.Module()`` for a tensor in a file.
        module_name: the module's name in the model.
        parameter: the parameter's name in the module.
        kind: what the module does with it: ``linear``, ``embedding``, ``conv1d``, ``recurrent``, or
            ``parameter`` where nothing is known.
    """

    module: nn.Module
    module_name: str
    parameter: str
    kind: str

    @property
    def name(self) -> str:
        """The full name of the parameter."""
        return f"{self.module_name}.{self.parameter}" if self.module_name else self.parameter


# every parameter once, with all its uses
Storages = list[tuple[Tensor, tuple[Use, ...]]]


def kind(module: nn.Module, parameter: str) -> str:
    """What a module does with a matrix of its own, as :class:`Use` calls it."""
    for cls, (name, names) in KINDS.items():
        if isinstance(module, cls) and re.fullmatch(names, parameter):
            return name
    return "parameter"


def _kind_by_name(name: str) -> str:
    """The kind of a matrix of which only the name is known, in a file without a model."""
    owner, _, parameter = name.rpartition(".")
    if not parameter.startswith("weight"):
        return "parameter"
    return "embedding" if "embed" in owner else "linear"


def why_float32(kinds: Iterable[str], spec: WeightSpec) -> str:
    """Why products with a weight that is used so stay in float32 when less is asked for; or nothing.

    Nothing, too, if rows of it are looked up only.
    """
    kinds = set(kinds) - {"embedding"}
    if "conv1d" in kinds:
        return "its matrix stands the other way round (Conv1D)"
    if "recurrent" in kinds:
        return "a recurrent layer decodes it"
    if kinds - {"linear"}:
        return "nothing is known of how it is used"
    if not kinds:
        return ""
    return native.why_not_rounded(matrix_shape(spec.shape)[1], spec.block[1], spec.extra, spec.mask)


@dataclass(frozen=True)
class PlannedWeight:
    """A weight that will be quantized.

    Attributes:
        uses: every place that uses it; the first gives it its name.
        recipe: how.
        spec: what will be stored.
        bytes_before: its size in the model.
    """

    uses: tuple[Use, ...]
    recipe: Recipe
    spec: WeightSpec
    bytes_before: int

    @property
    def name(self) -> str:
        """The name under which it is stored."""
        return self.uses[0].name

    @property
    def why_float32(self) -> str:
        """Why its products stay in float32 after :func:`lexibit.optimize`, or nothing."""
        return why_float32([use.kind for use in self.uses], self.spec)

    @property
    def names(self) -> list[str]:
        """All its names, the stored one first."""
        return [use.name for use in self.uses]

    @property
    def kind(self) -> str:
        """What it does: its uses' kinds, once each."""
        return "+".join(dict.fromkeys(use.kind for use in self.uses))

    @property
    def bytes_after(self) -> int:
        """Its size when stored."""
        return self.spec.nbytes

    def alone(self) -> PlannedWeight:
        """The same without its modules: free of the model, to be sent to another process, say."""
        return replace(self, uses=tuple(replace(use, module=nn.Module()) for use in self.uses))

    def by(self, recipe: Recipe) -> PlannedWeight:
        """The same weight by another recipe.

        Raises:
            LexibitError: the recipe's groups do not go with the weight.
        """
        dtype = getattr(torch, self.spec.dtype)
        kinds = {use.kind for use in self.uses}
        spec = spec_of(self.spec.shape, dtype, recipe, name=self.name, kinds=kinds)
        return replace(self, recipe=recipe, spec=spec)


@dataclass(frozen=True)
class KeptParameter:
    """A parameter that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """All parameters of a model, each storage once: those to quantize and those kept."""

    weights: list[PlannedWeight]
    kept: list[KeptParameter]

    @classmethod
    def of(cls, model: nn.Module, config: LexibitConfig) -> Plan:
        """The plan for a model, which may be on the meta device.

        Raises:
            LexibitError: a pattern that matches nothing, or a recipe that a weight cannot take.
        """
        found = storages(model)
        computed = getattr(model, "_keys_to_ignore_on_save", None) or ()
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        return cls._choose(found, _Chooser(config, computed), tied)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], config: LexibitConfig) -> Plan:
        """The plan for the tensors of a file, of which only the names are known.

        Matrices called ``weight...`` are quantized; those whose owner is called ``...embed...`` are
        embeddings.
        """
        found: Storages = []
        for name, tensor in tensors.items():
            owner, _, parameter = name.rpartition(".")
            found.append((tensor, (Use(nn.Module(), owner, parameter, _kind_by_name(name)),)))
        return cls._choose(found, _Chooser(config, ()), {})

    @classmethod
    def _choose(
        cls,
        found: Storages,
        chooser: _Chooser,
        tied: Mapping[str, str],
    ) -> Plan:
        overlapping = _overlapping(found)
        names = [use.name for _, uses in found for use in uses]
        weights, kept = [], []
        for index, (parameter, uses) in enumerate(found):
            uses = _stored_name_first(uses, tied)
            reason = overlapping.get(index) or chooser.why_kept(parameter, uses)
            shape = tuple(parameter.shape)
            nbytes = parameter.numel() * parameter.element_size()
            if reason:
                kept.append(KeptParameter(uses[0].name, shape, nbytes, reason))
                continue
            recipe = chooser.recipe(uses)
            spec = spec_of(
                shape, parameter.dtype, recipe, name=uses[0].name, kinds={use.kind for use in uses}
            )
            parts = {key for use in uses for key in spec.keys(use.name).values()}
            for key in parts.intersection(names) - {use.name for use in uses}:
                raise LexibitError(
                    f"the model has a parameter {key}, the name for a part of {uses[0].name}: rename it, "
                    "or exclude the weight"
                )
            weights.append(PlannedWeight(uses, recipe, spec, nbytes))
        chooser.check_patterns(names)
        for source in dict.fromkeys(weight.recipe.weighing() for weight in weights):
            if isinstance(source, Path):
                users = [weight for weight in weights if weight.recipe.weighing() == source]
                check_importances(importance.names(source), names, users, str(source))
        return cls(weights, kept)

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.weights)} weights quantized, {len(self.kept)} parameters kept, "
            f"{self.bytes_before} -> {self.bytes_after} bytes)"
        )

    @property
    def bytes_before(self) -> int:
        """Bytes of the model's parameters now."""
        return sum(w.bytes_before for w in self.weights) + sum(k.nbytes for k in self.kept)

    @property
    def bytes_after(self) -> int:
        """Bytes of the model's parameters when stored."""
        return sum(w.bytes_after for w in self.weights) + sum(k.nbytes for k in self.kept)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "covered": self.covered,
            "weights": [
                {
                    "name": weight.name,
                    "aliases": [use.name for use in weight.uses[1:]],
                    "kind": weight.kind,
                    "groups": weight.recipe.groups,
                    "options": dict(weight.recipe.options or {}),
                    "importance": weight.recipe.importance,
                    "why_float32": weight.why_float32,
                    "bytes_before": weight.bytes_before,
                    "bytes_after": weight.bytes_after,
                }
                | weight.spec.to_dict()
                for weight in self.weights
            ],
            "kept": [asdict(kept) for kept in self.kept],
        }

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized weights divided by their number."""
        return bits_per_weight(weight.spec for weight in self.weights)

    @property
    def covered(self) -> float:
        """Share of the model's bytes that is quantized, 0 to 1."""
        return sum(w.bytes_before for w in self.weights) / max(self.bytes_before, 1)


def check_importances(
    given: Iterable[str], names: Iterable[str], users: Iterable[PlannedWeight], where: str
) -> None:
    """Refuse importances by weights' names of which some have no weight, or that nobody uses.

    Args:
        given: the names that have one.
        names: all names in the model.
        users: the weights that are to use them.
        where: what errors call the source of the importances.

    Raises:
        LexibitError: there are such.
    """
    given, names = set(given), set(names)
    if given and given.isdisjoint(names):
        raise LexibitError(
            f"{where}: none of its names is in this model, which has {min(names, default='no weight')}, not "
            f"{min(given)}: gather importances from a model of the same class"
        )
    for name in sorted(given - names):
        raise unknown(f"weight in {where}", name, names)
    named = [weight for weight in users if not given.isdisjoint(weight.names)]
    if not named:
        what = f"only {', '.join(sorted(given)[:3])}" if given else "no weight"
        raise LexibitError(
            f"{where}: names {what}, and nothing of it is quantized with importances: name weights that "
            "lexibit plan shows as quantized"
        )
    if not any(weight.recipe.fitting().weighs for weight in named):
        raise does_not_weigh(named[0].recipe.scheme)


def spec_of(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    recipe: Recipe,
    *,
    name: str = "weight",
    kinds: Set[str] = frozenset(),
) -> WeightSpec:
    """What a recipe will store of a weight of that shape and dtype, used as these kinds (:class:`Use`).

    Raises:
        LexibitError: the recipe's groups do not go with the weight.
    """
    scheme, weighing = recipe.fitting(), recipe.weighing()
    rows, columns = matrix_shape(shape)
    axis = input_axis(kinds)
    count = scheme.extra((rows, columns)[axis]) if rows * columns else 0
    extra = (0, count) if axis else (count, 0)
    level_bits = 8 * scheme.form.width(recipe.bits) * getattr(torch, recipe.levels_dtype).itemsize
    groups = Groups.parse(recipe.groups, (rows + extra[0], columns + extra[1]), level_bits)
    if fault := scheme.fault(groups, axis):
        raise LexibitError(f"{name}: {fault}")
    return WeightSpec(
        shape=shape,
        bits=recipe.bits,
        block=groups.block,
        form=scheme.form,
        levels_dtype=recipe.levels_dtype,
        dtype=str(dtype).removeprefix("torch."),
        scheme=recipe.scheme,
        extra=extra,
        mask=isinstance(weighing, Magnitude) and weighing.mask,
        outliers=round(recipe.outliers * rows * columns),
    )


def input_axis(kinds: Set[str]) -> int:
    """On which axis of a weight that is used so its input channels lie: 1, but for Conv1D."""
    return 0 if kinds == {"conv1d"} else 1


def storages(model: nn.Module) -> Storages:
    """Every parameter once, by storage, with all its uses, in the model's order."""
    # while transformers loads a model, on the meta device, its ties are declared but not made yet
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[object, tuple[Tensor, list[Use]]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            use = Use(module, module_name, name, kind(module, name))
            source = parameter
            if parameter.is_meta and use.name in tied:
                source = model.get_parameter(tied[use.name])
            found.setdefault(_identity(source), (source, []))[1].append(use)
    return [(parameter, tuple(uses)) for parameter, uses in found.values()]


def _identity(parameter: Tensor) -> object:
    """Equal for two names of one weight: the same tensor, or the same view of the same memory."""
    if parameter.is_meta or parameter.numel() == 0:
        return id(parameter)
    return (
        parameter.device,
        parameter.data_ptr(),
        parameter.dtype,
        parameter.shape,
        parameter.stride(),
    )


def _overlapping(found: Storages) -> dict[int, str]:
    """Parameters that start at the same memory in another layout (a transposed tie, say)."""
    starts: dict[tuple[torch.device, int], list[int]] = {}
    for index, (parameter, _) in enumerate(found):
        if not parameter.is_meta and parameter.numel():
            starts.setdefault((parameter.device, parameter.data_ptr()), []).append(index)
    return {
        index: "shares its memory in another layout with "
        + " and ".join(found[other][1][0].name for other in same if other != index)
        for same in starts.values()
        if len(same) > 1
        for index in same
    }


def _stored_name_first(uses: tuple[Use, ...], tied: Mapping[str, str]) -> tuple[Use, ...]:
    """transformers says of tied names which one is the copy: that one must not be the stored name."""
    return tuple(sorted(uses, key=lambda use: use.name in tied))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a configuration names a weight, with or without its last part."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


class _Chooser:
    """The policy: what a configuration says of a parameter."""

    def __init__(self, config: LexibitConfig, computed: Iterable[str]) -> None:
        self.config = config
        self.computed = set(computed)

    def _named(self, patterns: Iterable[str], uses: tuple[Use, ...]) -> bool:
        return any(matches(pattern, use.name) for pattern in patterns for use in uses)

    def why_kept(self, parameter: Tensor, uses: tuple[Use, ...]) -> str:
        """The reason why a parameter stays in full precision; empty if it is quantized."""
        config = self.config
        kinds = {use.kind for use in uses}
        if parameter.dim() < 2:
            return f"{parameter.dim()} axis: not a matrix"
        if not parameter.is_floating_point():
            return f"{parameter.dtype}: not floating point"
        if parameter.dtype.itemsize < 2:
            return f"{parameter.dtype}: of eight bits already"
        if any(use.name in self.computed for use in uses):
            return "computed, not saved with the model"
        if self._named(config.exclude, uses):
            return "excluded by pattern"
        if kinds == {"parameter"} and not self._named(config.parameters, uses):
            return "bare parameter (quantized with parameters=[pattern])"
        if config.include and not self._named(config.include, uses):
            return "not in the include patterns"
        if "embedding" in kinds and not config.embeddings:
            return "embedding (embeddings=False)"
        for use in uses:
            if isinstance(use.module, nn.Embedding) and use.module.max_norm is not None:
                return "embedding with max_norm, which changes its rows as it reads them"
        if not config.heads and all(HEADS & set(use.name.split(".")) for use in uses):
            return "task head (quantized with heads=True)"
        return ""

    def recipe(self, uses: tuple[Use, ...]) -> Recipe:
        """The recipe for a weight: the defaults, then every rule that matches."""
        rules = [pattern for pattern in self.config.rules if self._named([pattern], uses)]
        return self.config.recipe(*rules)

    def check_patterns(self, names: list[str]) -> None:
        """Refuse patterns that match nothing: they are typing errors."""
        config = self.config
        for option in ("include", "exclude", "parameters", "rules"):
            for pattern in getattr(config, option):
                if not any(matches(pattern, name) for name in names):
                    near = get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.3)
                    raise LexibitError(
                        f"{option}: the pattern {pattern!r} matches no parameter; names look like "
                        f"{', '.join(near or names[:3])} (lexibit plan shows all)"
                    )
