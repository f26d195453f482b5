"""The rows a task is scored on: read, and drawn the same way everywhere. Knows nothing of prompts or models."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.errors import UsageError
from ktmerge.recipes import rows as files
from ktmerge.recipes.rows import Row, Rows

if TYPE_CHECKING:
    from ktmerge.recipes.suites import TaskBase


def read_rows(task: TaskBase, folder: Path) -> Rows:
    """Read ``task.data`` (relative to ``folder``) and draw ``task.limit`` rows with ``task.seed``.

    Raises:
        UsageError: the file is missing, empty or broken somewhere; task, file and line are named.
    """
    path = folder / task.data
    found = files.read_rows(path, str(path))
    if found.problems:
        raise UsageError(files.listing([f"task '{task.name}': {problem}" for problem in found.problems]))
    return Rows(draw(found.rows, task.limit, task.seed), digest=found.digest)


def draw(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """Draw ``limit`` rows without replacement, in file order.

    Rows are ranked by a hash of (seed, row number), so that the draw is the same on every machine and version, and a
    larger limit only adds rows.
    """
    if limit is None or limit >= len(rows):
        return rows
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row.number}".encode()).digest())
    return sorted(ranked[:limit], key=lambda row: row.number)
