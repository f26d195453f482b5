"""Who does what: candidates and tasks in an Optuna study that any number of workers, on any machines, share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from ktmerge.sweep.liveness import BEAT, WORKER, Watch, beating, mark

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

VOID, TASK, RESULT, ERROR, QUEUED, ORIGIN = "void", "task", "result", "error", "queued", "taken up from"
"""Attributes of a trial: it does not count; what it is about; what came out; why it failed; it was set beforehand;
the number of a dead worker's trial that it repeats."""

DIRECTIONS: tuple[Literal["maximize"], ...] = ("maximize", "maximize")
_DIED = "its worker died"
_PAUSE = 0.5
"""Seconds between looks at what others do."""


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

    def begin(self, most: int | None, ranges: Mapping[str, BaseDistribution]) -> Trial | None:
        """The next candidate to score; that of a dead worker first. None: all ``most`` are finished.

        Waits while another is drawn, which what is drawn next depends on, and while the last ones are with others, as
        their workers might die.

        Args:
            most: candidates in all; None: those in the queue and no others.
            ranges: what candidates are drawn from.
        """
        while True:
            self.take_up(ranges)
            found = self.study.get_trials(deepcopy=False)
            counted = [one for one in found if VOID not in one.user_attrs]
            states = {one.state for one in counted}
            is_drawn = any(one.state == TrialState.RUNNING and WORKER not in one.user_attrs for one in counted)
            is_wanted = most is not None and len(set(_places(found).values())) < most
            if not is_drawn and (TrialState.WAITING in states or is_wanted):
                trial = self._ask(ranges)
                if self._counts(trial, most):
                    return trial
                self.void(trial)
            elif TrialState.RUNNING not in states and not _without_heir(found):
                return None
            time.sleep(_PAUSE)

    def _counts(self, trial: Trial, most: int | None) -> bool:
        """Of workers that asked at once, those beyond the last number, or the last in the queue, step back.

        So do all but the first that take up the same dead worker's trial.
        """
        found = self.study.get_trials(deepcopy=False)
        places = _places(found)
        own = places[trial.number]
        if any(places.get(one.number) == own and VOID not in one.user_attrs for one in found[: trial.number]):
            return False
        if most is None:
            return QUEUED in trial.user_attrs
        return sum(place <= own for place in set(places.values())) <= most

    def take_up(self, ranges: Mapping[str, BaseDistribution] | None = None) -> None:
        """Declare dead workers' trials void and, given what they are drawn from, put others with all they hold in the
        queue; one that was not drawn to the end is drawn again.
        """
        for one in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._watch.is_lost(one):
                with suppress(UpdateFinishedTrialError):  # another worker was faster, or it was not dead
                    if VOID not in one.user_attrs:  # else who declared it void has died at that
                        self._storage.set_trial_user_attr(one._trial_id, VOID, _DIED)
                    self._storage.set_trial_state_values(one._trial_id, TrialState.FAIL)
        if ranges is not None:
            for one in _without_heir(self.study.get_trials(deepcopy=False)):
                held = {key: value for key, value in one.user_attrs.items() if key not in (WORKER, BEAT, VOID, ERROR)}
                whole = set(one.params) == set(ranges)
                self._enqueue(
                    one.params if whole else {}, ranges if whole else {}, {**held, ORIGIN: one.number},
                    one.system_attrs if whole else {},
                )  # fmt: skip

    def add(self, params: Mapping[str, Any], ranges: Mapping[str, BaseDistribution]) -> None:
        """Put a candidate into the queue."""
        self._enqueue(params, ranges, {QUEUED: True})

    def _enqueue(
        self,
        params: Mapping[str, Any],
        ranges: Mapping[str, BaseDistribution],
        attributes: Mapping[str, Any],
        samplers: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Put a trial into the queue; ``samplers`` is what a sampler has written of it, such as its generation."""
        self.study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=dict(params),
                distributions=dict(ranges),
                user_attrs=dict(attributes),
                system_attrs=dict(samplers),
            )
        )

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
            self.take_up()
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
        if trial.user_attrs.get(WORKER) != self._mark:  # its sampler did not mark it
            trial.set_user_attr(WORKER, self._mark)
        return trial


def place_of(number: int, found: Sequence[FrozenTrial]) -> int:
    """How many candidates come before a trial: the same whether or not workers died on the way.

    Args:
        number: of the trial.
        found: all trials of the study.
    """
    places = _places(found)
    return len({place for place in places.values() if place < places.get(number, number)})


def _places(found: Sequence[FrozenTrial]) -> dict[int, int]:
    """By number, the place among those wanted that a trial has: a dead worker's keeps it for the one that repeats it.

    Args:
        found: all trials of the study, by number; those that never counted have no place.
    """
    places: dict[int, int] = {}
    for one in found:
        if one.user_attrs.get(VOID, _DIED) == _DIED:
            origin = one.user_attrs.get(ORIGIN, one.number)
            places[one.number] = places.get(origin, origin)
    return places


def _without_heir(found: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials of dead workers that nobody repeats yet."""
    heirs = {one.user_attrs.get(ORIGIN) for one in found}
    return [one for one in found if one.user_attrs.get(VOID) == _DIED and one.number not in heirs]
