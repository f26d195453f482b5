"""Rows of a data file, whatever holds them: JSON, CSV or parquet. Knows nothing of samples or tasks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktmerge.errors import did_you_mean, first_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""What data files are usually called; the content decides how one is read."""
_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: from 0 in its file, or among the rows that those of the file were taken apart into.
        where: names file and line (or row) in messages.
        source: number of the file's row that it was taken from, if that is another.
    """

    number: int
    where: str
    values: dict[str, Any]
    source: int | None = None


@dataclass(frozen=True)
class Rows:
    """What a file holds.

    Attributes:
        rows: those that could be read.
        problems: a sentence for everything that is wrong, file and line named; nothing else may be relied on then.
        digest: sha256 of the file.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    digest: str = ""


def read_rows(path: Path, name: str) -> Rows:
    """Read all rows of ``path``, called ``name`` in messages; raises nothing."""
    try:
        if path.is_char_device() or path.is_block_device():  # may have no end
            return Rows(problems=[f"{name}: is a device, no file."])
        data = path.read_bytes()
    except FileNotFoundError:
        return Rows(problems=[f"{name}: no such file{_folder_missing(path)}.{_near(path.name, path.parent)}"])
    except IsADirectoryError:
        return Rows(problems=[f"{name}: is a folder; name the data files in it.{_near('', path)}"])
    except OSError as error:
        return Rows(problems=[f"{name}: cannot be read: {error.strerror or error}."])
    except ValueError:  # half a character, or none at all
        return Rows(problems=[f"{name!r} names no file."])
    rows, problems = [], []
    try:
        for number, (where, value) in enumerate(_values(data, path.suffix, name)):
            if isinstance(value, dict):
                rows.append(Row(number, where, value))
            elif isinstance(value, _Broken):
                problems.append(f"{where}: {value}.")
            else:
                problems.append(f"{where}: a row is an object with named values, not {_kind(value)}.")
    except _FileError as error:
        return Rows(problems=[f"{name}: {error}"])
    if not rows and not problems:
        problems.append(f"{name}: there are no rows in it.")
    return Rows(rows, problems, hashlib.sha256(data).hexdigest())


def listing(problems: Sequence[str], shown: int = _SHOWN) -> str:
    """The first few problems, one a line, and how many more there are."""
    rest = len(problems) - shown
    return "\n".join([*problems[:shown], *([f"... and {rest} more problems in the data."] if rest > 0 else [])])


class _FileError(Exception):
    """What is wrong with a whole file, without its name."""


class _Broken(str):
    """Stands for a row that could not be parsed, and says why."""


def _values(data: bytes, suffix: str, name: str) -> Iterator[tuple[str, Any]]:
    """Where and what: every row of a file, parsed."""
    if data.startswith(b"PAR1") or suffix == ".parquet":
        return ((f"{name}, row {number}", value) for number, value in enumerate(_parquet(data), 1))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _FileError(
            f"is neither parquet nor text in UTF-8 (line {line}, byte {error.start}); save it as UTF-8."
        ) from None
    if suffix in _DELIMITERS:
        return _table(text, _DELIMITERS[suffix], name)
    if text.lstrip().startswith("["):
        values = _parse(text)
        if isinstance(values, _Broken) and suffix in (".jsonl", ".ndjson"):
            return _lines(text, suffix, name)
        if isinstance(values, _Broken):
            raise _FileError(f"{values}.")
        return ((f"{name}, row {number}", value) for number, value in enumerate(values, 1))
    return _lines(text, suffix, name)


_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def _table(text: str, delimiter: str, name: str) -> Iterator[tuple[str, Any]]:
    """Rows under a first line of column names; every value is a text."""
    csv.field_size_limit(2**31 - 1)  # tables may hold pictures
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    try:
        for cells in lines:
            where = f"{name}:{lines.line_num}"
            if not columns:
                columns = cells
                if len(set(columns)) < len(columns) or not all(columns):
                    raise _FileError("its first line must name the columns, each differently.")
            elif len(cells) == len(columns):
                yield where, dict(zip(columns, cells, strict=True))
            elif cells:
                yield where, _Broken(f"{len(cells)} cells under {len(columns)} columns")
    except csv.Error as error:
        raise _FileError(f"not a valid table: {error} (line {lines.line_num}).") from None


def _lines(text: str, suffix: str, name: str) -> Iterator[tuple[str, Any]]:
    # split("\n"), not splitlines(): a row may hold other line separators of Unicode
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    # files that were joined bring their byte order marks along
    found = [(f"{name}:{number}", _parse(line.removeprefix("\ufeff"))) for number, line in numbered]
    broken = [isinstance(value, _Broken) for _, value in found]
    if any(broken):
        if all(broken) and suffix not in SUFFIXES:
            raise _FileError(f"is none of {', '.join(SUFFIXES)}.")
        whole = _parse(text)
        if _table_of(whole):
            return _listed(whole, name)
        if not isinstance(whole, _Broken):
            raise _FileError("is one JSON object; it must be a list of rows, or one row a line.")
    if suffix == ".json" and len(found) == 1 and _table_of(found[0][1]):
        return _listed(found[0][1], name)
    return iter(found)


def _listed(whole: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    key = _table_of(whole)
    return ((f"{name}, {key} row {number}", value) for number, value in enumerate(whole[key], 1))


def _table_of(whole: Any) -> str:
    """The key of a JSON object's only list of rows, as in ``{"info": ..., "questions": [...]}``, or an empty text.

    Turns of a conversation are no rows.
    """
    if not isinstance(whole, dict):
        return ""
    lists = {key: value for key, value in whole.items() if isinstance(value, list) and value}
    tables = [key for key, rows in lists.items() if all(_is_row(row) for row in rows)]
    return tables[0] if len(tables) == 1 else ""


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and not value.keys() & {"role", "from"}


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() or text.lstrip().startswith("[") else ""
        return _Broken(f"not valid JSON: {error.msg} ({line}column {error.colno})")
    except (RecursionError, ValueError):
        return _Broken("not valid JSON: nested too deeply, or with a number too long")


def _parquet(data: bytes) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except Exception as error:  # its own, and those of every type that its values become
        raise _FileError(f"not valid parquet: {first_line(error)}") from None
    return rows


def _folder_missing(path: Path) -> str:
    return "" if path.parent.is_dir() else f" (there is no folder {path.parent.name})"


def _near(wrong: str, folder: Path) -> str:
    """The data file of a folder that may be meant; all of them where they are few."""
    try:
        names = [path.name for path in folder.iterdir() if path.suffix in SUFFIXES and path.exists()]
    except OSError:
        return ""
    return did_you_mean(wrong, names, list_all=len(names) <= _SHOWN)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")
