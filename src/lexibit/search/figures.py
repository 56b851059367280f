"""What a search found, to look at: its history, what mattered, and what each layer got, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from matplotlib.figure import Figure
from optuna.distributions import FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from lexibit.search.bits import ALONE
from lexibit.search.modes import MODEL, Found
from lexibit.search.space import RANGES
from lexibit.search.trials import Trial

# text stays text, and the same search gives the same bytes
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "lexibit", "font.size": 9.0, "axes.grid": True}
_BLUE, _ORANGE, _GREY = "#2f6fb0", "#d9822b", "#9aa5b1"


def draw(found: Found, objective: str, folder: Path) -> list[Path]:
    """Draw a search into a folder.

    Args:
        found: the search.
        objective: what was made small.
        folder: where files go; made if it is not there.

    Returns:
        ``history.svg``, the objective of every trial and the least so far; ``importance.svg``, how much of
        what the objective did each of E, 1-C and P explains in the trials of the whole model (fANOVA,
        Hutter et al. 2014, by Optuna), if it did anything; ``layers.svg``, what each layer got.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    with matplotlib.rc_context(_STYLE):
        # what single layers do is no step towards what all do
        stages = {name: trials for name, trials in found.stages.items() if name != ALONE}
        if stages:
            with _figure(folder / "history.svg", made, 9, 3.2) as figure:
                _history(figure.subplots(), stages, objective)
        shares = _shares(found.stages.get(MODEL, []))
        if shares:
            with _figure(folder / "importance.svg", made, 5, 1.8) as figure:
                axes = figure.subplots()
                axes.barh(list(shares), list(shares.values()), color=_BLUE)
                axes.set_xlabel(f"share of the variance of the {objective} (fANOVA)")
                axes.set_xlim(0, 1)
        with _figure(folder / "layers.svg", made, 9, 0.9 + 0.28 * len(found.settings)) as figure:
            _layers(figure, found)
    return made


@contextmanager
def _figure(file: Path, made: list[Path], width: float, height: float) -> Iterator[Figure]:
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    figure.savefig(file, metadata={"Date": None})
    made.append(file)


def _history(axes: Any, stages: Mapping[str, list[Trial]], objective: str) -> None:
    first = 0
    least: list[tuple[int, float]] = []
    for stage, trials in stages.items():
        good = [trial for trial in trials if trial.fault is None]
        axes.scatter([first + one.number for one in good], [one.value for one in good], s=9, color=_GREY)
        for trial in good:
            value = min(trial.value, least[-1][1]) if least else trial.value
            least.append((first + trial.number, value))
        if first:
            axes.axvline(first - 0.5, color=_GREY, linewidth=0.6)
        if len(stages) > 1:
            axes.annotate(
                stage, (first, 1), xycoords=("data", "axes fraction"), rotation=30, fontsize=7, va="bottom"
            )
        first += len(trials)
    axes.step(*zip(*least, strict=True), where="post", color=_ORANGE, label="least so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(objective)
    axes.legend(loc="upper right")


def _shares(trials: Sequence[Trial]) -> dict[str, float]:
    good = [trial for trial in trials if trial.fault is None]
    if len({trial.value for trial in good}) < 2:
        return {}
    study = optuna.create_study()
    space = {name: FloatDistribution(low, high, log=log) for name, (low, high, log) in RANGES.items()}
    for trial in good:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.parameters), distributions=dict(space), value=trial.value
            )
        )
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: found.get(name, 0.0) for name in list(RANGES)[::-1]}


def _layers(figure: Figure, found: Found) -> None:
    names = list(found.settings)
    chosen = list(found.settings.values())
    columns = {
        "E": [one.importance.E for one in chosen],
        "1 - C": [1 - one.importance.C for one in chosen],
        "P": [one.importance.P for one in chosen],
    }
    if any(one.bits is not None for one in chosen):
        columns["bits"] = [float(one.bits or 0) for one in chosen]
    for axes, (title, values) in zip(
        figure.subplots(1, len(columns), sharey=True), columns.items(), strict=True
    ):
        axes.barh(names, values, color=_ORANGE if title == "bits" else _BLUE)
        axes.set_title(title, fontsize=9)
        axes.ticklabel_format(axis="x", style="plain")
        axes.margins(x=0.1)
        # the first layer on top
        axes.set_ylim(len(names) - 0.4, -0.6)
