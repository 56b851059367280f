"""``lexibit search``: how much each weight's error should count."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.live import Live
from rich.table import Table

from lexibit import __version__, checkpoint, tasks
from lexibit.cli.measures import BatchSize, Compute, Data, Text
from lexibit.cli.options import Model, takes_config, typed
from lexibit.cli.show import Json, console, errors, number, print_json, table
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError, needs_extra, unknown
from lexibit.fidelity import Reference
from lexibit.files import write_json
from lexibit.ops import COMPUTE

if TYPE_CHECKING:
    from lexibit.search import Found, Problem
    from lexibit.search.allocation import Option
    from lexibit.search.trials import Trial

_TRIALS = {"model-wise": 50, "layer-wise": 20}
_LIMIT = 512


@takes_config
def search(
    context: typer.Context,
    model: Model,
    config: LexibitConfig,
    out: Annotated[Path, typer.Option(help="The new plan file, for lexibit quantize --plan.")],
    task: Annotated[
        str | None,
        typer.Option(help=f"Search on training data of a task: {', '.join(tasks.names(tasks.Trainable))}."),
    ] = None,
    text: Text = None,
    data: Data = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="How importances are searched: manual, model-wise or layer-wise; model-wise if not given, "
            "and not at all with --budget alone."
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Choose the bits of each layer, 1 to 6, in place of --bits, so that weights take so many "
            "stored bits in the mean, levels and all.",
            min=0,
        ),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(
            help="With --budget: so many trials of bits on the whole model, the first of them with the bits "
            "chosen layer by layer; none if not given.",
            min=1,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Trials; layer-wise, of each layer. If not given, 50 model-wise and 20 a layer.", min=1
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="With --task: loss, or metric, on training data; the loss if not given."),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            help="Training examples at most, a sample by --seed, or of running text the first; or texts.",
            min=1,
        ),
    ] = _LIMIT,
    dev_limit: Annotated[
        int | None, typer.Option(help="Held-out examples at most; all if not given.", min=1)
    ] = None,
    batch_size: BatchSize = 32,
    compute: Compute = "float32",
    sampler: Annotated[
        str | None, typer.Option(help="gp (Gaussian process) or tpe; gp if not given.")
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="The name of the search in the storage; the name of --out if not given."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="An Optuna storage URL; a SQLite file beside --out if not given.", metavar="URL"),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Also draw the history, what mattered and what layers got, as SVG in this folder."),
    ] = None,
    json: Json = False,
) -> None:
    """Search how much the errors of weights should count, as E, C and P, and the bits of each layer.

    Begins with no importance and with sixteen sets that were found by hand; a Gaussian process goes on from
    there. A search that was killed goes on when the same command is given again, and another process that
    names the same --study and --storage helps it. Held-out scores are measured at the end, never searched on.

    [bold]Examples[/]

    lexibit search ./my-bert-mrpc --scheme binary --bits 3 --task mrpc --data ./glue --out plan.json

    lexibit search ./my-bert --bits 2 --text my.txt --mode layer-wise --out plan.json

    lexibit search ./my-bert-mrpc --budget 3 --groups row --task mrpc --data ./glue --out plan.json
    """
    with needs_extra("search"):
        import optuna

        from lexibit import search as searching
        from lexibit.search.objective import KINDS, Distance, Measured, on_task
        from lexibit.search.trials import SAMPLERS, finished
        from lexibit.search.trials import storage as opened
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if (task is None) == (text is None):
        raise LexibitError("give either --task NAME, to search on its training data, or --text FILE")
    if mode is None and budget is None:
        mode = "model-wise"
    _check("mode", mode, searching.MODES)
    _check("objective", objective, KINDS)
    _check("sampler", sampler, SAMPLERS)
    _check("compute", compute, COMPUTE)
    _refuse_idle("--task", task is None, {"objective": objective, "data": data, "dev-limit": dev_limit})
    _refuse_idle("--budget", budget is None, {"refine": refine})
    _refuse_idle("--mode model-wise or layer-wise", mode in (None, "manual"), {"trials": trials})
    _refuse_idle(
        "--mode model-wise or layer-wise, or --refine",
        mode in (None, "manual") and refine is None,
        {"sampler": sampler},
    )
    if budget is not None and typed(context, "bits"):
        raise LexibitError("--budget chooses the bits of each layer: leave --bits out")
    if out.exists():
        raise LexibitError(f"{out}: exists already: choose another file, or remove it first")
    if not out.absolute().parent.is_dir():
        raise LexibitError(f"{out}: its folder does not exist: make it first")
    if storage is None and out.suffix == ".db":
        raise LexibitError(f"{out}: is where the trials are kept: call the plan otherwise, or give --storage")
    if figures is not None and figures.exists() and not figures.is_dir():
        raise LexibitError(f"--figures {figures}: is a file: name a folder")
    chosen = None if task is None else tasks.trainable(task)
    folder = checkpoint.find(model)
    if not folder.is_dir():
        raise LexibitError(f"{model}: a search runs the model: give its folder, not a file of weights")
    loaded, tokenizer = checkpoint.load_float(folder), checkpoint.load_tokenizer(folder)
    measured: Measured
    examples: tasks.Examples
    held: tasks.Examples = []
    if chosen is None:
        examples = checkpoint.read_texts(cast(Path, text), limit)
        measured = Distance(Reference(loaded, tokenizer, examples, batch_size=batch_size))
    else:
        examples = chosen.load(data, "train", limit=limit, seed=config.seed)
        held = chosen.load(data, "dev", limit=dev_limit, seed=config.seed)
        measured = on_task(objective or "loss", chosen, loaded, tokenizer, examples, batch_size=batch_size)
    problem = searching.Problem(loaded, config, measured, compute=compute)
    if not math.isfinite(problem.float_value):
        raise LexibitError(
            f"the float model's {measured.name} is {problem.float_value}: there is nothing to search for"
        )
    searching.check_mode(mode, problem)
    if budget is not None:
        searching.check_budget(budget, problem)
    settings = {
        "version": __version__,
        "model_sha256": searching.fingerprint(loaded, tokenizer),
        "config": config.to_dict(),
        "task": task,
        "objective": measured.name,
        "examples_sha256": tasks.digest(examples),
        "batch_size": batch_size,
        "compute": compute,
    }
    start = time.perf_counter()
    # only now, so that what is refused leaves no empty database
    url = storage or f"sqlite:///{out.with_suffix('.db')}"
    where, named = opened(url), study or out.stem
    if not json and (there := finished(where, named)):
        errors.print(f"study {named!r}: finished trials there from before: {there}", highlight=False)
    view = _View(str(out), measured.name, [layer.name for layer in problem.layers])
    with Live(view.table(), console=console, transient=True) if _shown(json) else nullcontext() as live:

        def seen(stage: str, trial: Trial) -> None:
            view.add(stage, trial)
            if live is not None:
                live.update(view.table())
            elif not json:
                errors.print(view.line(), highlight=False, soft_wrap=True)

        proposing: Any = {
            "study": named,
            "where": where,
            "seed": config.seed,
            "sampler": sampler or "gp",
            "settings": settings,
            "seen": seen,
        }
        options: dict[str, list[Option]] = {}
        bits: dict[str, int] = {}
        same: dict[str, int] = {}
        first: dict[str, list[Trial]] = {}
        if budget is not None:
            options, first[searching.ALONE] = searching.sensitivities(problem, **proposing)
            bits = searching.under(options, budget, problem)
            same = searching.uniform(options, budget, problem)
        if budget is not None and refine is not None:
            bits, first[searching.REFINEMENT] = searching.refine(
                options, budget, problem, refine, **proposing
            )
        count = trials or _TRIALS.get(mode or "", 1)
        found = searching.search(problem, mode, count, bits=bits, before=same, **proposing)
        found = replace(found, stages=first | found.stages)
    report = {
        "seconds": time.perf_counter() - start,
        "model": model,
        "mode": mode,
        "budget": budget,
        "bits_per_weight": problem.bits_per_weight(found.settings),
        "start_bits_per_weight": problem.bits_per_weight(found.before),
        "sensitivities": {name: [one._asdict() for one in some] for name, some in options.items()},
        "objective": measured.name,
        "compute": compute,
        "task": task,
        "examples": len(examples),
        "seed": config.seed,
        "float": problem.float_value,
        "start": found.start,
        "found": found.value,
        "settings": {name: asdict(one) for name, one in found.settings.items()},
        "held_out": chosen
        and searching.held_out(problem, found, chosen, tokenizer, held, batch_size=batch_size),
        "stages": {name: [asdict(trial) for trial in done] for name, done in found.stages.items()},
    }
    write_json(out, {"config": problem.result(found.settings).to_dict(), "search": report})
    if figures is not None:
        searching.draw(found, measured.name, figures)
    if json:
        print_json({"out": str(out)} | report)
        return
    _print(out, problem, found, report)


def _shown(json: bool) -> bool:
    return not json and console.is_terminal


def _check(option: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise unknown(f"--{option}", value, known)


def _refuse_idle(needed: str, missing: bool, options: dict[str, object]) -> None:
    """Refuse options that would count for nothing."""
    for name, value in options.items():
        if missing and value is not None:
            raise LexibitError(f"--{name} goes with {needed}: leave it out, or give that")


class _View:
    """The latest trials, and the best of each stage."""

    def __init__(self, title: str, objective: str, layers: list[str]) -> None:
        self._title, self._objective, self._layers = title, objective, layers
        self._rows: list[tuple[str, Trial, float]] = []

    def add(self, stage: str, trial: Trial) -> None:
        before = [best for name, _, best in self._rows if name == stage]
        values = [value for value in (*before[-1:], trial.value) if math.isfinite(value)]
        # single layers are measured, and none of them is better than another
        compared = "layer" not in trial.parameters
        self._rows.append((stage, trial, min(values, default=math.nan) if compared else math.nan))

    def table(self) -> Table:
        shown = table(self._title, "stage", "#trial", "tried", f"#{self._objective}", "#best", "#s")
        for row in self._rows[-10:]:
            shown.add_row(*self._cells(*row))
        return shown

    def line(self) -> str:
        """The latest trial, for where no table can be drawn anew."""
        stage, trial, tried, value, best, seconds = self._cells(*self._rows[-1])
        return f"{stage}, trial {trial}: {tried}: {self._objective} {value}, best {best}, {seconds} s"

    def _cells(self, stage: str, trial: Trial, best: float) -> tuple[str, ...]:
        value = number(trial.value, ".5f") if trial.fault is None else "failed"
        tried = self._tried(trial.parameters)
        return stage, str(trial.number), tried, value, number(best, ".5f"), f"{trial.seconds:.1f}"

    def _tried(self, parameters: Mapping[str, float]) -> str:
        if "layer" in parameters:
            return f"{self._layers[round(parameters['layer'])]} in {parameters['bits']:.0f} bits"
        if "1-C" in parameters:
            return ", ".join(f"{name} {parameters[name]:.3g}" for name in ("E", "1-C", "P"))
        return "bits of all layers"


def _print(out: Path, problem: Problem, found: Found, report: dict[str, Any]) -> None:
    from lexibit.search.space import spelling

    shown = table(str(out), "layer", "#bits", "#E", "#C", "#P", "#weights")
    for layer in problem.layers:
        one = found.settings[layer.name].importance
        bits = {weight.spec.bits for weight in layer.weights}
        chosen = found.settings[layer.name].bits
        row = [", ".join(map(str, sorted(bits))) if chosen is None else str(chosen)]
        row += ["-"] * 3 if spelling(one) is None else [f"{one.E:g}", f"{one.C:.9g}", f"{one.P:g}"]
        shown.add_row(layer.name, *row, f"{layer.size:,}")
    console.print(shown)
    failed = [trial for done in found.stages.values() for trial in done if trial.fault is not None]
    count = sum(map(len, found.stages.values()))
    before = "no importance" if report["budget"] is None else "no importance, the same bits for all layers"
    console.print(
        f"{report['objective']}: float {number(problem.float_value, '.5f')}; {before} "
        f"{number(found.start, '.5f')} at {report['start_bits_per_weight']:.3f} stored bits a weight; found "
        f"{number(found.value, '.5f')} at {report['bits_per_weight']:.3f}; {count} trials"
        + (f", {len(failed)} failed: {failed[0].fault}" if failed else ""),
        highlight=False,
    )
    held = report["held_out"]
    for place, gain in enumerate(held["differences"] if held else []):
        values = [held["scores"][name][place]["value"] for name in ("float", "start", "found")]
        spread = f"{number(gain['low'], '+.2f')} to {number(gain['high'], '+.2f')}"
        console.print(
            f"held out, {gain['metric']}: float {number(values[0])}; {before} {number(values[1])}; "
            f"found {number(values[2])}; difference {number(gain['value'], '+.2f')} ({spread}, "
            f"p {number(gain['p'], '.3f')})",
            highlight=False,
        )
