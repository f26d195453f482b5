"""What a recipe calls its models, seen from another folder."""

from __future__ import annotations

import os
from pathlib import Path


def moved(reference: str, source: Path, folder: Path) -> str:
    """A reference that holds in the folder ``source``, for a recipe in ``folder``; none but relative paths change."""
    if "+" in reference and not (source / reference).exists():
        return "+".join(moved(part, source, folder) for part in reference.split("+"))
    path = Path(reference).expanduser()
    if not reference or path.is_absolute() or not (source / path).exists():
        return reference
    return way_to(source / path, folder)


def way_to(path: Path, folder: Path) -> str:
    """The relative path from a folder, also where links lead to either: ``..`` of a linked folder is not its name's."""
    there = Path(os.path.realpath(path.parent)) / path.name
    return os.path.relpath(there, os.path.realpath(folder))
