"""A finished output counts as done only while it is what was written, from what the job names."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuning import Listener, sha256, tune

from ktmerge.errors import UsageError
from ktmerge.tuners.finished import is_finished

INPUTS = {"job": {"seed": 1}}
EVALUATED = {"eval_upstream": "chats.jsonl", "eval_downstream": "train.jsonl", "eval_every": 4}


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = pytest.mark.parametrize(
    ("damage", "said"),
    [
        (changed, "model.safetensors has been changed or cut off since"),
        (cut_off, "model.safetensors has been changed or cut off since"),
        (Path.unlink, "model.safetensors is missing"),
    ],
)


@DAMAGES
def test_weights_are_held_against_their_digests(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    files = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert is_finished(tmp_path, INPUTS, INPUTS, files, overwrite=False)
    damage(weights)
    with pytest.raises(UsageError, match=f"made by this very job, but its {said}; put back .* add --overwrite"):
        is_finished(tmp_path, INPUTS, INPUTS, files, overwrite=False)
    assert not is_finished(tmp_path, INPUTS, INPUTS, files, overwrite=True)


@pytest.fixture
def done(tuned: Any, tmp_path: Path) -> Path:
    """A copy of a finished fine-tune."""
    shutil.copytree(tuned[0], tmp_path / "out")
    return tmp_path / "out"


def test_a_fine_tune_whose_weights_are_damaged_is_not_called_done(done: Path, tiny_llama: Path) -> None:
    listener, whole = Listener(), (done / "model.safetensors").read_bytes()
    record = tune(tiny_llama, done.parent, **EVALUATED, resume=True, progress=listener).record
    assert "already what the job asks for" in listener.notes[-1]
    assert record["output"]["sha256"] == {"model.safetensors": sha256(done)}
    changed(done / "model.safetensors")
    with pytest.raises(
        UsageError, match=r"out: was made by this very job, but its model\.safetensors has been changed"
    ):
        tune(tiny_llama, done.parent, **EVALUATED, resume=True)
    (done / "model.safetensors").write_bytes(whole)
    tune(tiny_llama, done.parent, **EVALUATED, resume=True)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("chat_template.jinja", "<|im_end|>", "<|im_end|> ", "tokenisation of the upstream data was "),
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', "configuration of the base was "),
    ],
)
def test_a_base_that_reads_or_computes_otherwise_makes_another_model(
    done: Path, tiny_llama: Path, file: str, old: str, new: str, said: str
) -> None:
    base = done.parent / "base"
    shutil.copytree(tiny_llama, base)
    text = (base / file).read_text()
    assert old in text
    (base / file).write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=f"made with other settings: .*{said}"):
        tune(base, done.parent, **EVALUATED, resume=True)


def test_a_record_that_is_no_record_is_other_settings(done: Path, tiny_llama: Path) -> None:
    (done / "ktmerge-run.json").write_text(json.dumps({"inputs": [1], "output": None}))
    with pytest.raises(UsageError, match="made with other settings"):
        tune(tiny_llama, done.parent, **EVALUATED, resume=True)
