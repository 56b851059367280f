"""What a user asks for: one record, the same in Python, on the command line and in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lexibit import importance, schemes
from lexibit.errors import LexibitError, unknown
from lexibit.groups import Groups
from lexibit.importance import Magnitude
from lexibit.outliers import LEAST, MOST
from lexibit.packing import MAX_BITS, MIN_BITS

METHOD = "lexibit"
AUTO = "auto"
LEVELS_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How one weight is quantized: scheme, its options, bits, groups, dtype of levels, importance, outliers.

    ``groups="auto"`` becomes what the scheme uses by itself.
    """

    scheme: str = "kmeans"
    bits: int = 4
    groups: str = AUTO
    options: Mapping[str, Any] | None = None
    levels_dtype: str = "float32"
    importance: str | None = None
    outliers: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no weight could be quantized with."""
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise LexibitError(f"bits must be a whole number from 1 to 8, not {self.bits!r}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise LexibitError(f"bits must be from {MIN_BITS} to {MAX_BITS}, not {self.bits}")
        if self.levels_dtype not in LEVELS_DTYPES:
            raise unknown("levels_dtype", self.levels_dtype, LEVELS_DTYPES)
        if not isinstance(self.scheme, str):
            raise LexibitError(f"scheme must be a name like 'kmeans', not {self.scheme!r}")
        if not isinstance(self.groups, str):
            raise LexibitError(f"groups must be text like 'row' or 'rows:6', not {self.groups!r}")
        share = self.outliers
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise LexibitError(f"outliers must be a share of a weight like 0.001, not {share!r}")
        if share and not LEAST <= share <= MOST:
            raise LexibitError(f"outliers must be 0, or a share from {LEAST} to {MOST}, not {share}")
        fitting = self.fitting()
        if self.groups == AUTO:
            object.__setattr__(self, "groups", fitting.groups)
        Groups.parse(self.groups, (1, 1))
        fitting.check_bits(self.bits)
        if self.importance is not None:
            if not isinstance(self.importance, str):
                raise LexibitError(f"importance must be text like 'E=1,C=0.999', not {self.importance!r}")
            self.weighing()
            if not fitting.weighs:
                raise schemes.does_not_weigh(self.scheme)

    def fitting(self) -> schemes.Scheme:
        """The scheme with its options."""
        return schemes.scheme(self.scheme, self.options)

    def weighing(self) -> Magnitude | Path | None:
        """What its importance means."""
        return None if self.importance is None else importance.parse(self.importance)


_RECIPE = tuple(field.name for field in fields(Recipe))


class LexibitConfig(QuantizationConfigMixin):
    """How to quantize a model.

    Args:
        scheme: ``aciq``, ``binary``, ``kl``, ``kmeans``, ``linear``, ``lq``, ``mse`` or ``ocs``.
        bits: bits of a code, 1 to 8.
        groups: which weights share levels: ``matrix``, ``row``, ``rows:N`` (blocks of N rows),
            ``blocks:N`` (at most N blocks of rows), ``columns:N`` (runs of N columns in a row), ``within:B``
            (the fewest rows whose levels take at most B bits a weight), or ``auto``: ``row`` for binary
            codes, ``matrix`` for all other schemes.
        options: options of the scheme, like ``{"init": "k-means++", "iterations": 3}``.
        levels_dtype: in what the levels are stored: ``float32``, ``float16`` or ``bfloat16``.
        importance: how much each weight's error counts, for schemes that weigh errors: by magnitude, like
            ``"E=1,C=0.999,P=0.05"``, or ``"FILE.safetensors"`` (see :mod:`lexibit.importance`).
        outliers: the share of a weight, like 0.001, that keeps what its codes lose, in float16: 32 bits for
            each of these (see :mod:`lexibit.outliers`).
        embeddings: whether embeddings are quantized too.
        heads: whether task heads (classifier, score, qa_outputs, ...) are quantized too.
        include: patterns; if any are given, only weights that match one are quantized.
        exclude: patterns of weights that stay in full precision, whatever else is said.
        parameters: patterns of bare parameters (of two axes or more) to quantize as well.
        rules: ``{pattern: {"bits": 8, ...}}``: weights that match use these values of scheme, bits,
            groups, options, levels_dtype, importance and outliers instead; of two rules that match, the later
            counts. See :meth:`recipe`.
        seed: of every random choice.

    Patterns are shell patterns (``*``, ``?``, ``[...]``) on the full name of a weight, with or without
    its last part: ``*.query`` and ``*.query.weight`` name the same weights.

    Raises:
        LexibitError: an unknown option, scheme, spelling of groups, or bits outside 1 to 8.
    """

    def __init__(
        self,
        scheme: str = "kmeans",
        bits: int = 4,
        groups: str = AUTO,
        options: Mapping[str, Any] | None = None,
        levels_dtype: str = "float32",
        importance: str | None = None,
        outliers: float = 0.0,
        embeddings: bool = True,
        heads: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        parameters: Sequence[str] = (),
        rules: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
        **unrecognised: Any,
    ) -> None:
        """Check and keep the options."""
        given = unrecognised.pop("quant_method", METHOD)
        if given != METHOD:
            raise LexibitError(f"quant_method is {given!r}: this is a {METHOD!r} configuration")
        known = [name for name in self.__init__.__annotations__ if name not in ("unrecognised", "return")]  # type: ignore[misc]
        for name in unrecognised:
            raise unknown("option of LexibitConfig", name, known)
        for name, value in (
            ("include", include),
            ("exclude", exclude),
            ("parameters", parameters),
        ):
            if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
                raise LexibitError(f"{name} must be a list of patterns, not {value!r}")
        for name, switch in (("embeddings", embeddings), ("heads", heads)):
            _check_switch(name, switch)
        self.quant_method: Any = METHOD
        self.scheme = scheme
        self.bits = bits
        self.groups = groups
        self.options = _settings("options", options)
        self.levels_dtype = levels_dtype
        self.importance = importance
        self.outliers = outliers
        self.embeddings = embeddings
        self.heads = heads
        self.include = list(include)
        self.exclude = list(exclude)
        self.parameters = list(parameters)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise LexibitError(f"seed must be a whole number, 0 or more, not {seed!r}")
        self.rules = {
            pattern: _settings(f"the rule for {pattern!r}", rule)
            for pattern, rule in _settings("rules", rules).items()
        }
        self.seed = seed
        self.recipe()
        for pattern, rule in self.rules.items():
            for name in rule:
                if name not in _RECIPE:
                    error = unknown(f"setting in the rule for {pattern!r}", name, _RECIPE)
                    raise LexibitError(f"{error} (an option of a scheme is set as options.NAME=VALUE)")
            self.recipe(pattern)

    @classmethod
    def recommended(cls, bits: int = 4, **others: Any) -> LexibitConfig:
        """The configuration that keeps most of a model at so many bits, as far as we know (docs/choosing.md).

        Exact k-means; the fewest rows share levels whose levels, in float16, take at most 0.2 bits a weight.
        It is best with calibration.

        Args:
            bits: of a code.
            others: what else a configuration says, but for scheme, groups and levels_dtype.
        """
        return cls(scheme="kmeans", bits=bits, groups="within:0.2", levels_dtype="float16", **others)

    def recipe(self, *rules: str) -> Recipe:
        """The recipe that the named rules, in their order, make of the defaults.

        A rule's options add to those given so far, which a rule for another scheme drops first. An importance
        is dropped if a later rule chose another scheme, which does not weigh errors.

        Raises:
            LexibitError: they make no recipe.
        """
        values = {name: getattr(self, name) for name in _RECIPE}
        weighed = chosen = -1  # which rule named the importance, and which the scheme
        for number, pattern in enumerate(rules):
            rule = self.rules[pattern]
            other = rule.get("scheme", values["scheme"]) != values["scheme"]
            before = {} if other else values["options"]
            values |= rule
            values["options"] = before | _settings("options", rule.get("options"))
            weighed = number if "importance" in rule else weighed
            chosen = number if other else chosen
        if chosen > weighed and not _weighs(**values):
            values["importance"] = None
        try:
            return Recipe(**values)
        except LexibitError as error:
            if not rules:
                raise
            raise LexibitError(f"with the rule for {' and '.join(map(repr, rules))}: {error}") from error


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise LexibitError(f"{name} must be true or false, not {value!r}")


def _settings(what: str, given: Any) -> dict[str, Any]:
    """Settings by name, from whoever may have written anything."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise LexibitError(f"{what} must be settings by name, like {{'bits': 8}}, not {given!r}")
    return dict(given)


def _weighs(scheme: Any, options: Any, **_: Any) -> bool:
    """Whether a scheme takes importances; what is wrong with its name is for the recipe to say."""
    return scheme not in list(schemes.names()) or schemes.scheme(scheme, options).weighs
