"""The options that say how to quantize, the same for every command that takes them."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from lexibit import schemes
from lexibit.config import AUTO, LEVELS_DTYPES, LexibitConfig
from lexibit.errors import LexibitError

Model = Annotated[
    str, typer.Argument(help="A hub name, a model folder, or a .safetensors file.", metavar="MODEL")
]

Importance = Annotated[
    str | None,
    typer.Option(
        help="How much each weight's error counts, for schemes that weigh errors: by magnitude, like "
        "E=1,C=0.999,P=0.05, or a FILE.safetensors of tensors under the weights' names."
    ),
]

BaseModel = Annotated[
    str | None, typer.Option(help="The hub name of the float model.", metavar="USER/NAME", show_default=False)
]


SEARCH = "search"  # what a plan file calls the search that found it

_MATCH = "A shell pattern on the weights' names, like '*.query'; may be given more than once."


PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "--plan",
        help="All of the above from a JSON file instead: a plan of lexibit search, or a config that "
        "compare-schemes --json printed.",
    ),
]


def _config(
    context: typer.Context,
    scheme: Annotated[
        str | None,
        typer.Option(
            help=f"How levels are chosen: {', '.join(schemes.names())}; each as its paper has it. If not "
            "given: kmeans with --groups within:0.2 --levels-dtype float16, which keeps most of a model as "
            "far as we know.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits of a code, 1 to 8.")] = 4,
    groups: Annotated[
        str,
        typer.Option(
            help="Which weights share levels: matrix, row, rows:N (blocks of N rows), blocks:N "
            "(at most N blocks of rows), columns:N (runs of N columns in a row), within:B (the fewest rows "
            "whose levels take at most B bits a weight); auto: row for binary codes, matrix for all others."
        ),
    ] = AUTO,
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of the scheme, like init=k-means++ or clip=mse.", metavar="NAME=VALUE"),
    ] = None,
    levels_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"How levels are stored: {', '.join(LEVELS_DTYPES)}. float32 with --scheme, else float16.",
            show_default=False,
        ),
    ] = None,
    importance: Importance = None,
    outliers: Annotated[
        float,
        typer.Option(
            help="The share of each weight, like 0.001, that keeps in float16 what its codes lose: 32 bits "
            "for each of these."
        ),
    ] = 0.0,
    embeddings: Annotated[bool, typer.Option(help="Quantize embeddings too.")] = True,
    heads: Annotated[bool, typer.Option(help="Quantize task heads too.")] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(help=f"Quantize only what matches. {_MATCH}", metavar="PATTERN"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help=f"Keep what matches in full precision. {_MATCH}", metavar="PATTERN"),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(help=f"Quantize these bare parameters as well. {_MATCH}", metavar="PATTERN"),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="Other settings for what matches, like '*embeddings* bits=8 groups=row', or "
            "'*.query scheme=lq options.affine=true'; of two rules that match, the later counts.",
            metavar="'PATTERN NAME=VALUE ...'",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    config: PlanFile = None,
) -> LexibitConfig:
    best = LexibitConfig.recommended(bits)
    if scheme is None:
        groups = groups if typed(context, "groups") else best.groups
        levels_dtype = levels_dtype or best.levels_dtype
    asked = LexibitConfig(
        scheme=scheme or best.scheme,
        bits=bits,
        groups=groups,
        options=settings_by_name(option),
        levels_dtype=levels_dtype or "float32",
        importance=importance,
        outliers=outliers,
        embeddings=embeddings,
        heads=heads,
        include=include or [],
        exclude=exclude or [],
        parameters=parameters or [],
        rules=dict(map(_rule, rule or [])),
        seed=seed,
    )
    if config is None:
        return asked
    given = [name for name in inspect.signature(_config).parameters if typed(context, name)]
    if len(given) > 1:
        others = ", ".join(f"--{name.replace('_', '-')}" for name in given if name != "config")
        raise LexibitError(f"--config {config} says all: leave {others} out")
    return _config_in(config)


def config_of(context: typer.Context) -> LexibitConfig:
    """What the options in a command that was parsed ask for.

    Raises:
        LexibitError: they are no configuration.
    """
    given = {
        name: context.params[name] for name in inspect.signature(_config).parameters if name != "context"
    }
    return _config(context, **given)


def typed(context: typer.Context, name: str) -> bool:
    """Whether an option stands in the command, and is not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _config_in(file: Path) -> LexibitConfig:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LexibitError(f"{file}: no JSON file that can be read: {error}") from error
    if not isinstance(settings, dict):
        raise LexibitError(f'{file}: holds no settings by name, like {{"bits": 3}}')
    if SEARCH in settings and isinstance(settings.get("config"), dict):
        settings = settings["config"]  # a plan also tells how it was found
    return LexibitConfig(**settings)


def settings_by_name(texts: list[str] | None) -> dict[str, Any]:
    """What NAME=VALUE options say."""
    return dict(map(_setting, texts or []))


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise LexibitError(f"{text!r}: write NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _rule(text: str) -> tuple[str, dict[str, Any]]:
    try:
        pattern, *settings = shlex.split(text) or [""]
    except ValueError as error:
        raise LexibitError(f"rule {text!r}: {error}: write it like '*.query bits=3'") from error
    if not settings:
        raise LexibitError(f"rule {text!r}: write a pattern, then NAME=VALUE, like '*.query bits=3'")
    rule: dict[str, Any] = {}
    for name, value in map(_setting, settings):
        if name.startswith("options."):
            rule.setdefault("options", {})[name.removeprefix("options.")] = value
        else:
            rule[name] = value
    return pattern, rule


def takes(**makers: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of some makers, and hand it what they make under these names."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        theirs = {name: inspect.signature(make, eval_str=True).parameters for name, make in makers.items()}

        @wraps(command)
        def wrapper(**values: Any) -> None:
            made = {}
            for name, make in makers.items():
                made[name] = make(**{option: values[option] for option in theirs[name]})
            kept = {option: value for option, value in values.items() if option in own.parameters}
            command(**kept | made)

        kept = [parameter for name, parameter in own.parameters.items() if name not in makers]
        merged = {p.name: p for p in kept if p.default is p.empty}
        merged |= {option: p for options in theirs.values() for option, p in options.items()}
        merged |= {p.name: p for p in kept if p.default is not p.empty}
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in merged.values()]
        wrapper.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del wrapper.__wrapped__
        return wrapper

    return decorate


def _search(config: PlanFile = None) -> Path | None:
    """The plan file, if it tells how it was found."""
    return config if config is not None and SEARCH in json.loads(config.read_text("utf-8")) else None


takes_config = takes(config=_config)
takes_plan = takes(config=_config, search=_search)
