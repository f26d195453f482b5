"""Who does what: candidates and tasks in an Optuna study that any number of workers, on any machines, share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState, create_trial

from ktmerge.errors import KtmergeError, UsageError, first_line
from ktmerge.sweep.liveness import BEAT, WORKER, Watch, beating, mark

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

VOID, TASK, RESULT, ERROR = "void", "task", "result", "error"
"""Attributes of a trial: it does not count; what it is about; what came out; why it failed."""

DIRECTIONS: tuple[Literal["maximize"], ...] = ("maximize", "maximize")
_PAUSE = 0.5
"""Seconds between looks at what others do."""


def open_storage(where: str) -> BaseStorage:
    """A database by URL, or a journal file.

    Raises:
        UsageError: it cannot be opened.
    """
    try:
        if "://" in where:
            return _database(where)
        _mend(Path(where))
        return JournalStorage(JournalFileBackend(where))
    except (OSError, ImportError, OptunaError) as error:
        raise UsageError(f"the storage of the sweep cannot be opened: {first_line(error)}") from None
    except Exception as error:  # SQLAlchemy and database drivers raise what they like
        raise UsageError(f"the storage of the sweep cannot be opened: {first_line(error)}") from None


def _database(url: str) -> BaseStorage:
    """Several workers may make the tables at once: those that come second fail, and find them made."""
    for _ in range(5):
        try:
            return RDBStorage(url)
        except Exception as error:
            last = error
            time.sleep(_PAUSE)
    raise last


def _mend(path: Path) -> None:
    """Cut off a line that a full disk or a power cut left unfinished: it would keep the journal from being read."""
    size = _unfinished(path)
    if size is None:
        return
    time.sleep(1.0)  # somebody may be writing it just now
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        if (now := _unfinished(path)) is not None:
            with path.open("r+b") as file:
                file.truncate(now)
    finally:
        lock.release()


def _unfinished(path: Path) -> int | None:
    """How much of the journal is whole, if not all."""
    content = path.read_bytes() if path.exists() else b""
    return None if not content or content.endswith(b"\n") else content.rfind(b"\n") + 1


class Ledger:
    """The trials of one study.

    Args:
        storage: where it is kept.
        name: of the study; made if there is none.
        grace: seconds of silence after which a worker on another machine counts as dead.
        sampler: how candidates are drawn.
    """

    def __init__(self, storage: BaseStorage, name: str, grace: float, sampler: BaseSampler | None = None) -> None:
        self.study: Study = optuna.create_study(
            storage=storage, study_name=name, directions=DIRECTIONS, load_if_exists=True, sampler=sampler
        )
        self._storage, self._grace = storage, grace
        self._watch = Watch(grace)
        self._mark = mark()

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials that count, by number; of these states if any are given."""
        return [
            one for one in self.study.get_trials(deepcopy=False, states=states or None) if VOID not in one.user_attrs
        ]

    def begin(self, most: int, ranges: Mapping[str, BaseDistribution]) -> Trial | None:
        """The next candidate to score; that of a dead worker first. None: all ``most`` are finished.

        Waits while the last ones are with others, as their workers might die.
        """
        while True:
            self.take_up()
            waiting = self.trials(TrialState.WAITING)
            if waiting or len(self.trials()) < most:
                trial = self._ask(ranges)
                # Of workers that asked at once, those beyond the last number step back.
                if sum(one.number <= trial.number for one in self.trials()) <= most:
                    return trial
                self.void(trial)
            elif not self.trials(TrialState.RUNNING):
                return None
            time.sleep(_PAUSE)

    def take_up(self, requeue: bool = True) -> None:
        """Declare dead workers' trials void and, unless told otherwise, put others with all they hold in the queue."""
        for one in self.trials(TrialState.RUNNING):
            if not self._watch.is_lost(one):
                continue
            try:
                self._storage.set_trial_user_attr(one._trial_id, VOID, "its worker died")
                self._storage.set_trial_state_values(one._trial_id, TrialState.FAIL)
            except UpdateFinishedTrialError:
                continue  # another worker was faster, or it was not dead
            if requeue:
                held = {key: value for key, value in one.user_attrs.items() if key not in (WORKER, BEAT, VOID)}
                self.study.add_trial(
                    create_trial(
                        state=TrialState.WAITING, params=one.params, distributions=one.distributions,
                        user_attrs={**held, "taken up from": one.number},
                    )
                )  # fmt: skip

    def add(self, params: Mapping[str, Any], ranges: Mapping[str, BaseDistribution]) -> None:
        """Put a candidate into the queue."""
        self.study.add_trial(create_trial(state=TrialState.WAITING, params=dict(params), distributions=dict(ranges)))

    def working(self, trial: Trial) -> Any:
        """Signs of life on a trial while a ``with`` block runs."""
        number = trial._trial_id
        return beating(lambda count: self._storage.set_trial_user_attr(number, BEAT, count), self._grace)

    def finish(self, trial: Trial, values: tuple[float, float]) -> None:
        """Write what a candidate came to; nothing if another worker has taken it up meanwhile."""
        try:
            self.study.tell(trial, values)
        except (UpdateFinishedTrialError, ValueError):
            if self._storage.get_trial(trial._trial_id).state == TrialState.RUNNING:
                raise

    def fail(self, trial: Trial, reason: str) -> None:
        """Write that a candidate cannot be; it counts."""
        trial.set_user_attr(ERROR, reason)
        self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def void(self, trial: Trial, reason: str = "one too many") -> None:
        """Write that a trial does not count."""
        trial.set_user_attr(VOID, reason)
        self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def share(self, tasks: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Do tasks together with all others who share the same: each is done once, and what comes out is known to all.

        Args:
            tasks: by name; each gives plain data.

        Raises:
            KtmergeError: a task failed, here or with another worker.
        """
        while True:
            self.take_up(requeue=False)
            found = self._by_task()
            done = {name: one.user_attrs[RESULT] for name, one in found.items() if RESULT in one.user_attrs}
            if all(name in done for name in tasks):
                return {name: done[name] for name in tasks}
            free = next((name for name in tasks if name not in found), None)
            if free is None:
                time.sleep(_PAUSE)
                continue
            self._do(free, tasks[free])

    def _do(self, name: str, task: Callable[[], Any]) -> None:
        trial = self._ask({})
        trial.set_user_attr(TASK, name)
        if self._by_task()[name].number != trial.number:
            self.void(trial, "another was faster")
            return
        try:
            with self.working(trial):
                result = task()
        except BaseException:
            self.void(trial, "failed or stopped")
            raise
        try:
            trial.set_user_attr(RESULT, result)
        except UpdateFinishedTrialError:
            return  # taken for dead; another does it
        self.finish(trial, (0.0, 0.0))

    def _by_task(self) -> dict[str, FrozenTrial]:
        """Of each task the first trial that counts."""
        found: dict[str, FrozenTrial] = {}
        for one in self.trials():
            if TASK in one.user_attrs:
                found.setdefault(str(one.user_attrs[TASK]), one)
        return found

    def _ask(self, ranges: Mapping[str, BaseDistribution]) -> Trial:
        trial = self.study.ask(dict(ranges))
        trial.set_user_attr(WORKER, self._mark)
        return trial


def study_names(storage: BaseStorage) -> list[str]:
    """Names of all studies in a storage."""
    return [one.study_name for one in storage.get_all_studies()]


def trial_numbered(storage: BaseStorage, study: str, number: int) -> FrozenTrial:
    """A trial of a study.

    Raises:
        UsageError: there is none.
    """
    if study not in study_names(storage):
        raise UsageError(f"there is no study '{study}' in that storage.")
    trials = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        known = f"0 to {len(trials) - 1}" if trials else "none yet"
        raise KtmergeError(f"--trial {number}: the sweep has no such trial; its trials: {known}.")
    return trials[number]
