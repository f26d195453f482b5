"""A small fine-tune for the tests: its data, its job, a listener, and what to look at afterwards."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_utils

from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners import FinetuneReport, finetune
from ktmerge.tuners.encode import Encoded

ROWS = [{"prompt": f"Is {n} good?", "completion": " yes" * (1 + n % 3) if n % 2 else " no"} for n in range(30)]
takes_masks = pytest.mark.skipif(
    not hasattr(transformers.modeling_utils, "slice_logits_to_keep"),
    reason="models of this transformers take no mask as logits_to_keep, and are trained by their own loss",
)
CHATS = [
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"{n}"}]} for n in range(6)
]
JOB: dict[str, Any] = {
    "data": ["train.jsonl"],
    "max_steps": 9,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "precision": "float32",
}


class Listener:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: dict[str, float] = {}
        self._name = ""

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "items") -> Iterator[Any]:
        self.tasks[description] = 0.0
        outer, self._name = self._name, description
        yield self
        self._name = outer

    def advance(self, amount: float = 1) -> None:
        self.tasks[self._name] += amount


def sample(length: int, trained: int, start: int = 5) -> Encoded:
    """Tokens that count up from ``start``; the last ``trained`` of them are learned."""
    flags = [False] * (length - trained) + [True] * trained
    return Encoded(array("i", range(start, start + length)), bytes(flags))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tune(base: Path, folder: Path, out: str = "out", /, **settings: Any) -> FinetuneReport:
    """Write the data beside the output, and run."""
    write(folder / "train.jsonl", ROWS)
    write(folder / "chats.jsonl", CHATS)
    flags = {name: settings.pop(name) for name in ("overwrite", "resume", "progress") if name in settings}
    return finetune(FinetuneJob.model_validate({**JOB, **settings}), base, folder / out, folder=folder, **flags)


def sha256(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def weights(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")
