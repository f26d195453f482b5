"""The working folder: taken up only by the same run, unfinished checkpoints passed over, nothing left without use."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.tuners.partial import Partial, differences

INPUTS: dict[str, Any] = {"job": {"learning_rate": 1e-5, "seed": 1}, "base": {"content": "x"}, "training data": ["d"]}


def state(partial: Partial, name: str, step: int) -> Path:
    path = partial.folder / name
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"weights" * 100)
    (path / "optimizer.pt").write_bytes(b"moments" * 100)
    partial.seal(path, step, 1.5)
    return path


@pytest.fixture
def left(tmp_path: Path) -> Partial:
    """A run that stopped with three checkpoints and a log."""
    partial = Partial(tmp_path / "out", INPUTS)
    with partial:
        assert partial.open(resume=False, overwrite=False) is None
        for step in (5, 10, 15):
            state(partial, f"checkpoint-{step}", step)
        lines = [json.dumps({"step": step}) for step in range(18)]
        partial.log.write_text("\n".join(lines) + '\n{"step": 1')
    return Partial(tmp_path / "out", INPUTS)


def test_a_run_goes_on_from_the_newest_state(left: Partial) -> None:
    with left:
        saved = left.open(resume=True, overwrite=False)
        assert saved is not None
        assert (saved.path.name, saved.step, saved.seconds) == ("checkpoint-15", 15, 1.5)
        steps = [json.loads(line)["step"] for line in left.log.read_text().splitlines()]
        assert steps == list(range(16))


def test_the_log_is_cut_by_a_rename(left: Partial, tmp_path: Path) -> None:
    """Cut in place, a kill or a full disk at that moment would cost all of it."""
    (tmp_path / "same").hardlink_to(left.log)
    before = left.log.read_text()
    with left:
        left.open(resume=True, overwrite=False)
        assert (tmp_path / "same").read_text() == before != left.log.read_text()


def cut_short(path: Path) -> None:
    (path / "optimizer.pt").write_bytes(b"mom")


def unsealed(path: Path) -> None:
    (path / "complete.json").unlink()


def altered(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[7] ^= 1
    (path / "model.safetensors").write_bytes(content)


def lacking(path: Path) -> None:
    (path / "model.safetensors").unlink()


def bad_seal(path: Path) -> None:
    (path / "complete.json").write_text('{"step": 1')


@pytest.mark.parametrize("damage", [cut_short, unsealed, altered, lacking, bad_seal])
def test_a_damaged_state_is_passed_over_for_the_one_before(left: Partial, damage: Any) -> None:
    damage(left.folder / "checkpoint-15")
    with left:
        saved = left.open(resume=True, overwrite=False)
        assert saved is not None
        assert saved.step == 10
        assert not (left.folder / "checkpoint-15").exists()
        assert (left.folder / "checkpoint-5").exists()


def test_the_final_state_comes_before_every_checkpoint(left: Partial) -> None:
    path = state(left, "final", 20)
    with left:
        saved = left.open(resume=True, overwrite=False)
        assert saved is not None
        assert saved.path == path
        left.drop_checkpoints()
        assert sorted(one.name for one in left.folder.iterdir() if one.is_dir()) == ["final"]


def test_a_log_cut_off_within_a_letter_is_taken_up_to_there(left: Partial) -> None:
    whole = left.log.read_bytes().rpartition(b"\n")[0]
    left.log.write_bytes(whole + '\n{"step": 1, "said": "ü'.encode()[:-1])
    with left:
        left.open(resume=True, overwrite=False)
        assert [json.loads(line)["step"] for line in left.log.read_text().splitlines()] == list(range(16))


def test_what_lies_beside_the_final_state_belongs_to_it(left: Partial) -> None:
    left.last.mkdir()
    (left.last / "model.safetensors").write_bytes(b"last weights")
    state(left, "final", 20)
    (left.last / "model.safetensors").write_bytes(b"last")
    with left:
        saved = left.open(resume=True, overwrite=False)
        assert saved is not None
        assert saved.path.name == "checkpoint-15"


def test_without_a_flag_it_is_not_touched(left: Partial) -> None:
    before = sorted(left.folder.rglob("*"))
    with pytest.raises(UsageError, match="add --resume to go on with it, or --overwrite"), left:
        left.open(resume=False, overwrite=False)
    assert sorted(left.folder.rglob("*")) == before


def test_other_inputs_are_told_and_nothing_is_touched(left: Partial, tmp_path: Path) -> None:
    before = sorted(left.folder.rglob("*"))
    other = Partial(
        tmp_path / "out",
        {"job": {"learning_rate": 2e-5, "seed": 1}, "base": {"content": "y"}, "training data": ["e"]},
    )
    with pytest.raises(UsageError) as caught, other:
        other.open(resume=True, overwrite=False)
    said = str(caught.value)
    assert "learning_rate was 1e-05, now 2e-05" in said
    assert "another training data" in said
    assert "seed" not in said
    assert sorted(left.folder.rglob("*")) == before


def test_overwrite_starts_afresh(left: Partial) -> None:
    with left:
        assert left.open(resume=False, overwrite=True) is None
        assert sorted(path.name for path in left.folder.iterdir()) == ["lock", "started.json"]


def test_a_run_without_any_state_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> None:
        with Partial(tmp_path / "out", INPUTS) as partial:
            partial.open(resume=True, overwrite=False)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_the_folder_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def making(path: Path, *arguments: Any, **keywords: Any) -> None:
        make(path, *arguments, **keywords)
        signal.raise_signal(signal.SIGINT)

    def stopped() -> None:
        with Partial(tmp_path / "out", INPUTS) as partial:
            partial.open(resume=False, overwrite=False)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", making)
        with pytest.raises(KeyboardInterrupt):
            stopped()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_its_states(left: Partial) -> None:
    def stopped() -> None:
        with left:
            left.open(resume=True, overwrite=False)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (left.folder / "checkpoint-15").exists()


def test_a_folder_that_was_removed_meanwhile_has_no_state(left: Partial) -> None:
    with left:
        left.open(resume=True, overwrite=False)
        shutil.rmtree(left.folder)
        assert not left.has_state


def test_a_finished_run_leaves_nothing(left: Partial) -> None:
    with left:
        left.open(resume=True, overwrite=False)
        left.finish()
    assert not left.folder.exists()


def test_what_a_killed_run_left_goes_once_its_result_is_out(left: Partial, tmp_path: Path) -> None:
    Partial(tmp_path / "out", {**INPUTS, "training data": ["e"]}).discard()
    assert left.has_state  # of another run, which may still be gone on with
    with left:
        left.open(resume=True, overwrite=False)
        Partial(tmp_path / "out", INPUTS).discard()
        assert left.has_state  # in use
    left.discard()
    assert list(tmp_path.iterdir()) == []
    left.discard()


def test_what_a_kill_left_of_a_removal_goes_too(left: Partial, tmp_path: Path) -> None:
    (left.folder / "started.json").unlink()
    replaced = tmp_path / ".out.ktmerge-1"
    replaced.mkdir()
    (replaced / "model.safetensors").write_bytes(b"of before")
    left.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}, {}], ids=str)
def test_two_runs_cannot_share_it(left: Partial, tmp_path: Path, flags: dict[str, bool]) -> None:
    """Whatever the second is told to do, it hears who is at work, and touches nothing."""
    asked = {"resume": False, "overwrite": False, **flags}
    with left:
        left.open(resume=True, overwrite=False)
        before = contents(left.folder)
        second = Partial(tmp_path / "out", INPUTS)
        with pytest.raises(UsageError, match=rf"another run \(process {os.getpid()}\) is working"), second:
            second.open(**asked)
        assert contents(left.folder) == before


@pytest.mark.parametrize(("told", "said"), [("12 elsewhere", " (process 12 on elsewhere)"), ("", ""), ("x y", "")])
def test_who_holds_it_is_told_as_far_as_it_says(left: Partial, tmp_path: Path, told: str, said: str) -> None:
    with left:
        left.open(resume=True, overwrite=False)
        (left.folder / "lock").write_text(told)
        with pytest.raises(UsageError, match=re.escape(f"another run{said} is working")):
            Partial(tmp_path / "out", INPUTS).open(resume=True, overwrite=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_inputs_do_not_differ() -> None:
    assert differences(INPUTS, json.loads(json.dumps(INPUTS))) == []
    assert differences({}, {"upstream data": ["x"]}) == ["another upstream data"]
