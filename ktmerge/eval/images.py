"""The images of a task's rows: found and looked at before anything is scored. Knows no models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.eval.hub import HUB
from ktmerge.eval.templates import Column
from ktmerge.recipes.images import Image, ImageError, check_images, images_of
from ktmerge.recipes.rows import Row, listing
from ktmerge.recipes.suites import AnyTask


@dataclass(frozen=True)
class RowImages:
    """The images of rows, by where a row is.

    Attributes:
        of: rows without an image are not in it.
        choices: images that are a row's choices, one for each.
        digest: sha256 over the image files that rows name by path; those that rows hold count with the rows.
    """

    of: Mapping[str, tuple[Image, ...]] = field(default_factory=dict)
    choices: Mapping[str, tuple[Image, ...]] = field(default_factory=dict)
    digest: str = ""


def row_images(task: AnyTask, rows: Sequence[Row], folder: Path) -> RowImages:
    """The images that ``task`` shows with its rows, every one of them read once.

    Args:
        task: with ``image`` or ``choice_images``, or there are none.
        rows: all that are asked or shown.
        folder: where the suite's relative paths start.

    Raises:
        UsageError: images that are missing or broken, all together, with the rows that name them; or no row has one.
    """
    named = {"image": task.image, "choice_images": getattr(task, "choice_images", None)}
    given = {key: sources for key, sources in named.items() if sources is not None}
    if not given:
        return RowImages()
    root = _root(task, folder)
    found: dict[str, dict[str, tuple[Image, ...]]] = {"image": {}, "choice_images": {}}
    problems: list[str] = []
    for key, sources in given.items():
        columns = [Column(one, f"task '{task.name}', {key}") for one in _as_list(sources)]
        take = _choices_of if key == "choice_images" else _images_of
        for row in rows:
            try:
                images = take([column.value(row) for column in columns], root)
            except ImageError as error:
                problems.append(f"{row.where}: {error}")
                continue
            if images:
                found[key][row.where] = images
    problems += check_images([*found["image"].items(), *found["choice_images"].items()])
    if problems:
        raise UsageError(listing([f"task '{task.name}': {problem}" for problem in problems]))
    for key in given:
        if not found[key]:
            raise UsageError(f"task '{task.name}', {key}: none of its {len(rows)} rows has an image.")
    return RowImages(found["image"], found["choice_images"], _digest([*found.values()]))


def _images_of(values: Sequence[Any], root: Path) -> tuple[Image, ...]:
    return tuple(image for value in values for image in images_of(value, root))


def _choices_of(values: Sequence[Any], root: Path) -> tuple[Image, ...]:
    """One image for each choice; only after the last may be nulls, where rows have fewer choices than columns."""
    listed = values[0] if len(values) == 1 and isinstance(values[0], list | tuple) else values
    found = [images_of(value, root) for value in listed]
    while found and not found[-1]:
        found.pop()
    for number, images in enumerate(found, 1):
        if len(images) != 1:
            raise ImageError(f"choice {number} has {len(images)} images, exactly one is needed.")
    return tuple(images[0] for images in found)


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


def _digest(found: Sequence[Mapping[str, tuple[Image, ...]]]) -> str:
    digest = hashlib.sha256()
    known: dict[Path, bytes] = {}
    for images in (images for one in found for images in one.values()):
        for image in images:
            if image.path is None:
                continue
            if image.path not in known:
                known[image.path] = bytes.fromhex(image.digest())
            digest.update(known[image.path])
    return digest.hexdigest() if known else ""
