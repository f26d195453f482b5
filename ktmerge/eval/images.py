"""The images of a task's rows: found and looked at before anything is scored. Knows no models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.eval.rows import HUB
from ktmerge.eval.templates import Template, is_template, missing_column
from ktmerge.recipes.images import Image, ImageError, check_images, images_of
from ktmerge.recipes.rows import Row, listing
from ktmerge.recipes.suites import AnyTask


@dataclass(frozen=True)
class RowImages:
    """The images of rows, by where a row is.

    Attributes:
        of: rows without an image are not in it.
        digest: sha256 over the image files that rows name by path; those that rows hold count with the rows.
    """

    of: Mapping[str, tuple[Image, ...]] = field(default_factory=dict)
    digest: str = ""


def row_images(task: AnyTask, rows: Sequence[Row], folder: Path) -> RowImages:
    """The images that ``task`` shows with its rows, every one of them read once.

    Args:
        task: with ``image``, or there are none.
        rows: all that are asked or shown.
        folder: where the suite's relative paths start.

    Raises:
        UsageError: images that are missing or broken, all together, with the rows that name them; or no row has one.
    """
    if task.image is None:
        return RowImages()
    columns = [_Column(one, f"task '{task.name}', image") for one in _as_list(task.image)]
    root = _root(task, folder)
    found: dict[str, tuple[Image, ...]] = {}
    problems: list[str] = []
    for row in rows:
        try:
            images = tuple(image for column in columns for image in images_of(column.value(row), root))
        except ImageError as error:
            problems.append(f"{row.where}: {error}")
            continue
        if images:
            found[row.where] = images
    problems += check_images(found.items())
    if problems:
        raise UsageError(listing([f"task '{task.name}': {problem}" for problem in problems]))
    if not found:
        raise UsageError(f"task '{task.name}', image: none of its {len(rows)} rows has an image.")
    return RowImages(found, _digest(found))


class _Column:
    """A column by its name, or an expression over the row."""

    def __init__(self, source: str, where: str) -> None:
        self._source, self._where = source, where
        self._template = Template(source, where) if is_template(source) else None

    def value(self, row: Row) -> Any:
        if self._template is not None:
            return self._template.value(row)
        if self._source not in row.values:
            raise missing_column(self._where, row, [self._source])
        return row.values[self._source]


def _as_list(value: list[str] | str) -> list[str]:
    return value if isinstance(value, list) else [value]


def _root(task: AnyTask, folder: Path) -> Path:
    if task.images is not None:
        root = folder / task.images
        if not root.is_dir():
            raise UsageError(f"task '{task.name}', images: {root}: there is no such folder.")
        return root
    if task.data.startswith(HUB):
        return folder
    data = folder / task.data
    return data if data.is_dir() else data.parent


def _digest(found: Mapping[str, tuple[Image, ...]]) -> str:
    digest = hashlib.sha256()
    known: dict[Path, bytes] = {}
    for images in found.values():
        for image in images:
            if image.path is None:
                continue
            if image.path not in known:
                known[image.path] = bytes.fromhex(image.digest())
            digest.update(known[image.path])
    return digest.hexdigest() if known else ""
