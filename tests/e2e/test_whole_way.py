"""The whole way through the real command line: fine-tune, blend, score, report, on a tiny model."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from commands import command, ktmerge
from commands import digests as every_digest

pytestmark = pytest.mark.slow

ROWS = [{"prompt": f"Is {n} good?", "completion": " yes" if n % 2 else " no"} for n in range(40)]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every weight file below a folder."""
    return {file: digest for file, digest in every_digest(folder).items() if file.endswith(".safetensors")}


@pytest.fixture
def workshop(tmp_path: Path, tiny_llama: Path) -> Path:
    """A folder with data, a suite and a recipe for everything."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:32]))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[32:]))
    texts = [{"text": "The quick brown fox jumps over the lazy dog. " * 6} for _ in range(4)]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "suite.yaml").write_text(
        """
upstream:
  - {name: prose, kind: text, data: prose.jsonl, chunk_tokens: 32}
downstream:
  - name: yesno
    kind: choice
    data: dev.jsonl
    prompt: "{{ prompt }}"
    choices: ["yes", "no"]
    answer: "{{ completion }}"
"""
    )
    (tmp_path / "recipe.yaml").write_text(
        f"""
ktmerge: 1
name: whole-way
base: {tiny_llama}
experts:
  yesno: {{model: runs/yesno}}
blend: {{method: linear, lambda: 0.5}}
finetune:
  experts:
    yesno:
      data: train.jsonl
      eval_upstream: train.jsonl
      max_steps: 6
      batch_size: 4
      learning_rate: 1e-3
      save_every: 2
eval: {{suite: suite.yaml, bootstrap: 200}}
"""
    )
    return tmp_path


def test_run_goes_the_whole_way_and_resumes(workshop: Path) -> None:
    done = ktmerge("run", "recipe.yaml", "--out", "result", "--json", cwd=workshop)
    result = json.loads(done.stdout)
    assert set(result["experts"]) == {"yesno"}
    page = (workshop / "result/report.html").read_text()
    assert "<svg" in page
    assert "whole-way" in page
    scores = json.loads((workshop / "result/scores.json").read_text())
    assert list(scores["models"]) == ["base", "yesno", "blended"]

    before = digests(workshop)
    refused = ktmerge("run", "recipe.yaml", "--out", "result", cwd=workshop, code=2)
    assert "--resume" in refused.stderr
    ktmerge("run", "recipe.yaml", "--out", "result", "--resume", cwd=workshop)
    assert digests(workshop) == before


def test_each_step_by_itself(workshop: Path, tiny_llama: Path) -> None:
    shown = ktmerge("finetune", "--recipe", "recipe.yaml", "--preview", "1", cwd=workshop)
    assert "⟦" in shown.stdout
    ktmerge("finetune", "--recipe", "recipe.yaml", cwd=workshop)
    refused = ktmerge("finetune", "--recipe", "recipe.yaml", cwd=workshop, code=2)
    assert "overwrite" in refused.stderr

    plan = json.loads(ktmerge("blend", "-r", "recipe.yaml", "--dry-run", "--json", cwd=workshop).stdout)
    assert plan
    assert not (workshop / "blended").exists()
    ktmerge("blend", "-r", "recipe.yaml", "--out", "blended", cwd=workshop)
    refused = ktmerge("blend", "-r", "recipe.yaml", "--out", "blended", cwd=workshop, code=2)
    assert "--overwrite" in refused.stderr
    ktmerge("blend", "-r", "recipe.yaml", "--out", "blended", "--overwrite", cwd=workshop)

    for end, same_as in (("0.0", tiny_llama), ("1.0", workshop / "runs/yesno")):
        ktmerge(
            "blend", "-r", "wise-ft", "--base", tiny_llama, "--expert", "yesno=runs/yesno", "--out", f"end{end}",
            "--set", f"blend.lambda={end}", "--set", f"output.dtype={'base' if end == '0.0' else 'float32'}",
            cwd=workshop,
        )  # fmt: skip
        from safetensors.torch import load_file

        blended, expected = (
            load_file(workshop / f"end{end}/model.safetensors"),
            load_file(same_as / "model.safetensors"),
        )
        assert set(blended) == set(load_file(tiny_llama / "model.safetensors"))
        for name in blended:
            assert blended[name].equal(expected[name].to(blended[name].dtype)), name

    ktmerge(
        "eval",
        "runs/yesno",
        "half=blended",
        "--recipe",
        "recipe.yaml",
        "--out",
        "scores.json",
        "--no-cache",
        cwd=workshop,
    )
    ktmerge("report", "scores.json", "--out", "page.html", "--recipe", "recipe.yaml", cwd=workshop)
    compared = ktmerge("compare", "scores.json", "--json", cwd=workshop)
    assert list(json.loads(compared.stdout)["models"]) == ["base", "yesno", "half"]
    inspected = ktmerge("inspect", tiny_llama, "runs/yesno", "--json", cwd=workshop)
    assert json.loads(inspected.stdout)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["blend", "-r", "recipe.yaml", "--set", "blend.lamda=1", "--out", "x"], "Did you mean 'lambda'"),
        (["blend", "-r", "recipe.yaml", "--set", "blend.method=tiess", "--out", "x"], "Did you mean 'ties'"),
        (["blend", "-r", "recipe.yaml", "--out", "x"], "runs/yesno"),
        (["blend", "-r", "recpe.yaml", "--out", "x"], "recpe.yaml: no such recipe file"),
        (["finetune", "-r", "recipe.yaml", "--only", "yesnoo"], "Did you mean 'yesno'"),
        (["finetune", "--data", "train.jsonl"], "--recipe, or all of"),
        (["eval", "x", "--suite", "suite.yaml"], "--base"),
        (["report", "train.jsonl"], "train.jsonl"),
        (["recipe", "check", "nothing-like-it"], "neither a file nor a recipe of the gallery"),
        (["recipe", "check", "recipe.yaml", "--set", "blend.where=[{part: visoin, keep: base}]"], "vis"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(workshop: Path, arguments: list[str], expected: str) -> None:
    before = sorted(workshop.rglob("*"))
    done = ktmerge(*arguments, cwd=workshop, code=2)
    assert expected in done.stderr
    assert sorted(workshop.rglob("*")) == before


@pytest.mark.parametrize("how", ["Ctrl-C", "closed terminal"])
def test_a_stopped_finetune_resumes_to_the_same_bytes(workshop: Path, how: str) -> None:
    ktmerge("finetune", "--recipe", "recipe.yaml", cwd=workshop)
    whole = digests(workshop / "runs/yesno")

    job = command("finetune", "--recipe", "recipe.yaml", "--set", "finetune.experts.yesno.max_steps=6")
    shutil.rmtree(workshop / "runs")
    ours, its = pty.openpty()
    process = subprocess.Popen(
        job, cwd=workshop, stdin=its, stdout=its, stderr=its, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY),
    )  # fmt: skip
    os.close(its)
    partial, said = workshop / "runs/yesno.partial", b""
    stopped = False
    while chunk := _read(ours):
        said += chunk
        if not stopped and list(partial.rglob("checkpoint-*")):
            stopped = True
            if how == "closed terminal":
                break
            process.send_signal(signal.SIGINT)
    os.close(ours)
    if process.wait(timeout=1200) == 0:
        pytest.skip("it finished before the signal came")
    assert process.returncode == 130, said
    assert how == "closed terminal" or b"--resume" in said
    assert not (workshop / "runs/yesno").exists()
    ktmerge("finetune", "--recipe", "recipe.yaml", "--resume", cwd=workshop)
    assert digests(workshop / "runs/yesno") == whole
    assert not partial.exists()


def _read(terminal: int) -> bytes:
    """What was said to a terminal; nothing once nobody is there to say anything."""
    try:
        return os.read(terminal, 65_536)
    except OSError:
        return b""


def test_a_run_killed_at_any_moment_comes_to_the_same_result(workshop: Path) -> None:
    whole = command("run", "recipe.yaml", "--out", "result", "--resume")
    started = time.monotonic()
    ktmerge(*whole[3:], cwd=workshop)
    seconds = time.monotonic() - started
    expected, scores = digests(workshop), scores_of(workshop / "result")
    for made in ("runs", "result"):
        shutil.rmtree(workshop / made)

    generator = random.Random(0)
    killed = 0
    while killed < 5:
        started = time.monotonic()
        process = subprocess.Popen(whole, cwd=workshop, stderr=subprocess.PIPE, text=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0.3, 1.0) * seconds)
        process.kill()
        _, said = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), said
        killed += process.returncode != 0
        if not process.returncode:  # it was faster than before
            assert digests(workshop) == expected
            seconds = min(seconds, time.monotonic() - started)
            for made in ("runs", "result"):
                shutil.rmtree(workshop / made)
    ktmerge(*whole[3:], cwd=workshop)
    assert digests(workshop) == expected
    assert scores_of(workshop / "result") == scores
    assert sorted(path.name for path in (workshop / "runs").iterdir()) == ["yesno"]
    assert not [path for path in (workshop / "result").iterdir() if path.name.startswith(".")]


def scores_of(result: Path) -> Any:
    models = json.loads((result / "scores.json").read_text())["models"]
    return {name: one["summary"] for name, one in models.items()}


@pytest.mark.parametrize("seconds", [0.2, 0.6, 1.2, 2.0])
def test_ctrl_c_during_a_blend_says_so_and_leaves_nothing(workshop: Path, tiny_llama: Path, seconds: float) -> None:
    blend = command("blend", "-r", "ties", "--base", tiny_llama, "--expert", f"a={tiny_llama}", "--out", "x")
    process = subprocess.Popen(blend, cwd=workshop, stderr=subprocess.PIPE, text=True)
    before = sorted(workshop.iterdir())
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=1200)
    assert "Traceback" not in stderr or process.returncode == -signal.SIGINT  # before the command line was up
    if process.returncode == 130:
        assert "interrupted" in stderr
        assert sorted(workshop.iterdir()) == before
