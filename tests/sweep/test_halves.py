"""What chooses a recipe never reports on it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.recipes.suites import Suite
from ktmerge.sweep.halves import read_halves

TEXTS = {"name": "texts", "kind": "text", "data": "texts.jsonl", "chunk_tokens": 8}
ASKED = {
    "name": "asked", "kind": "generate", "data": "asked.jsonl", "each": {"question": "questions"},
    "prompt": "{{ question }}", "answer": "yes",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty long texts, and thirty passages with three questions each."""
    rows = [{"text": f"text {n} " * 20, "questions": [f"{n} {i}?" for i in range(3)]} for n in range(30)]
    for name in ("texts", "asked"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def halves(folder: Path, *selection: float, **changes: Any) -> Any:
    """Of suites of the same tasks with these shares for selection; ``changes`` are of the second's texts."""
    suites = [
        Suite(upstream=[{**TEXTS, **own}], downstream=[ASKED], selection=share, folder=folder)
        for share, own in zip(selection, ({}, changes), strict=False)
    ]
    parts = ("selection" if selection[0] else None, None)
    return read_halves(SimpleNamespace(suite=suites[0], held_out=suites[-1], parts=parts))  # type: ignore[arg-type]


def test_a_text_or_passage_is_wholly_in_one_half(folder: Path) -> None:
    found = halves(folder, 0.5)
    texts, passages = (
        [{say(item) for item in half[place].items} for half in found]
        for place, say in ((0, lambda item: item.row), (1, lambda item: item.prompt.split()[0]))
    )
    for chosen, reported in (texts, passages):
        assert chosen
        assert reported
        assert not chosen & reported
        assert len(chosen | reported) == 30


def test_rows_in_both_halves_are_refused(folder: Path) -> None:
    (folder / "other.jsonl").write_text('{"text": "other"}\n')
    (folder / "copy.jsonl").write_bytes((folder / "texts.jsonl").read_bytes())
    with pytest.raises(UsageError, match="task 'texts': 30 of its 30 rows to report on are among those that choose"):
        halves(folder, 0, 0)
    with pytest.raises(UsageError, match="task 'texts': 30 of its 30 rows"):
        halves(folder, 0, 0, data="copy.jsonl")
    with pytest.raises(UsageError, match="task 'asked': 90 of its 90 rows"):
        halves(folder, 0, 0, data="other.jsonl")
    with pytest.raises(UsageError, match="rows to report on"):
        halves(folder, 0.5, 0.2)
    halves(folder, 0.5, 0.5, data="copy.jsonl")
