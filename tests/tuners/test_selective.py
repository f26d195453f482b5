"""Selective fine-tunes of a tiny model: what moved is what the saved masks say, and a resumed run says the same."""

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
from stopping import KILLED, StopsAt
from tuning import CHATS, JOB, ROWS, Listener, sha256, tune, weights, write

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.cli import main
from ktmerge.tuners.selection import store

HARD: dict[str, Any] = {"weight_decay": 0.3, "batch_size": 2, "gradient_accumulation": 2, "max_grad_norm": 0.1}
CHOICES: list[dict[str, Any]] = [
    {"select": "magnitude", "density": 0.2, "scope": "global"},
    {"select": "gradient", "every": 2},
    {"select": "fused", "mask": "soft", "every": 2},
    {"select": "child_f", "density": 0.2},
    {"select": "half", "every": 3, "train": "llm.layers"},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", [pytest.param(one, marks=[] if n == 2 else pytest.mark.slow) for n, one in enumerate(CHOICES)], ids=str
)
def test_what_moved_is_what_the_masks_say_and_a_stop_changes_nothing(
    tiny_llama: Path, tmp_path: Path, choice: dict[str, Any]
) -> None:
    settings = {**choice, **HARD, "max_steps": 7, "warmup": 0}
    report = tune(tiny_llama, tmp_path, "whole", **settings)
    before, after = weights(tiny_llama), weights(tmp_path / "whole")
    found = store.read(tmp_path / "whole" / store.MASKS)
    assert found.masks.keys() <= before.keys()
    for name in before:
        moved = after[name].float() != before[name].float()
        allowed = found.touched.get(name)
        assert not moved.any() if allowed is None else not (moved & ~allowed).any(), name
    assert any(bool(mask.any()) for mask in found.masks.values())
    if choice.get("mask") == "soft":
        assert all(after[n][~mask].equal(before[n].float()[~mask]) for n, mask in found.masks.items())
    counts = json.loads((tmp_path / "whole" / store.COUNTS).read_text())
    assert sum(one["selected"] for one in counts["parts"]) == sum(int(mask.sum()) for mask in found.masks.values())
    assert report.record["job"]["select"] == choice["select"]

    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **settings, progress=StopsAt(3))
    tune(tiny_llama, tmp_path, **settings, resume=True)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")
    for file in (store.MASKS, store.COUNTS, store.DRAWING):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_the_expert_is_a_checkpoint_like_any_other(tiny_llama: Path, tmp_path: Path) -> None:
    listener = Listener()
    tune(tiny_llama, tmp_path, select="gradient", density=0.05, max_steps=2, progress=listener)
    opened = Checkpoint.open(tmp_path / "out")
    assert opened.tensors.keys() == Checkpoint.open(tiny_llama).tensors.keys()
    assert not [file for file in opened.other_files if file.startswith("ktmerge-")]
    assert (tmp_path / "out" / store.DRAWING).read_text().startswith("<svg")
    assert any(
        note.startswith("selecting by gradient: 4,982 of 99,648 elements move (5.00%)") for note in listener.notes
    )
    assert any(note.startswith("  llm.layers[1]: ") for note in listener.notes)
    # under another name of the weights the masks are still not taken for them
    (tmp_path / "out/model.safetensors").rename(tmp_path / "out/weights.safetensors")
    assert Checkpoint.open(tmp_path / "out").weight_files == ("weights.safetensors",)


@pytest.mark.slow
def test_everything_chosen_is_full_tuning(tiny_llama: Path, tmp_path: Path) -> None:
    tune(tiny_llama, tmp_path, "full", max_steps=3)
    tune(tiny_llama, tmp_path, "all", max_steps=3, select="random", density=1.0)
    assert sha256(tmp_path / "full") == sha256(tmp_path / "all")


@pytest.mark.slow
def test_the_command_line_takes_it_and_refuses_what_does_not_fit(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    line = ["finetune", "--base", str(tiny_llama), "--data", str(tmp_path / "train.jsonl"), "--out"]
    line += [str(tmp_path / "out"), "--set", "max_steps=1", "--select", "magnitude", "--density", "0.3"]
    with pytest.raises(SystemExit) as left:
        main([*line, "--every", "2"])
    assert left.value.code == 2
    assert "select magnitude chooses once" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main([*line, "--scope", "global"])
    assert left.value.code == 0
    masks = store.read(tmp_path / "out" / store.MASKS).masks
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.3 * total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "moment"),
    [
        (CHOICES[1], "any time"),
        (CHOICES[2], "while saving"),
        (CHOICES[3], "any time"),
        (CHOICES[4], "while publishing"),
    ],
    ids=str,
)
def test_a_killed_selective_run_resumes_to_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, choice: dict[str, Any], moment: str
) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "chats.jsonl", CHATS)
    settings = {**JOB, **choice, **HARD, "max_steps": 18, "save_every": 2}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(settings), tiny_llama, tmp_path, moment], stderr=subprocess.DEVNULL
    )
    log, deadline = tmp_path / "out.partial/log.jsonl", time.monotonic() + 1200
    while moment == "any time" and process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count('"loss"') >= 5:
            process.kill()
        time.sleep(0.002)
    assert process.wait(1200) == -signal.SIGKILL
    tune(tiny_llama, tmp_path, **settings, resume=True)
    shutil.move(tmp_path / "out", tmp_path / "resumed")
    tune(tiny_llama, tmp_path, **settings)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "resumed")
    assert (tmp_path / "out" / store.MASKS).read_bytes() == (tmp_path / "resumed" / store.MASKS).read_bytes()
