"""Where a sweep is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from ktmerge import api
from ktmerge.errors import UsageError
from ktmerge.recipes.document import parse_yaml
from ktmerge.sweep.folder import begin, chosen_text, trial_recipe
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.storage import open_storage, study_names


def test_a_storage_that_cannot_be_opened_leaves_no_folder(  # type: ignore[no-untyped-def]
    world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for url in ("foo://x", f"sqlite:///{tmp_path}/missing/s.db"):
        with pytest.raises(UsageError, match="cannot be opened"):
            api.sweep(world.recipe, tmp_path / "out", ranges=["lambda=0:1"], storage=url)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line", [b'{"op_code": 0, "study_na', b"\x00\xff", b"[]", b'{"op_code": 99, "worker_id": "x"}']
)
def test_a_damaged_journal_is_named_with_its_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal.log"
    open_storage(str(path)).create_new_study([StudyDirection.MAXIMIZE], "s")
    before = path.read_bytes()
    path.write_bytes(before + line + b"\n" + before)
    words = r"log: .*damaged, or of a later Optuna" if b"99" in line else "log, line 2: .* is damaged;"
    with pytest.raises(UsageError, match=words):
        open_storage(str(path))


def test_another_digit_in_a_score_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    study = optuna.create_study(storage=open_storage(str(path)), study_name="s")
    study.tell(study.ask(), 0.125)
    before = path.read_bytes()
    path.write_bytes(before.replace(b"0.125", b"0.126"))
    with pytest.raises(UsageError, match=r"log, line 3: .* is damaged;"):
        open_storage(str(path))
    path.write_bytes(before)
    plain = JournalStorage(JournalFileBackend(str(path)))
    assert optuna.load_study(study_name="s", storage=plain).best_value == 0.125
    optuna.create_study(storage=plain, study_name="without checksums")
    assert study_names(open_storage(str(path))) == ["s", "without checksums"]


@pytest.mark.slow
def test_going_on_elsewhere_than_where_the_trials_are_is_refused(tmp_path: Path) -> None:
    out, other = tmp_path / "out", f"sqlite:///{tmp_path}/trials.db"
    recipe = SimpleNamespace(folder=tmp_path)

    def go_on(storage: str) -> None:
        settings = cast(SweepSettings, SimpleNamespace(storage=storage, recipe=recipe))
        begin(out, settings, "s", resume=out.exists(), overwrite=False)

    go_on(other)
    open_storage(other).create_new_study([StudyDirection.MAXIMIZE], "s")
    with pytest.raises(UsageError, match=r"its trials are in sqlite:.*trials\.db: name that by --storage"):
        go_on(str(out / "journal.log"))
    assert [one.name for one in out.iterdir()] == ["sweep.json"]
    go_on(other.replace("/trials", "/./trials"))  # the same by another name
    assert json.loads((out / "sweep.json").read_text())["storage"].endswith("/./trials.db")


def test_a_reason_of_several_lines_leaves_the_chosen_recipe_readable(tmp_path: Path) -> None:
    written = {"ktmerge": 1, "base": "base", "experts": {"e": {"model": "e"}}, "blend": {"method": "linear"}}
    outcome: Any = SimpleNamespace(
        settings=SimpleNamespace(recipe=SimpleNamespace(name="r", folder=tmp_path)),
        shown=SimpleNamespace(recipe=written),
        statement=lambda: ["Trial 1."],
        cautions=lambda: ["2 trials could not be blended, such as 0: blend.density: too much.\nblend: no."],
    )
    text = chosen_text(outcome, tmp_path)
    assert parse_yaml(text, "chosen") == {**written, "name": "r-chosen"}
    assert "# blend: no.\n" in text


def test_a_chosen_recipe_finds_the_statistics_that_a_job_made(tmp_path: Path) -> None:
    for name in ("base", "e"):
        (tmp_path / "stats" / name).mkdir(parents=True)
    written = {
        "ktmerge": 1, "base": "base", "statistics": {"data": ["up.jsonl"]},
        "experts": {"e": {"model": "e", "statistics": {"folder": "stats/e", "data": ["down.jsonl"]}}},
        "blend": {"method": "linear"},
    }  # fmt: skip
    outcome: Any = SimpleNamespace(
        settings=SimpleNamespace(recipe=SimpleNamespace(name="r", folder=tmp_path)),
        shown=SimpleNamespace(recipe=written), statement=list, cautions=list,
    )  # fmt: skip
    found = parse_yaml(chosen_text(outcome, tmp_path / "found"), "chosen")
    assert found["statistics"] == "../stats/base"
    assert found["experts"]["e"]["statistics"] == "../stats/e"


def _lose(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], *lines[3:]]


def _double(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], lines[2], *lines[3:]]


def _move(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[3], lines[2], *lines[4:]]


@pytest.mark.parametrize(("harm", "line"), [(_lose, 3), (_double, 4), (_move, 3)])
def test_a_line_lost_doubled_or_moved_is_seen(
    tmp_path: Path, harm: Callable[[list[bytes]], list[bytes]], line: int
) -> None:
    path = tmp_path / "journal.log"
    study = optuna.create_study(storage=open_storage(str(path)), study_name="s")
    for value in (0.125, 0.25, 0.5):
        trial = study.ask()
        trial.set_user_attr("text", "x" * 40_000)  # longer than what is read at once to find the last line
        study.tell(trial, value)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(harm(lines)))
    with pytest.raises(UsageError, match=rf"log, line {line}: .* is damaged: (a|this) line"):
        open_storage(str(path))
    path.write_bytes(b"".join(lines[:-1]))  # an earlier copy
    study = optuna.load_study(study_name="s", storage=open_storage(str(path)))
    study.tell(2, -1.0)
    assert optuna.load_study(study_name="s", storage=open_storage(str(path))).best_value == -1.0


def test_what_others_and_earlier_versions_wrote_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    optuna.create_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="plain")
    ours = open_storage(str(path))
    optuna.create_study(storage=ours, study_name="ours")
    fork = path.read_bytes()
    optuna.create_study(storage=ours, study_name="in time")
    late = path.read_bytes()
    path.write_bytes(fork)  # as a worker saw it whose lock was taken away
    optuna.create_study(storage=open_storage(str(path)), study_name="too late")
    path.write_bytes(late + path.read_bytes()[len(fork) :] + b'{"op_code": 0, "stu')  # and of one the disk was full
    optuna.create_study(storage=ours, study_name="last")
    assert study_names(open_storage(str(path))) == ["plain", "ours", "in time", "too late", "last"]
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(UsageError, match=r"line 1: .* a line before this one was lost"):
        open_storage(str(path))


def test_damage_while_a_sweep_runs_is_told_too(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    storage = open_storage(str(path))
    with path.open("ab") as file:
        file.write(b"\x00\n{}\n")
    with pytest.raises(UsageError, match=r"log, line 1: .* is damaged;"):
        study_names(storage)


@pytest.mark.slow
def test_a_lock_that_a_killed_worker_left_is_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ktmerge.sweep.storage._LOCKED_SECONDS", 3)
    Path("found").mkdir()
    open_storage("found/journal.log").create_new_study([StudyDirection.MAXIMIZE], "s")
    code = "import os; from ktmerge.sweep.storage import _lock; _lock('found/journal.log').acquire(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    Path("found").rename("moved")
    assert study_names(open_storage("moved/journal.log")) == ["s"]
    open_storage("moved/journal.log").create_new_study([StudyDirection.MAXIMIZE], "t")
    assert study_names(open_storage("moved/journal.log")) == ["s", "t"]


def test_another_sweep_takes_the_place_of_one_and_of_nothing_else(tmp_path: Path) -> None:
    settings = SimpleNamespace(storage=str(tmp_path / "journal.log"), recipe=SimpleNamespace(folder=tmp_path))
    left = ["journal.log", "journal.log.lock", ".sweep.json.17.4711.tmp"]
    for name in left:  # of a worker that was killed at once
        (tmp_path / name).touch()
    begin(tmp_path, cast(SweepSettings, settings), "one", resume=False, overwrite=False)
    for name in ("chosen.yaml", ".result.json.17.4711.tmp", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="holds another sweep"):
        begin(tmp_path, cast(SweepSettings, settings), "two", resume=False, overwrite=False)
    begin(tmp_path, cast(SweepSettings, settings), "two", resume=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "sweep.json"]


def test_a_database_that_does_not_open_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktmerge.sweep.storage._ATTEMPTS", 1)
    monkeypatch.setattr("ktmerge.sweep.storage._PAUSE", 0)

    def start(storage: str, out: Path) -> None:
        settings = SimpleNamespace(storage=storage, recipe=SimpleNamespace(folder=tmp_path))
        begin(out, cast(SweepSettings, settings), "two", resume=False, overwrite=True)

    old, gone = tmp_path / "old", f"sqlite:///{tmp_path}/none/trials.db"
    old.mkdir()
    for name in ("sweep.json", "journal.log", "chosen.yaml"):
        (old / name).write_text(json.dumps({"ktmerge_sweep": 1, "study": "one", "storage": None, "recipes from": "."}))
    for out in (old, tmp_path / "new"):
        with pytest.raises(UsageError, match="cannot be opened"):
            start(gone, out)
    assert sorted(path.name for path in old.iterdir()) == ["chosen.yaml", "journal.log", "sweep.json"]
    assert not (tmp_path / "new").exists()
    start(f"sqlite:///{tmp_path}/new/trials.db", tmp_path / "new")  # in a folder that is not there before


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_trials_that_others_may_share_are_not_taken_for_new_ones(tmp_path: Path, kind: str) -> None:
    storage = f"sqlite:///{tmp_path}/trials.db" if kind == "sqlite" else str(tmp_path / "trials.log")
    settings = cast(SweepSettings, SimpleNamespace(storage=storage, recipe=SimpleNamespace(folder=tmp_path)))
    begin(tmp_path / "out", settings, "one", resume=False, overwrite=True)
    study = optuna.create_study(storage=open_storage(storage), study_name="one")
    begin(tmp_path / "out", settings, "one", resume=False, overwrite=True)  # none was begun
    study.ask()
    (tmp_path / "out" / "chosen.yaml").touch()
    for out in ("out", "new"):
        with pytest.raises(UsageError, match=r"trials\.\w+: has 1 trials of this very sweep, .* the studies one "):
            begin(tmp_path / out, settings, "one", resume=False, overwrite=True)
    assert (tmp_path / "out" / "chosen.yaml").exists()
    assert not (tmp_path / "new").exists()
    begin(tmp_path / "out", settings, "two", resume=False, overwrite=True)
    assert not (tmp_path / "out" / "chosen.yaml").exists()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://anna:geheim@host/name",
        "postgresql://anna:ge/heim@host/name",
        "postgresql://:geheim@host/name",
        "postgresql://host/name?user=anna&password=geheim",
    ],
)
def test_passwords_are_not_written(tmp_path: Path, url: str) -> None:
    settings = SimpleNamespace(storage=url, recipe=SimpleNamespace(folder=tmp_path))
    begin(tmp_path, cast(SweepSettings, settings), "s", resume=False, overwrite=False, here=False)
    written = (tmp_path / "sweep.json").read_text()
    assert "heim" not in written
    assert "host/name" in written


def test_a_storage_that_is_no_url_is_told(tmp_path: Path) -> None:
    settings = SimpleNamespace(storage="postgresql://[x", recipe=SimpleNamespace(folder=tmp_path))
    with pytest.raises(UsageError, match="storage"):
        begin(tmp_path / "o", cast(SweepSettings, settings), "s", resume=False, overwrite=False)
    assert not (tmp_path / "o").exists()


def test_a_trial_whose_recipe_is_none(tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage(str(tmp_path / "journal.log")), study_name="s")
    study.ask().set_user_attr("recipe", "ties")
    (tmp_path / "sweep.json").write_text(json.dumps({"ktmerge_sweep": 1, "study": "s", "recipes from": "."}))
    with pytest.raises(UsageError, match="--trial 0: that trial was not begun"):
        trial_recipe(tmp_path, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"study": None},
        {"storage": 3},
        {"recipes from": []},
        {"recipes from": "a\0b"},
        {"recipes from": "\ud800"},
        {"ktmerge_sweep": 2},
    ],
)
def test_a_sweep_that_is_none_has_no_trials(tmp_path: Path, change: dict[str, object]) -> None:
    whole = {"ktmerge_sweep": 1, "study": "s", "storage": None, "recipes from": "."}
    (tmp_path / "sweep.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(UsageError, match=r"sweep\.json: (no sweep|a sweep of version 2)"):
        trial_recipe(tmp_path, 0)
    for storage in ("x" * 9999, f"sqlite:///{tmp_path}/gone.db?timeout=9"):
        (tmp_path / "sweep.json").write_text(json.dumps({**whole, "storage": storage}))
        with pytest.raises(UsageError, match="trials are not there"):
            trial_recipe(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
    (tmp_path / "sweep.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="not JSON"):
        trial_recipe(tmp_path, 0)
