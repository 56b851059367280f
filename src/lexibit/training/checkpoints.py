"""The folder of a run's checkpoints: whose it is, and what of it a run that was killed goes on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lexibit.errors import LexibitError
from lexibit.files import to_json, write_json
from lexibit.processes import ended, here, me

_STATE = "trainer_state.json"
_RUN, _PROCESS = "run.json", "process"


def start(work: Path, run: dict[str, Any]) -> None:
    """Make the folder of a run's checkpoints, or see that it can go on from those that are there.

    Raises:
        LexibitError: checkpoints of another run are there, or another process is at work.
    """
    said = work / _RUN
    run = json.loads(to_json(run))
    before = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
    process = before.pop(_PROCESS, None)
    if process is not None and process != me() and here(process) and not ended(process):
        raise LexibitError(
            f"{work}: another process is training there ({process.split()[1]}): wait for it, or "
            "choose another folder"
        )
    if last(work) is None:
        # a run that came to no checkpoint is in nobody's way
        if work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True)
    elif found := list(differences(before, run)):
        raise LexibitError(
            f"{work}: holds checkpoints of a run in which {'; '.join(found)}: go on with what it had, or "
            "remove the folder to start afresh"
        )
    for folder in work.glob("checkpoint-*"):
        if not _is_whole(folder):
            shutil.rmtree(folder)
    write_json(said, run | {_PROCESS: me()})


def check_free(work: Path) -> None:
    """Refuse a place for checkpoints in which something else is."""
    if not work.exists():
        return
    # another process of this run may be about to write its first file, under a name with a dot
    if not work.is_dir() or (any(work.glob("[!.]*")) and not (work / _RUN).is_file()):
        raise LexibitError(f"{work}: is in the way of checkpoints: remove it, or choose another folder")


def last(work: Path) -> Path | None:
    """The checkpoint that a run goes on from, if there is one."""
    whole = filter(_is_whole, work.glob("checkpoint-*"))
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """How a run differs from an earlier one."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new)
        elif name == "examples_sha256" and old != new:
            yield "the examples were others"
        elif old != new:
            yield f"{name} was {old}, not {new}"


def _is_whole(checkpoint: Path) -> bool:
    try:
        # the Trainer writes its state last
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def had_ended(checkpoint: Path) -> bool:
    """Whether the run whose checkpoint it is had made its last step."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    stopped = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
    return bool(stopped) or state["global_step"] >= state["max_steps"]
