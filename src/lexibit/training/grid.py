"""The best of several settings, by the score on the evaluation examples."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lexibit.checkpoint.target import TRAINING
from lexibit.errors import LexibitError, needs_extra
from lexibit.files import exists_already, write_json
from lexibit.training.settings import Settings

GRID = "grid"  # what the report calls it


def best_of(grid: Sequence[Settings], once: Callable[[Settings, Path, bool], Any], out: Path) -> Any:
    """Train with each of some settings, which differ in their learning rate, and keep the best model.

    The best is that of the best score by the first metric, and of equal ones the first. It was chosen on the
    evaluation examples, so that its score is a little too good; the report (``training.json``) has the scores
    of all under ``grid``. Models stand in ``OUT.grid`` until all are trained; a run that was killed goes on
    with what is there.

    Args:
        grid: the settings; of a single one nothing is chosen.
        once: trains with settings to a folder, which may hold the result of a run that was killed later if
            the last argument is true; gives what training gave.
        out: the new folder.

    Raises:
        LexibitError: ``out`` exists, two learning rates are the same, or training fails.
    """
    if len(grid) == 1:
        return once(grid[0], out, False)
    work = out.with_name(f"{out.name}.{GRID}")
    rates = [settings.learning_rate for settings in grid]
    if len(set(rates)) < len(rates):
        raise LexibitError(f"the learning rates {', '.join(map(str, rates))} are not all different")
    folders = [work / str(rate) for rate in rates]
    if out.exists():
        if _chosen_from(out) == rates:
            # what a kill behind the last step left
            _remove(folders)
        raise exists_already(out)
    for other in work.iterdir() if work.is_dir() else []:
        if not other.name.startswith(".") and not _is_rate(other.name.removesuffix(".training")):
            raise LexibitError(
                f"{other}: is in the way of models in training: remove it, or choose another folder"
            )
    trained = [once(settings, folder, True) for settings, folder in zip(grid, folders, strict=True)]
    first = [done.scores[0] for done in trained]
    worth = [score.value if score.higher else -score.value for score in first]
    # NaN is worth least
    best = max(range(len(grid)), key=lambda place: (worth[place] == worth[place], worth[place], -place))
    with needs_extra("tasks"):
        from accelerate import PartialState
    PartialState().wait_for_everyone()
    if not PartialState().is_main_process:
        return trained[best]
    report = folders[best] / TRAINING[0]
    said = json.loads(report.read_text(encoding="utf-8"))
    scores = [{"learning_rate": rate, "score": score.value} for rate, score in zip(rates, first, strict=True)]
    write_json(report, said | {GRID: scores})
    os.replace(folders[best], out)
    _remove(folders)
    return trained[best]


def _chosen_from(out: Path) -> list[float] | None:
    """The learning rates that the model in a folder was chosen from, if it was chosen."""
    try:
        said = json.loads((out / TRAINING[0]).read_text(encoding="utf-8"))[GRID]
        return [one["learning_rate"] for one in said]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_rate(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _remove(folders: Sequence[Path]) -> None:
    """Remove models that were not chosen, and the folder that held them if nothing else is in it."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folders[0].parent.rmdir()
