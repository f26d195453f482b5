"""Rows of a data file, whatever holds them: JSON lines, a JSON list or parquet. Knows nothing of sample formats."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.errors import did_you_mean, first_line

_BLOCK = 1 << 20
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row; ``where`` is its file and number, for messages."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Rows:
    """What a file holds; ``problems`` says which rows could not be read."""

    rows: list[Row]
    problems: list[str]
    digest: str


def read_rows(path: Path, name: str) -> Rows:
    """Read all rows of ``path``, called ``name`` in messages. The content decides the kind, not the suffix."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4096)
        digest = _sha256(path)
        found = _parquet(path) if start.startswith(b"PAR1") else _json(path)
    except FileNotFoundError:
        return _unreadable(f"{name}: no such data file{_in(path)}.{_sibling(path)}")
    except IsADirectoryError:
        return _unreadable(f"{name}: is a folder; name the data files in it.{_sibling(path / 'data')}")
    except UnicodeDecodeError:
        return _unreadable(f"{name}: is neither text in UTF-8 nor parquet.")
    except _FileError as error:
        return _unreadable(f"{name}: {error}")
    except OSError as error:
        return _unreadable(f"{name}: cannot be read: {error.strerror or error}.")
    rows: list[Row] = []
    problems: list[str] = []
    for number, value in found:
        where = f"{name}: row {number}"
        if isinstance(value, dict):
            rows.append(Row(value, where))
        else:
            problems.append(f"{where} is {value if isinstance(value, _Broken) else 'not an object with columns'}.")
    if not rows and not problems:
        problems.append(f"{name}: there are no rows in it.")
    return Rows(rows, problems, digest)


def _unreadable(problem: str) -> Rows:
    return Rows([], [problem], "")


class _FileError(Exception):
    """What is wrong with a whole file, without its name."""


class _Broken(str):
    """Stands for a row that could not be parsed, and says why."""


def _json(path: Path) -> list[tuple[int, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return list(enumerate(_whole(text), 1))
    # split("\n"), not splitlines(): a row may hold other line separators of Unicode
    found = [(number, _line(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if found and all(isinstance(value, _Broken) for _, value in found):
        _whole(text)
        raise _FileError("is one JSON object; it must be a list of rows, or one row a line.")
    return found


def _whole(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _FileError(f"is not valid JSON: {error}.") from None


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Broken(f"not valid JSON ({error})")


def _parquet(path: Path) -> list[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise _FileError(f"is not valid parquet: {first_line(error)}") from None
    return list(enumerate(rows, 1))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _in(path: Path) -> str:
    return "" if path.parent.is_dir() else f" (there is no folder {path.parent.name})"


def _sibling(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return ""
    return did_you_mean(path.name, [one.name for one in folder.iterdir() if one.suffix in _SUFFIXES])
