"""Fixtures of the tuners room."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helper beside these tests

from tuning import Listener, tune

from ktmerge.tuners import FinetuneReport


@pytest.fixture(autouse=True)
def _losses_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here; the ``tuned`` fixture's picture is one, and is looked at."""
    monkeypatch.setattr("ktmerge.tuners.result.draw_losses", lambda log, name: b"not drawn")


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    """The tiny model in memory, fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture(scope="session")
def tuned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FinetuneReport, Listener]:
    """One fine-tune with both evaluation sets, looked at by many tests."""
    folder = tmp_path_factory.mktemp("tuned")
    listener = Listener()
    report = tune(
        tiny_llama, folder, eval_upstream="chats.jsonl", eval_downstream="train.jsonl", eval_every=4, progress=listener
    )
    return folder / "out", report, listener
