"""Trials shared by several workers: nobody does too much, the dead are replaced."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import Trial, TrialState

from ktmerge.errors import UsageError
from ktmerge.sweep.ledger import ERROR, VOID, Ledger
from ktmerge.sweep.liveness import WORKER, Watch, ended_here, mark
from ktmerge.sweep.sampling import distributions, make_sampler, quietly
from ktmerge.sweep.settings import Sampler
from ktmerge.sweep.space import METHOD, Point, Range, Space
from ktmerge.sweep.storage import open_storage, trial_numbered

RANGES = {"x": FloatDistribution(0, 1)}
GONE = f"{mark().rpartition('/')[0]}/1"
"""The mark of a process that had this one's number long ago."""
quietly()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(open_storage(str(tmp_path / "journal.log")), "s", 60)


def marked_elsewhere() -> str:
    """The mark of a process that has ended."""
    code = "from ktmerge.sweep.liveness import mark; print(mark())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_as_many_trials_as_wanted_and_no_more(ledger: Ledger) -> None:
    for i in range(3):
        trial = ledger.begin(3, RANGES)
        assert trial is not None
        ledger.fail(trial, "no") if i == 1 else ledger.finish(trial, (1.0, 2.0))
    assert ledger.begin(3, RANGES) is None
    assert [one.state for one in ledger.trials()] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert ledger.begin(4, RANGES) is not None  # a sweep may be given more


def test_the_trial_of_a_dead_worker_is_taken_up_with_what_it_held(ledger: Ledger) -> None:
    lost = ledger.begin(2, RANGES)
    assert lost is not None
    lost.set_user_attr("round 0", {"a": [1.0]})
    lost.set_user_attr(WORKER, marked_elsewhere())
    again = ledger.begin(2, RANGES)
    assert again is not None
    assert again.params == lost.params
    assert again.user_attrs["round 0"] == {"a": [1.0]}
    assert again.user_attrs["taken up from"] == lost.number
    assert again.user_attrs[WORKER] == mark()
    ledger.finish(again, (1.0, 1.0))
    ledger.finish(lost, (0.0, 0.0))  # were it alive after all, it would change nothing
    assert [one.values for one in ledger.trials()] == [[1.0, 1.0]]
    assert VOID in trial_numbered(open_storage(str(ledger._storage._backend._file_path)), "s", lost.number).user_attrs


def test_a_trial_taken_up_twice_at_once_is_repeated_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ledger.begin(2, RANGES)
    assert lost is not None
    lost.set_user_attr(WORKER, marked_elsewhere())
    seen = ledger.study.get_trials()
    ledger.take_up(RANGES)
    with monkeypatch.context() as patch:  # another worker looked before, and SQLite let it declare the same one void
        seen[0].user_attrs[VOID] = "its worker died"
        patch.setattr(ledger.study, "get_trials", lambda **_: seen)
        ledger.take_up(RANGES)
    assert len(ledger.trials(TrialState.WAITING)) == 2
    for _ in range(2):
        trial = ledger.begin(2, RANGES)
        assert trial is not None
        ledger.finish(trial, (1.0, 1.0))
    assert ledger.begin(2, RANGES) is None
    assert [one.params == lost.params for one in ledger.trials()] == [True, False]


def test_a_dead_workers_place_is_nobody_elses(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between being declared void and being put into the queue again, no other begins, nor is all taken as done."""
    lost = ledger.begin(1, RANGES)
    assert lost is not None
    lost.set_user_attr(WORKER, marked_elsewhere())
    ledger.take_up()  # whoever declared it void has gone no further, and may never
    other = Ledger(ledger._storage, "s", 60)
    take_up, pauses = other.take_up, []
    with monkeypatch.context() as patch:
        patch.setattr(other, "take_up", lambda ranges: take_up(ranges if pauses else None))  # it looked before that
        patch.setattr("time.sleep", pauses.append)
        heir = other.begin(1, RANGES)
    assert pauses
    assert heir is not None
    assert heir.params == lost.params
    heir.set_user_attr(WORKER, marked_elsewhere())  # and dies as well
    last = ledger.begin(1, RANGES)
    assert last is not None
    assert last.params == lost.params
    ledger.finish(last, (1.0, 1.0))
    assert other.begin(1, RANGES) is None
    assert [one.number for one in other.trials()] == [last.number]


def test_who_dies_declaring_a_trial_void_leaves_none_running(ledger: Ledger) -> None:
    lost = ledger.begin(1, RANGES)
    assert lost is not None
    lost.set_user_attr(WORKER, GONE)
    lost.set_user_attr(VOID, "its worker died")  # and then so did who said so
    heir = ledger.begin(1, RANGES)
    assert heir is not None
    assert [one.state for one in ledger.study.get_trials()] == [TrialState.FAIL, TrialState.RUNNING]


def test_an_error_is_not_handed_on(ledger: Ledger) -> None:
    lost = ledger.begin(1, RANGES)
    assert lost is not None
    lost.set_user_attr(ERROR, "the disk is full")
    lost.set_user_attr(WORKER, GONE)
    heir = ledger.begin(1, RANGES)
    assert heir is not None
    assert ERROR not in heir.user_attrs


def test_what_is_being_drawn_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes next depends on it; whoever drew it may have been killed before it could say that it was."""
    monkeypatch.setattr("ktmerge.sweep.ledger._PAUSE", 0.01)
    ledger = Ledger(open_storage(str(tmp_path / "journal.log")), "s", 0.1)
    lost = ledger.study.ask(RANGES)
    heir = ledger.begin(2, RANGES)
    assert heir is not None
    assert heir.user_attrs["taken up from"] == lost.number


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("name", "drawing"), [("tpe", "KeyedSampler._drawn"), ("qmc", "SobolSampler.sample_independent")]
)
def test_a_trial_is_marked_before_it_is_drawn(
    ledger: Ledger, name: Sampler, drawing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ktmerge.sweep.keyed.{drawing}", killed)
    space = cast(Space, SimpleNamespace(knob=None, ranges=[Range("x", 0, 1)], methods=(), used=dict))
    ledger.study.sampler = make_sampler(name, space, 90.0, 3)
    with pytest.raises(KeyboardInterrupt):
        ledger.begin(1, RANGES)
    assert [one.user_attrs for one in ledger.trials()] == [{WORKER: mark()}]


def test_a_knob_drawn_by_two_at_once_has_two_values(ledger: Ledger) -> None:
    space = SimpleNamespace(knob=Range("x", 0, 1), ranges=[Range("x", 0, 1)], methods=(), used=dict)
    ledger.study.sampler = make_sampler("curve", cast(Space, space), 90.0, 3)
    first = ledger._storage.create_new_trial(ledger.study._study_id)  # and not drawn yet
    second = ledger.study.ask(RANGES)
    assert (Trial(ledger.study, first).suggest_float("x", 0, 1), second.params["x"]) == (1.0, 0.5)


def test_a_living_worker_here_is_not_robbed_and_a_silent_one_elsewhere_is_after_the_grace(ledger: Ledger) -> None:
    trial = ledger.begin(1, RANGES)
    assert trial is not None
    now = [0.0]
    watch = Watch(10, lambda: now[0])

    def lost() -> bool:
        return watch.is_lost(ledger.study.get_trials()[0])

    trial.set_user_attr(WORKER, "another-machine/1/1")
    assert not lost()
    now[0] = 9
    assert not lost()
    trial.set_user_attr("beat", 1)
    now[0] = 18
    assert not lost()
    now[0] = 29
    assert lost()
    assert not ended_here(mark())
    assert ended_here(marked_elsewhere())


def test_tasks_are_done_once_and_known_to_all(ledger: Ledger) -> None:
    done: list[str] = []
    tasks = {name: lambda name=name: done.append(name) or {"of": name} for name in ("a", "b")}
    expected = {"a": {"of": "a"}, "b": {"of": "b"}}
    assert ledger.share(tasks) == expected
    other = Ledger(ledger._storage, "s", 60)
    assert other.share(tasks) == expected
    assert done == ["a", "b"]

    def broken() -> None:
        raise UsageError("no")

    with pytest.raises(UsageError):
        ledger.share({"c": broken})
    assert other.share({"c": lambda: 3}) == {"c": 3}  # what failed or was stopped is free again


def test_an_unfinished_line_of_the_journal_is_cut_off(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    trial = ledger.begin(1, RANGES)
    assert trial is not None
    ledger.finish(trial, (1.0, 1.0))
    path = tmp_path / "journal.log"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":8,"wor')
    again = Ledger(open_storage(str(path)), "s", 60)
    assert path.read_bytes().startswith(whole + b"{")
    assert again.begin(1, RANGES) is None


def test_a_storage_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for where in (f"sqlite:///{tmp_path}/no/such/folder/x.db", "nosuch://x", str(tmp_path / "no" / "journal.log")):
        with pytest.raises(UsageError, match="cannot be opened"):
            open_storage(where)


@pytest.mark.every(4)
@pytest.mark.parametrize("name", ["nsga2", "tpe", "qmc", "curve"])
def test_a_killed_worker_changes_nothing_that_is_drawn(tmp_path: Path, name: Sampler) -> None:
    whole = drawn_by(name, tmp_path / "whole", dying=())
    assert drawn_by(name, tmp_path / "killed", dying=(2, 7, 8)) == whole
    assert len({tuple(one) for one in whole}) == 12


def drawn_by(name: Sampler, path: Path, dying: Sequence[int]) -> list[list[float]]:
    """The points of a study of twelve, in whose trials ``dying`` a worker ends and another begins."""
    keys = ["a"] if name == "curve" else ["a", "b"]
    ranges = dict.fromkeys(keys, FloatDistribution(0, 1))
    space = SimpleNamespace(knob=Range("a", 0, 1), ranges=[Range(key, 0, 1) for key in keys], methods=(), used=dict)
    count = 0
    while True:
        ledger = Ledger(open_storage(str(path)), "s", 60)
        ledger.study.sampler = make_sampler(name, cast(Space, space), 90.0, 3)
        while (trial := ledger.begin(12, ranges)) is not None:
            count += 1
            if count - 1 in dying:
                trial.set_user_attr(WORKER, GONE)
                break
            point = [trial.params[key] for key in keys]
            ledger.finish(trial, (100 - 20 * point[0], point[-1] * (2 - point[0])))
        else:
            return [[one.params[key] for key in keys] for one in ledger.trials()]


@pytest.mark.parametrize("name", ["nsga2", "tpe", "gp", "qmc"])
def test_workers_that_begin_together_draw_different_points(tmp_path: Path, name: Sampler) -> None:
    space = cast(Space, SimpleNamespace(knob=None, ranges=[Range("x", 0, 1)], methods=(), used=dict))
    workers = [Ledger(open_storage(str(tmp_path / "j")), "s", 60) for _ in range(2)]
    for worker in workers:
        worker.study.sampler = make_sampler(name, space, 90.0, 3)
    points = [trial.params["x"] for _ in range(4) for worker in workers if (trial := worker.begin(8, RANGES))]
    assert len(set(points)) == 8


@pytest.mark.every(2)
@pytest.mark.parametrize("key", ["", "b"])
def test_a_candidate_that_is_there_is_not_drawn_again(tmp_path: Path, key: str) -> None:
    """NSGA-II copies parents, and changes what a method may not know."""
    ranges = {key: FloatDistribution(0, 1) for key in ("a", "b")}

    def used(point: Point) -> Point:
        return {name: value for name, value in point.items() if name != key or point["a"] > 0.5}

    space = SimpleNamespace(knob=None, ranges=[Range(name, 0, 1) for name in ranges], methods=(), used=used)
    ledger = Ledger(open_storage(str(tmp_path / "j")), "s", 60)
    ledger.study.sampler = make_sampler("nsga2", cast(Space, space), 90.0, 3)
    points = []
    while (trial := ledger.begin(48, ranges)) is not None:
        a, b = (trial.params[name] for name in ranges)
        ledger.finish(trial, (100 - 20 * a, b * (2 - a)))
        points.append(used(trial.params))
    assert all(point not in points[:number] for number, point in enumerate(points))


def test_a_candidate_that_is_there_is_not_drawn_by_another_worker(tmp_path: Path) -> None:
    space = SimpleNamespace(knob=None, ranges=[Range("x", choices=(1, 2, 3))], methods=(), used=dict)
    workers = [Ledger(open_storage(str(tmp_path / "j")), "s", 60) for _ in range(3)]
    for worker in workers:
        worker.study.sampler = make_sampler("nsga2", cast(Space, space), 90.0, 3)
    ranges = distributions(cast(Space, space))
    points = [trial.params["x"] for worker in workers if (trial := worker.begin(4, ranges))]
    assert sorted(points) == [1, 2, 3]
    last = workers[0].begin(4, ranges)  # when there is no other, one is taken again
    assert last is not None
    assert last.params["x"] in points


def test_a_trial_whose_worker_died_while_it_was_drawn_is_drawn_again(ledger: Ledger) -> None:
    lost = ledger.study.ask({"x": FloatDistribution(0, 1)})
    lost.set_user_attr(WORKER, GONE)
    again = ledger.begin(1, {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)})
    assert again is not None
    assert set(again.params) == {"x", "y"}


def test_sobol_points_are_even_over_methods_and_whole_numbers(tmp_path: Path) -> None:
    space = SimpleNamespace(
        knob=None, methods=("ties", "linear"), ranges=[Range("k", 1, 9, integer=True), Range("l", 0.01, 1, log=True)]
    )
    ledger = Ledger(open_storage(str(tmp_path / "j")), "s", 60)
    ledger.study.sampler = make_sampler("qmc", cast(Space, space), 90.0, 3)
    ranges = distributions(cast(Space, space))
    points = [trial.params for _ in range(8) if (trial := ledger.begin(8, ranges))]
    assert sorted(one[METHOD] for one in points) == ["linear"] * 4 + ["ties"] * 4
    assert sum(one["l"] < 0.1 for one in points) == 4
    assert all(isinstance(one["k"], int) for one in points)
