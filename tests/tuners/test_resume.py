"""Stopping and going on: a run that was interrupted or killed ends in the bytes of an unbroken one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stopping import KILLED, StopsAt, log_of
from tuning import CHATS, JOB, ROWS, Listener, sha256, tune, write

from ktmerge.errors import UsageError

LONG: dict[str, Any] = {"max_steps": 18, "eval_upstream": "chats.jsonl", "eval_every": 5}


@pytest.fixture(scope="module")
def unbroken(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 samples in batches of 4: epochs of 8 steps, the last batch smaller; 18 steps go into the third epoch."""
    folder = tmp_path_factory.mktemp("unbroken")
    tune(tiny_llama, folder, **LONG)
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8, 10, 18])
def test_ctrl_c_saves_at_once_and_resumes_to_the_same_bytes(
    unbroken: Path, tiny_llama: Path, tmp_path: Path, step: int
) -> None:
    """In the middle of an epoch, at its end, at an evaluation, at the last step."""
    listener = StopsAt(step)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **LONG, progress=listener)
    assert listener.notes[-1] == f"stopped after step {step} of 18; go on with --resume."
    assert not (tmp_path / "out").exists()
    kept = "final" if step == 18 else f"checkpoint-{step}"
    assert (tmp_path / "out.partial" / kept / "complete.json").exists()
    with pytest.raises(UsageError, match="add --resume to go on with it, or --overwrite"):
        tune(tiny_llama, tmp_path, **LONG)
    with pytest.raises(UsageError, match=r"started with other settings: learning_rate was 0\.001, now 0\.1"):
        tune(tiny_llama, tmp_path, **LONG, learning_rate=0.1, resume=True)
    tune(tiny_llama, tmp_path, **LONG, resume=True)
    assert sha256(tmp_path / "out") == sha256(unbroken)
    assert not (tmp_path / "out.partial").exists()
    assert log_of(tmp_path / "out") == log_of(unbroken)


@pytest.mark.slow
def test_other_data_or_base_cannot_be_resumed(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **LONG, progress=StopsAt(3))
    write(tmp_path / "other.jsonl", ROWS[1:])
    with pytest.raises(UsageError, match="another training data"):
        tune(tiny_llama, tmp_path, **LONG, data=["other.jsonl"], resume=True)
    assert (tmp_path / "out.partial/checkpoint-3").exists()
    tune(tiny_llama, tmp_path, max_steps=1, overwrite=True)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_only_its_steps(unbroken: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **LONG, save_every=4, progress=StopsAt(10))
    newest = tmp_path / "out.partial/checkpoint-10"
    content = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(content[: len(content) // 2])
    listener = Listener()
    tune(tiny_llama, tmp_path, **LONG, resume=True, progress=listener)
    assert any("going on after step 8 of 18" in note for note in listener.notes)
    assert sha256(tmp_path / "out") == sha256(unbroken)


@pytest.mark.slow
def test_resume_without_anything_to_resume_starts(tiny_llama: Path, tmp_path: Path) -> None:
    tune(tiny_llama, tmp_path, "plain", max_steps=2)
    tune(tiny_llama, tmp_path, "out", max_steps=2, resume=True)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["any time", "while saving", "while publishing"])
def test_a_killed_run_resumes_to_the_same_bytes(unbroken: Path, tiny_llama: Path, tmp_path: Path, moment: str) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "chats.jsonl", CHATS)
    settings = json.dumps({**JOB, **LONG, "save_every": 2})
    process = subprocess.Popen([sys.executable, "-c", KILLED, settings, tiny_llama, tmp_path, moment])
    log = tmp_path / "out.partial/log.jsonl"
    deadline = time.monotonic() + 1200
    while moment == "any time" and process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count('"loss"') >= 5:
            process.kill()
        time.sleep(0.002)
    assert process.wait(1200) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--resume"):
        tune(tiny_llama, tmp_path, **LONG)
    listener = Listener()
    tune(tiny_llama, tmp_path, **LONG, resume=True, progress=listener)
    assert sha256(tmp_path / "out") == sha256(unbroken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "out", "train.jsonl"]
    going_on = [note for note in listener.notes if "going on after step" in note]
    assert bool(going_on) == (moment != "while publishing")


@pytest.mark.slow
def test_dropout_resumes_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    """Random numbers are drawn in the forward pass, so their state must be restored at the right moment."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    tune(base, tmp_path, "whole", **LONG)
    for step in (5, 8):
        with pytest.raises(KeyboardInterrupt):
            tune(base, tmp_path, **LONG, progress=StopsAt(step))
        tune(base, tmp_path, **LONG, resume=True)
        assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")
