"""Recipes that come with ktmerge: each names a method and says when to use it; base and experts are given by you."""

from __future__ import annotations

from pathlib import Path

from ktmerge.checkpoints.files import near_file
from ktmerge.checkpoints.regular import is_file
from ktmerge.errors import UsageError, did_you_mean

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the gallery's recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def locate(reference: str | Path) -> tuple[Path, bool]:
    """The file a reference means, and whether it is the gallery's. An existing file wins over a gallery name.

    Raises:
        UsageError: neither a file nor a gallery name.
    """
    path, own = Path(reference), _FOLDER / f"{reference}.yaml"
    if is_file(path, reference):
        return path, False
    if own.parent == _FOLDER and is_file(own, reference):
        return own, True
    if path.is_dir():
        raise UsageError(f"{reference}: is a folder; name the recipe's file.")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UsageError(f"{reference}: no such recipe file.{near_file(path)}")
    raise UsageError(
        f"'{reference}' is neither a file nor a recipe of the gallery.{did_you_mean(str(reference), names())}"
    )
