"""Nothing is scored twice, whatever could change a score is scored again, and a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ktmerge.eval import evaluate
from ktmerge.eval.results import Results
from ktmerge.eval.scores import TaskScore
from ktmerge.eval.store import ScoreStore
from ktmerge.progress import Unit
from ktmerge.recipes.suites import Suite


class Scored:
    """A progress that keeps which sets were scored, and what it is told."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, total: float | None, unit: Unit = "items") -> Iterator[Any]:
        self.titles.append(description)

        class Step:
            def advance(self, amount: float = 1) -> None:
                pass

        yield Step()

    def note(self, text: str) -> None:
        self.notes.append(text)


TASKS = ("facts", "prose", "verdict", "say")


def run(models: dict[str, Path], suite: Suite, cache: Path, **more: Any) -> tuple[Results, list[str]]:
    progress = Scored()
    results = evaluate(models, suite, bootstrap=50, device="cpu", cache=cache, progress=progress, **more)
    return results, [title for title in progress.titles if title.partition(": ")[2] in TASKS]


def same(a: Results, b: Results) -> None:
    for name, tasks in a.scores.items():
        for task, score in tasks.items():
            assert score.to_json() == b.scores[name][task].to_json()


@pytest.mark.slow
def test_nothing_is_scored_twice(tiny_llama: Path, tuned_llama: Path, suite: Suite, tmp_path: Path) -> None:
    models = {"base": tiny_llama, "tuned": tuned_llama}
    first, scored = run(models, suite, tmp_path / "cache")
    assert scored == [f"{name}: {task}" for name in models for task in TASKS]
    second, scored = run(models, suite, tmp_path / "cache", batch_size=3)
    assert scored == []
    same(first, second)
    _, scored = run({"base": tuned_llama, "other": tiny_llama}, suite, tmp_path / "cache")
    assert scored == [], "scores belong to weights, not to names"

    lines = (tmp_path / "prose.jsonl").read_text().splitlines()
    (tmp_path / "prose.jsonl").write_text("\n".join([*lines, lines[0]]))
    _, scored = run(models, suite, tmp_path / "cache")
    assert scored == ["base: prose", "tuned: prose"], "only what has other data"


def test_a_damaged_file_is_scored_again(tiny_llama: Path, suite: Suite, tmp_path: Path) -> None:
    first, _ = run({"base": tiny_llama}, suite, tmp_path / "cache")
    files = sorted((tmp_path / "cache").rglob("*.json"))
    assert len(files) == 4
    files[0].write_text("{}")
    files[1].write_text('{"scores": [1.0], "details": {}}')
    second, scored = run({"base": tiny_llama}, suite, tmp_path / "cache")
    assert len(scored) == 2
    same(first, second)


def test_the_key_holds_all_conditions(suite: Suite, tmp_path: Path) -> None:
    from ktmerge.eval import read_sets

    store, (one, *_) = ScoreStore(tmp_path), read_sets(suite)
    own = store.key(one, {"model": "a", "dtype": "float32"})
    assert own == store.key(one, {"dtype": "float32", "model": "a"})
    assert own != store.key(one, {"model": "b", "dtype": "float32"})
    assert own != store.key(one, {"model": "a", "dtype": "bfloat16"})


@pytest.mark.slow
def test_equal_weights_of_another_configuration_are_scored(tiny_llama: Path, suite: Suite, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    results, scored = run({"base": tiny_llama, "other": other}, suite, tmp_path / "cache")
    assert len(scored) == 8
    facts = {name: tasks["facts"].details for name, tasks in results.scores.items()}
    assert facts["base"] != facts["other"]


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ScoreStore(tmp_path / "file")
    assert "file" in store.put("abc", TaskScore(np.ones(2), {}))
    assert store.get("abc") is None


def test_what_cannot_be_kept_is_said(tiny_llama: Path, suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    progress = Scored()
    alone = Suite(upstream=[one for one in suite.tasks() if one.name == "facts"], folder=suite.folder)
    evaluate({"base": tiny_llama}, alone, device="cpu", cache=tmp_path / "cache", progress=progress)
    (said,) = progress.notes
    assert said.startswith("warning: facts: its scores are not kept for the next run: ")


KILLED = """
import json, os, signal, sys
from pathlib import Path
from ktmerge.eval import evaluate
from ktmerge.eval.store import ScoreStore
from ktmerge.recipes import load_suite
put, kept = ScoreStore.put, []
def last(self, key, score):
    put(self, key, score)
    kept.append(key)
    if len(kept) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
ScoreStore.put = last
base, tuned, suite, cache = map(Path, sys.argv[1:])
evaluate({"base": base, "tuned": tuned}, load_suite(suite), device="cpu", cache=cache)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tiny_llama: Path, tuned_llama: Path, suite: Suite, tmp_path: Path) -> None:
    document = {"upstream": [], "downstream": []}
    for side, tasks in (("upstream", suite.upstream), ("downstream", suite.downstream)):
        document[side] = [json.loads(task.model_dump_json(exclude_unset=True)) for task in tasks]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(document))
    paths = map(str, (tiny_llama, tuned_llama, tmp_path / "suite.yaml", tmp_path / "cache"))
    found = subprocess.run(
        [sys.executable, "-c", KILLED, *paths], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert found.returncode == -signal.SIGKILL
    models = {"base": tiny_llama, "tuned": tuned_llama}
    results, scored = run(models, suite, tmp_path / "cache")
    assert scored == ["tuned: verdict", "tuned: say"]
    same(results, run(models, suite, tmp_path / "fresh")[0])
