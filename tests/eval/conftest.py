"""Fixtures of the eval room: a second tiny model, data files, a suite, made-up results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge.eval import evaluate
from ktmerge.eval.results import Results
from ktmerge.eval.scores import ModelInfo, TaskInfo, TaskScore
from ktmerge.recipes.suites import Suite


@pytest.fixture(scope="session")
def tuned_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with every weight moved a little."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("tuned") / "llama"
    shutil.copytree(tiny_llama, folder)
    generator = torch.Generator().manual_seed(7)
    weights = load_file(folder / "model.safetensors")
    moved = {
        name: tensor + (0.05 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in weights.items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def llama(tiny_llama: Path) -> Any:
    """The tiny model in memory, fp32."""
    import torch

    from ktmerge.eval.loading import load_model

    return load_model(tiny_llama, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    from ktmerge.eval.loading import load_tokenizer

    return load_tokenizer(tiny_llama)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Iterable[Any]], str]:
    """Write rows as JSONL into the test's folder; return the file's name."""

    return partial(write_rows, tmp_path)


def write_rows(folder: Path, name: str, rows: Iterable[Any]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without gains and scores drawn, which takes longer than all else of them."""
    monkeypatch.setattr("ktmerge.eval.page.tradeoff", lambda *_: None)
    monkeypatch.setattr("ktmerge.eval.page.score_pictures", lambda results: [])


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """All three kinds of task on both sides."""
    return write_suite(tmp_path)


@pytest.fixture(scope="session")
def results(tiny_llama: Path, tuned_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The scores of both models on a suite like ``suite``. Read-only: the whole session shares them."""
    shared = write_suite(tmp_path_factory.mktemp("suite"))
    return evaluate({"tuned": tuned_llama, "base": tiny_llama}, shared, bootstrap=200, device="cpu")


def write_suite(folder: Path) -> Suite:
    """Write the data of the ``suite`` fixture."""
    write = partial(write_rows, folder)
    places = ["France", "Paris", "beginning", "earth", "review", "fox", "dog"]
    questions = [
        {
            "q": f"The capital of {places[i % 7]} {i}",
            "options": ["yes", "no way", f"the {places[i % 5]}"],
            "gold": i % 3,
        }
        for i in range(12)
    ]
    return Suite(
        name="tiny",
        upstream=[
            {"name": "facts", "kind": "choice", "data": write("facts.jsonl", questions), "prompt": "{{ q }} is",
             "choices": "options", "answer": "{{ gold }}"},
            {"name": "prose", "kind": "text", "chunk_tokens": 24,
             "data": write("prose.jsonl", [{"text": "The quick brown fox jumps over the lazy dog. " * 5}] * 3)},
        ],
        downstream=[
            {"name": "verdict", "kind": "choice", "data": "facts.jsonl", "prompt": "Is {{ q }} good?", "chat": True,
             "choices": ["yes", "no"], "answer": "{{ 'yes' if gold else 'no' }}"},
            {"name": "say", "kind": "generate", "data": "facts.jsonl", "prompt": "{{ q }}", "answer": "{{ gold }}",
             "max_new_tokens": 4},
        ],
        folder=folder,
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_results() -> Callable[..., Results]:
    """Results from item scores, ``{model: {task: [0, 1, ...]}}``; tasks named ``up...`` are upstream."""

    def _make(scores: dict[str, dict[str, list[float]]], **more: Any) -> Results:
        tasks = next(iter(scores.values()))
        infos = [
            TaskInfo(
                name, "upstream" if name.startswith("up") else "downstream", "choice", "acc", f"task-{name}",
                f"data-{name}", list(range(len(items))), [f"prompt {i}" for i in range(len(items))], [0] * len(items),
            )
            for name, items in tasks.items()
        ]  # fmt: skip
        return Results(
            **{
                "suite": "made up",
                "suite_digest": "suite",
                "tasks": infos,
                "models": {
                    name: ModelInfo(f"/models/{name}", f"digest-{name}", "tokenizer", "cpu", "float32", 1.5)
                    for name in scores
                },
                "scores": {
                    name: {task: TaskScore(np.array(items, dtype=float), {}) for task, items in found.items()}
                    for name, found in scores.items()
                },
                "bootstrap": 200,
                "created": "2026-01-02T03:04:05+00:00",
                "versions": {"ktmerge": "0.1.0"},
                **more,
            }
        )

    return _make
