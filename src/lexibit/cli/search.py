"""``lexibit search``: how much each weight's error should count."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.live import Live
from rich.table import Table

from lexibit import __version__, checkpoint, tasks
from lexibit.cli.measures import BatchSize, Compute, Data, Text
from lexibit.cli.options import Model, takes_config
from lexibit.cli.show import Json, console, number, print_json, table
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError, needs_extra, unknown
from lexibit.fidelity import Reference
from lexibit.files import write_json
from lexibit.ops import COMPUTE

if TYPE_CHECKING:
    from lexibit.search import Found, Problem
    from lexibit.search.trials import Trial

_TRIALS = {"model-wise": 50, "layer-wise": 20}
_LIMIT = 512


@takes_config
def search(
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
            "stored bits in the mean.",
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
        from lexibit.search.objective import Distance, Measured, on_task
        from lexibit.search.trials import storage as opened
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if (task is None) == (text is None):
        raise LexibitError("give either --task NAME, to search on its training data, or --text FILE")
    if mode is None and budget is None:
        mode = "model-wise"
    _check_mode(mode)
    _refuse_idle("--task", task is None, {"objective": objective, "data": data, "dev-limit": dev_limit})
    _refuse_idle("--budget", budget is None, {"refine": refine})
    _refuse_idle("--mode model-wise or layer-wise", mode in (None, "manual"), {"trials": trials})
    _refuse_idle(
        "--mode model-wise or layer-wise, or --refine",
        mode in (None, "manual") and refine is None,
        {"sampler": sampler},
    )
    _refuse_idle("--mode or --refine", mode is None and refine is None, {"study": study, "storage": storage})
    if compute not in COMPUTE:
        raise unknown("--compute", compute, COMPUTE)
    if out.exists():
        raise LexibitError(f"{out}: exists already: choose another file, or remove it first")
    if not out.absolute().parent.is_dir():
        raise LexibitError(f"{out}: its folder does not exist: make it first")
    searched = mode is not None or refine is not None
    where = opened(storage or f"sqlite:///{out.with_suffix('.db')}") if searched else None
    folder = checkpoint.find(model)
    if not folder.is_dir():
        raise LexibitError(f"{model}: a search runs the model: give its folder, not a file of weights")
    loaded, tokenizer = checkpoint.load_float(folder), checkpoint.load_tokenizer(folder)
    chosen = None if task is None else tasks.trainable(task)
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
    options = {} if budget is None else searching.sensitivities(problem, progress=_shown(json))
    bits = {} if budget is None else searching.under(options, budget, problem)
    view = _View(str(out), measured.name)
    with Live(view.table(), console=console, transient=True) if _shown(json) else nullcontext() as live:

        def seen(stage: str, trial: Trial) -> None:
            view.add(stage, trial)
            if live is not None:
                live.update(view.table())

        proposing: Any = {
            "study": study or out.stem,
            "where": where,
            "seed": config.seed,
            "sampler": sampler or "gp",
            "settings": settings,
            "seen": seen,
        }
        first = {}
        if budget is not None and refine is not None:
            bits, tried = searching.refine(options, budget, problem, refine, **proposing)
            first = {searching.REFINEMENT: tried}
        count = trials or _TRIALS.get(mode or "", 1)
        found = searching.search(problem, mode, count, bits=bits, **proposing)
        found = replace(found, stages=first | found.stages)
    report = {
        "seconds": time.perf_counter() - start,
        "model": model,
        "mode": mode,
        "budget": budget,
        "bits_per_weight": problem.bits_per_weight(found.settings),
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


def _check_mode(mode: str | None) -> None:
    from lexibit.search import MODES

    if mode is not None and mode not in MODES:
        raise unknown("--mode", mode, MODES)


def _refuse_idle(needed: str, missing: bool, options: dict[str, object]) -> None:
    """Refuse options that would count for nothing."""
    for name, value in options.items():
        if missing and value is not None:
            raise LexibitError(f"--{name} goes with {needed}: leave it out, or give that")


class _View:
    """The latest trials, and the best of each stage."""

    def __init__(self, title: str, objective: str) -> None:
        self._title, self._objective = title, objective
        self._rows: list[tuple[str, Trial, float]] = []

    def add(self, stage: str, trial: Trial) -> None:
        before = [best for name, _, best in self._rows if name == stage]
        values = [value for value in (*before[-1:], trial.value) if math.isfinite(value)]
        self._rows.append((stage, trial, min(values, default=math.nan)))

    def table(self) -> Table:
        shown = table(
            self._title, "stage", "#trial", "#E", "#1-C", "#P", f"#{self._objective}", "#best", "#s"
        )
        for stage, trial, best in self._rows[-10:]:
            # a trial of bits has none of these
            tried = [
                f"{trial.parameters[name]:.3g}" if name in trial.parameters else ""
                for name in ("E", "1-C", "P")
            ]
            value = number(trial.value, ".5f") if trial.fault is None else "failed"
            shown.add_row(
                stage, str(trial.number), *tried, value, number(best, ".5f"), f"{trial.seconds:.1f}"
            )
        return shown


def _print(out: Path, problem: Problem, found: Found, report: dict[str, Any]) -> None:
    shown = table(str(out), "layer", "#bits", "#E", "#C", "#P", "#weights")
    for layer in problem.layers:
        one = found.settings[layer.name].importance
        bits = {weight.spec.bits for weight in layer.weights}
        chosen = found.settings[layer.name].bits
        row = [", ".join(map(str, sorted(bits))) if chosen is None else str(chosen)]
        shown.add_row(layer.name, *row, f"{one.E:g}", f"{one.C:g}", f"{one.P:g}", f"{layer.size:,}")
    console.print(shown)
    failed = [trial for done in found.stages.values() for trial in done if trial.fault is not None]
    count = sum(map(len, found.stages.values()))
    console.print(
        f"{report['objective']}: float {number(problem.float_value, '.5f')}, as configured "
        f"{number(found.start, '.5f')}, found {number(found.value, '.5f')} at "
        f"{report['bits_per_weight']:.3f} stored bits a weight; {count} trials"
        + (f", {len(failed)} failed: {failed[0].fault}" if failed else ""),
        highlight=False,
    )
    held = report["held_out"]
    for place, gain in enumerate(held["differences"] if held else []):
        values = [held["scores"][name][place]["value"] for name in ("float", "start", "found")]
        spread = f"{number(gain['low'], '+.2f')} to {number(gain['high'], '+.2f')}"
        console.print(
            f"held out, {gain['metric']}: float {number(values[0])}, as configured {number(values[1])}, "
            f"found {number(values[2])}; difference {number(gain['value'], '+.2f')} ({spread}, "
            f"p {number(gain['p'], '.3f')})",
            highlight=False,
        )
