"""Rows of a task's data file: reading, drawing, digest. Knows nothing of prompts or models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from ktmerge.recipes.suites import TaskBase

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row; ``where`` names its file and line (or row) in messages, ``number`` counts from 0 in the file."""

    number: int
    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """What a task is scored on: the drawn rows in file order, and the sha256 of the whole file."""

    rows: list[Row]
    digest: str


def read_rows(task: TaskBase, folder: Path) -> Rows:
    """Read ``task.data`` (relative to ``folder``) and draw ``task.limit`` rows with ``task.seed``.

    Raises:
        UsageError: the file is missing, empty or not what its name says; file and line are named.
    """
    path = folder / task.data
    data = _bytes(task, path)
    read = _parquet_rows if path.suffix == ".parquet" else _json_rows
    rows = list(read(path, data))
    if not rows:
        raise UsageError(f"task '{task.name}': {path} has no rows.")
    return Rows(draw(rows, task.limit, task.seed), hashlib.sha256(data).hexdigest())


def draw(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """Draw ``limit`` rows without replacement, in file order.

    Rows are ranked by a hash of (seed, row number), so that the draw is the same on every machine and version, and a
    larger limit only adds rows.
    """
    if limit is None or limit >= len(rows):
        return rows
    ranked = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}:{row.number}".encode()).digest())
    return sorted(ranked[:limit], key=lambda row: row.number)


def _bytes(task: TaskBase, path: Path) -> bytes:
    if path.suffix not in SUFFIXES:
        raise UsageError(f"task '{task.name}': {path} is none of {', '.join(SUFFIXES)}.")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        near = did_you_mean(path.name, _data_files(path.parent))
        hint = near if near.startswith(" Did you mean") else ""
        raise UsageError(f"task '{task.name}': {path}: no such file.{hint}") from None
    except OSError as error:
        raise UsageError(f"task '{task.name}': {path}: cannot be read: {error.strerror}.") from None


def _data_files(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if path.suffix in SUFFIXES]
    except OSError:
        return []


def _json_rows(path: Path, data: bytes) -> Iterator[Row]:
    """Rows of a JSON list of objects, or of one object a line; what the text starts with decides, not the name."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file in UTF-8 (byte {error.start}).") from None
    if text.lstrip()[:1] == "[":
        values = _parse(text, str(path))
        numbered = ((f"{path}, row {number + 1}", value) for number, value in enumerate(values))
    else:
        lines = ((f"{path}:{number + 1}", line) for number, line in enumerate(text.split("\n")) if line.strip())
        numbered = ((where, _parse(line, where)) for where, line in lines)
    for number, (where, value) in enumerate(numbered):
        if not isinstance(value, dict):
            raise UsageError(f"{where}: a row is an object with named values, not {_kind(value)}.")
        yield Row(number, where, value)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}).") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply.") from None


def _parquet_rows(path: Path, data: bytes) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
    for number, values in enumerate(table.to_pylist()):
        yield Row(number, f"{path}, row {number + 1}", values)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")
