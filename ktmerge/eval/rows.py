"""The rows a task is scored on: read, and drawn the same way everywhere. Knows nothing of prompts or models."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ktmerge.errors import UsageError, did_you_mean
from ktmerge.eval.hub import COPIES, HUB, by_library, from_disk, is_saved
from ktmerge.eval.shaping import joined, kept, taken_apart
from ktmerge.recipes import rows as files
from ktmerge.recipes.rows import SUFFIXES, Row, Rows

if TYPE_CHECKING:
    from ktmerge.recipes.suites import TaskBase

Part = Literal["all", "selection", "report"]
PARTS: tuple[Part, ...] = ("all", "selection", "report")


def part_named(name: str | None, share: float) -> Part:
    """The part called ``name``; by default the report's where a ``share`` of the rows is for selection, else all.

    Raises:
        UsageError: no such part, or no rows are for selection.
    """
    for part in PARTS:
        if name == part and (share or part == "all"):
            return part
    if name in PARTS:
        raise UsageError(f"part {name}: the suite keeps no rows for selection; give it 'selection: 0.3', say.")
    if name is not None:
        raise UsageError(f"part {name}: there is no such part.{did_you_mean(name, PARTS)}")
    return "report" if share else "all"


def read_rows(task: TaskBase, folder: Path, share: float = 0.0, part: Part = "all") -> Rows:
    """Read the data of ``task`` (relative to ``folder``), keep a part of them and draw ``task.limit`` rows.

    Args:
        task: what to read.
        folder: where relative paths start.
        share: of the rows that are for selection.
        part: which rows to keep: all, those for selection, or those for the report.

    Raises:
        UsageError: the data are missing, empty or broken somewhere; task, file and line are named.
    """
    found = whole(task, folder, task.data, task.subset, task.split)
    rows = of_part(found.rows, share, part)
    if not rows:
        raise UsageError(f"task '{task.name}': none of its {len(found.rows)} rows falls into the part for {part}.")
    return Rows(draw(rows, task.limit, task.seed), digest=found.digest)


def whole(task: TaskBase, folder: Path, data: str, subset: str | None, split: str | None, key: str = "") -> Rows:
    """All rows of some data, shaped as ``task`` wants its rows.

    Args:
        task: says how to take rows apart, what to add to them and which to leave out.
        folder: where relative paths start.
        data: what to read: the task's data, or its worked examples.
        subset: of the data.
        split: of the data.
        key: of the task that names the data, for messages.

    Raises:
        UsageError: the data cannot be read or do not have that shape.
    """
    named = f"task '{task.name}'{f', {key}' if key else ''}"
    found = _named(named, data, folder, subset, split)
    rows, digest = kept(taken_apart(found.rows, task.each, task.name), task.where, task.name), found.digest
    if task.join is not None:
        others = _named(f"{named}, join", task.join.data, folder, task.join.subset, task.join.split)
        rows = joined(rows, others.rows, task.join.by, task.join.key, task.name)
        digest = hashlib.sha256(f"{digest}\n{others.digest}".encode()).hexdigest()
    return Rows(rows, digest=digest)


def _named(name: str, data: str, folder: Path, subset: str | None, split: str | None) -> Rows:
    try:
        return load(data, folder, subset, split)
    except UsageError as error:
        lines = str(error).splitlines()
        raise UsageError("\n".join(line if line.startswith("...") else f"{name}: {line}" for line in lines)) from None


def load(data: str, folder: Path, subset: str | None, split: str | None) -> Rows:
    """All rows of a file, of a folder's files or of a Hugging Face dataset.

    Raises:
        UsageError: they cannot be read.
    """
    if data.startswith(HUB):
        return _dataset(data.removeprefix(HUB), subset, split)
    path = folder / data
    if is_saved(path):
        return from_disk(path, subset, split)
    if path.is_dir():
        return _folder(path, subset, split)
    if subset or split:
        raise UsageError(f"{path}: a single file has neither subset nor split; leave them out.")
    return _file(path)


def _file(path: Path) -> Rows:
    found = files.read_rows(path, str(path))
    if found.problems:
        raise UsageError(files.listing(found.problems))
    return found


def _folder(path: Path, subset: str | None, split: str | None) -> Rows:
    """The files of one split, as datasets lie in repositories: ``[subset/][data/]test-00000-of-00001.parquet``."""
    root = path / subset if subset else path
    if not root.is_dir():
        raise UsageError(f"{path}: there is no folder '{subset}' in it.{did_you_mean(str(subset), _names(path))}")
    if split is None:
        raise UsageError(f"{path}: is a folder; say with 'split' which of its files to read.")
    candidates = [file for place in (root, root / "data") if place.is_dir() for file in sorted(place.iterdir())]
    data = [file for file in candidates if file.suffix in SUFFIXES]
    chosen = [file for file in data if file.name.split(".")[0].split("-")[0] == split]
    if not chosen:
        known = {file.name.split(".")[0].split("-")[0] for file in data}
        raise UsageError(f"{root}: no data file whose name begins with '{split}'.{did_you_mean(split, known)}")
    parts = [_file(file) for file in chosen]
    digest = hashlib.sha256("\n".join(part.digest for part in parts).encode()).hexdigest()
    rows = [row for part in parts for row in part.rows]
    return Rows([Row(number, row.where, row.values) for number, row in enumerate(rows)], digest=digest)


def _names(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir()]


def _dataset(name: str, subset: str | None, split: str | None) -> Rows:
    """Rows of a dataset: of a copy in ``$KTMERGE_DATASETS/owner/name``, or else as the datasets library finds it."""
    if not name.strip():
        raise UsageError(f"{HUB}{name}: names no dataset; write {HUB}owner/name.")
    if is_saved(Path(name)):
        return from_disk(Path(name), subset, split)
    if split is None:
        raise UsageError(f"{HUB}{name}: say with 'split' which part of the dataset to read.")
    copies = os.environ.get(COPIES)
    if copies and (Path(copies) / name).is_dir():
        return _copy(Path(copies) / name, subset, split)
    return by_library(name, subset, split)


def _copy(folder: Path, subset: str | None, split: str) -> Rows:
    """Rows of a repository's copy: by the names of its files, or else by its card, as the datasets library reads it."""
    try:
        return _folder(folder, subset, split)
    except UsageError as error:
        try:
            return by_library(str(folder), subset, split)
        except UsageError:
            raise error from None


def of_part(rows: list[Row], share: float, part: Part) -> list[Row]:
    """The rows for selection, a ``share`` of all drawn by a hash of the row's number, or the others for the report.

    A row stays in its part whatever limit and seed are, so that what chose a recipe never reports on it; so do all that
    one row of the file was taken apart into, which show the same image or passage.
    """
    if part == "all":
        return rows
    return [row for row in rows if _for_selection(row, share) == (part == "selection")]


def _for_selection(row: Row, share: float) -> bool:
    number = row.number if row.source is None else row.source
    word = hashlib.sha256(f"part:{number}".encode()).digest()[:8]
    return int.from_bytes(word, "big") < share * 2**64


def draw(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """Draw ``limit`` rows without replacement, in file order.

    Rows are ranked by a hash of (seed, row number), so that the draw is the same on every machine and version, and a
    larger limit only adds rows.
    """
    if limit is None or limit >= len(rows):
        return rows
    return sorted(ranked(rows, f"{seed}")[:limit], key=lambda row: row.number)


def ranked(rows: list[Row], key: str) -> list[Row]:
    """Rows in an order that only ``key`` and their numbers decide."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{key}:{row.number}".encode()).digest())
