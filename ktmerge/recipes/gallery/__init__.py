"""Recipes that come with ktmerge: each names a method and says when to use it; base and experts are given by you."""

from __future__ import annotations

from pathlib import Path

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
    try:
        if path.is_file():
            return path, False
        if own.parent == _FOLDER and own.is_file():
            return own, True
    except OSError as error:  # a name too long, a folder not to be entered
        raise UsageError(f"{reference}: cannot be looked up: {error.strerror}.") from None
    if path.is_dir():
        raise UsageError(f"{reference}: is a folder; name the recipe's file.")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UsageError(f"{reference}: no such recipe file.")
    raise UsageError(
        f"'{reference}' is neither a file nor a recipe of the gallery.{did_you_mean(str(reference), names())}"
    )
