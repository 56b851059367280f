"""Trials of a search, kept in a database: resumed after a kill, and shared by many processes."""

from __future__ import annotations

import hashlib
import math
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from lexibit.errors import LexibitError, unknown
from lexibit.processes import ended, here, me

Parameters = Mapping[str, float]
Ranges = Mapping[str, tuple[float, float, bool]]

SAMPLERS = ("gp", "tpe")

_WORKER, _BEGAN, _PLACE, _CLAIM, _FAULT = "worker", "began", "place", "claim", "fault"
_SETTINGS = "settings"
_ATTEMPTS = 10  # at making a database that another process may be making
_SILENT = 600.0  # seconds that a trial of another machine may always take
_POLL = 0.5
_DIGEST = "_sha256"


@dataclass(frozen=True)
class Trial:
    """One trial that counts.

    Attributes:
        number: its place among those that count.
        parameters: what was tried.
        value: of the objective, less is better; NaN if it failed.
        seconds: that it took.
        fault: why it failed.
    """

    number: int
    parameters: Parameters
    value: float
    seconds: float
    fault: str | None = None


def storage(url: str) -> optuna.storages.BaseStorage:
    """The database that an Optuna storage URL names, like ``sqlite:///search.db``; made if it is not there.

    Raises:
        LexibitError: it cannot be reached.
    """
    # seconds that a process waits for another one's writing
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    with _answering(url):
        for attempt in range(1, _ATTEMPTS):
            try:
                return optuna.storages.RDBStorage(url, engine_kwargs=engine)
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                if not _made_by_another(error):
                    raise
                time.sleep(0.1 * attempt)
        return optuna.storages.RDBStorage(url, engine_kwargs=engine)


def finished(where: optuna.storages.BaseStorage, study: str) -> int:
    """How many trials of a search are finished and count, those of all its stages."""
    with _answering(study):
        names = [one.study_name for one in optuna.get_all_study_summaries(where)]
        trials = [
            trial
            for name in names
            if name.startswith(f"{study}/")
            for trial in optuna.load_study(study_name=name, storage=where).get_trials(deepcopy=False)
        ]
    return sum(trial.state.is_finished() and not _killed(trial) for trial in trials)


class Trials:
    """The trials of one study: what was tried, and what to try next.

    A trial counts when its objective has a value, or failed by an error of its own. One whose process was
    killed does not: the next process tries the same again. What is tried at the n-th place depends on the
    seed, on n, and on the trials that are finished: so a search that was broken off ends where an unbroken
    one does, if one process at a time worked on it, on one machine.

    Several processes may work on one study at once: each takes the first place that is free, and of two that
    reach for the same one, one gets it. A process of this machine is known to be gone when it is; one of
    another machine when its trial takes twenty times as long as any that succeeded, and ten minutes at least.

    Args:
        study: its name, which users give.
        stage: of the search; each is a study of its own in the storage, called ``study/stage``.
        where: its storage.
        ranges: by parameter: smallest and largest value, and whether it is drawn evenly in its logarithm.
        starts: what is tried first.
        seed: of the sampler.
        sampler: ``gp`` (Gaussian process) or ``tpe``.
        settings: all else that values depend on: a study that is there must have been made with the same.

    Raises:
        LexibitError: the study that is there has other settings, or the storage cannot be used.
    """

    def __init__(
        self,
        study: str,
        stage: str,
        where: optuna.storages.BaseStorage,
        ranges: Ranges,
        starts: Sequence[Parameters],
        *,
        seed: int = 0,
        sampler: str = "gp",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        self._named = f"study {study!r}, {stage}"
        self._seed, self._kind, self._starts = seed, sampler, list(starts)
        self._ranges = dict(ranges)
        self._space: dict[str, BaseDistribution] = {
            key: FloatDistribution(low, high, log=log) for key, (low, high, log) in ranges.items()
        }
        self._given = _Given()
        with _answering(self._named):
            self._study = optuna.create_study(
                storage=where, study_name=f"{study}/{stage}", sampler=self._given, load_if_exists=True
            )
            self._settle(dict(settings or {}) | {"seed": seed, "sampler": sampler})

    def _settle(self, settings: dict[str, Any]) -> None:
        before = self._study.user_attrs.get(_SETTINGS)
        if before is None:
            self._study.set_user_attr(_SETTINGS, settings)
            return
        if differing := next(_differing(before, settings), None):
            raise LexibitError(
                f"{self._named}: was begun with {differing}: go on with what it had, or name another --study"
            )

    def run(
        self,
        objective: Callable[[Parameters], float],
        count: int,
        *,
        seen: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        """Try until ``count`` trials count, those of other processes included.

        Args:
            objective: of the parameters; less is better. An error of lexibit's, or a value that is not
                finite, is a failed trial, and the search goes on.
            count: how many trials.
            seen: is told of every trial of this process.

        Raises:
            LexibitError: the storage cannot be used.
        """
        while True:
            self._bury()
            places = self._places()
            free = next((place for place in range(count) if place not in places), None)
            if free is None:
                if all(places[place].state.is_finished() for place in range(count)):
                    return
                time.sleep(_POLL)  # another process is at the last ones
            elif (found := self._one(free, objective)) is not None:
                seen(found)

    def _claim(self, place: int) -> FrozenTrial | None:
        """Take a place, unless another process was faster."""
        claim = uuid.uuid4().hex
        # the place comes with the trial in one write, so that the first of several to be written has it
        attributes = {_WORKER: me(), _BEGAN: time.time(), _PLACE: place, _CLAIM: claim}
        running = create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        with _answering(self._named):
            self._study.add_trial(running)
            mine = next(one for one in self._all() if one.user_attrs.get(_CLAIM) == claim)
        first = self._places().get(place)  # there is none if another machine's clock has given up ours
        if first is not None and first.number == mine.number:
            return mine
        self._fail(mine.number)
        return None

    def _one(self, place: int, objective: Callable[[Parameters], float]) -> Trial | None:
        """Make the trial of a place; None if another process makes it."""
        mine = self._claim(place)
        if mine is None:
            return None
        start = time.perf_counter()
        try:
            with _answering(self._named):
                self._given.parameters = self._propose(place, mine)
                trial = optuna.Trial(self._study, mine._trial_id)
                parameters = {
                    key: trial.suggest_float(key, low, high, log=log)
                    for key, (low, high, log) in self._ranges.items()
                }
            value, fault = _value(objective, parameters)
        except UpdateFinishedTrialError:  # given up by another machine meanwhile
            return None
        except BaseException:
            self._fail(mine.number)
            raise
        if fault is None:
            with _answering(self._named), suppress(UpdateFinishedTrialError):
                self._study.tell(mine.number, value, skip_if_finished=True)
        else:
            with _answering(self._named), suppress(UpdateFinishedTrialError):
                trial.set_user_attr(_FAULT, fault)
            self._fail(mine.number)
        return Trial(place, parameters, value, time.perf_counter() - start, fault)

    def _fail(self, number: int) -> None:
        """Give up a trial, if nobody else has."""
        with _answering(self._named), suppress(UpdateFinishedTrialError):
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _propose(self, place: int, trial: FrozenTrial) -> Parameters:
        """What to try at a place."""
        if place < len(self._starts):
            return self._starts[place]
        # of its own for every place, so that a resumed search draws what an unbroken one would
        seed = int.from_bytes(hashlib.sha256(f"{self._seed} {place}".encode()).digest()[:4], "little")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna's, about what it calls experimental
            sampler: BaseSampler = (
                GPSampler(seed=seed, deterministic_objective=True)
                if self._kind == "gp"
                else TPESampler(seed=seed, multivariate=True)
            )
            found = sampler.sample_relative(self._study, trial, self._space)
            return {
                key: found[key] if key in found else sampler.sample_independent(self._study, trial, key, one)
                for key, one in self._space.items()
            }

    def done(self, count: int) -> list[Trial]:
        """The trials that count and are finished, in order, the first ``count`` at most."""
        places = self._places()
        return [
            Trial(
                place,
                dict(trial.params),
                math.nan if trial.value is None else trial.value,
                trial.duration.total_seconds() if trial.duration else math.nan,
                trial.user_attrs.get(_FAULT),
            )
            for place, trial in sorted(places.items())
            if place < count and trial.state.is_finished()
        ]

    def best(self, count: int) -> Trial:
        """The trial of the least value among the first ``count``, the first of equal ones.

        Raises:
            LexibitError: all have failed.
        """
        done = self.done(count)
        good = [trial for trial in done if trial.fault is None]
        if not good:
            reason = f" ({done[0].fault})" if done else ""
            raise LexibitError(
                f"{self._named}: none of its {len(done)} trials succeeded{reason}: mend the cause, and "
                "name another --study, as these trials count"
            )
        return min(good, key=lambda trial: trial.value)

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _places(self) -> dict[int, FrozenTrial]:
        """The trial at each place that is taken: the first that was not given up."""
        found: dict[int, FrozenTrial] = {}
        with _answering(self._named):
            for trial in self._all():
                if _PLACE in trial.user_attrs and not _killed(trial):
                    found.setdefault(trial.user_attrs[_PLACE], trial)
        return found

    def _bury(self) -> None:
        """Give up the trials whose process is gone."""
        with _answering(self._named):
            trials = self._all()
        took = [
            trial.duration.total_seconds()
            for trial in trials
            if trial.state == TrialState.COMPLETE and trial.duration
        ]
        for trial in trials:
            # one that was killed before it had a place is in nobody's way
            running = trial.state == TrialState.RUNNING and _PLACE in trial.user_attrs
            if running and _gone(trial, max(_SILENT, 20 * max(took, default=0.0))):
                self._fail(trial.number)


class _Given(BaseSampler):
    """A sampler that gives what it was given: what to try is decided when a trial has its place."""

    parameters: Parameters = {}  # noqa: RUF012

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self.parameters[param_name]


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> Iterator[str]:
    """What differs between two sets of settings, one within another, as a message says it."""
    for key in sorted(before.keys() | now.keys()):
        old, new, name = before.get(key), now.get(key), f"{of}{key}"
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing(old, new, f"{name}.")
        elif name.endswith(_DIGEST):
            yield f"different {name.removesuffix(_DIGEST)}"
        else:
            yield f"{name} {_written(old)}, now it is {_written(new)}"


def _written(setting: Any) -> str:
    return "not given" if setting is None else repr(setting)


def _value(objective: Callable[[Parameters], float], parameters: Parameters) -> tuple[float, str | None]:
    try:
        value = objective(parameters)
    except LexibitError as error:
        return math.nan, str(error)
    return value, None if math.isfinite(value) else f"the objective is {value}"


def _killed(trial: FrozenTrial) -> bool:
    """Whether a trial came to nothing because its process ended."""
    return trial.state == TrialState.FAIL and _FAULT not in trial.user_attrs


def _gone(trial: FrozenTrial, silent: float) -> bool:
    """Whether the process of a running trial has ended; on another machine, if it took ``silent`` s."""
    worker, began = trial.user_attrs[_WORKER], trial.user_attrs[_BEGAN]
    return ended(worker) if here(worker) else time.time() - began > silent


def _made_by_another(error: BaseException) -> bool:
    """Whether the tables were there when they were to be made.

    Of processes that make them at once all but one fail, and find them a moment later.
    """
    # Optuna hands SQLAlchemy's error on in some places and wraps it in one of its own in others
    told = f"{error} {error.__cause__}"
    return "already exists" in told or "UNIQUE" in told


@contextmanager
def _answering(what: str) -> Iterator[None]:
    """Errors of a storage as lexibit's own."""
    try:
        yield
    except UpdateFinishedTrialError:
        raise
    except (optuna.exceptions.OptunaError, SQLAlchemyError, ImportError) as error:
        cause = error.__cause__ or error
        reason = str(cause).splitlines()[0]
        raise LexibitError(
            f"{what}: the storage of the search cannot be used ({reason}): see that its URL is right, that "
            "it can be reached, and that its disk is not full; what it holds stays"
        ) from cause
