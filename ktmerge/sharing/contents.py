"""What a bundle may hold, by name and size. There is no place in it for code, nor for anything not named here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ktmerge.errors import UsageError, printable
from ktmerge.recipes.document import MAX_BYTES

MANIFEST = "ktmerge-bundle.json"
RECIPE = "recipe.yaml"
LOCK = "recipe.lock.yaml"
CARD = "README.md"
MODEL_CARD = "MODEL_CARD.md"
SUITES = "suites"
SCORES = "scores"
DELTA = "delta"
DELTA_FILES = (f"{DELTA}/delta.json", f"{DELTA}/delta.bin")
FOLDERS = (SUITES, SCORES, DELTA)
SUFFIX = ".ktr"

REQUIRED = (MANIFEST, RECIPE, LOCK)
MAX_FILES = 128
MAX_TOTAL = 1 << 29
"""Bytes of all files but the delta, of which there may be any number that a disk holds."""
_MAX_TEXT = 1_000_000
_MAX_SCORES = 1 << 26
_LIMITS = {
    MANIFEST: _MAX_TEXT,
    RECIPE: MAX_BYTES,
    LOCK: MAX_BYTES,
    CARD: _MAX_TEXT,
    MODEL_CARD: _MAX_TEXT,
    DELTA_FILES[0]: 1 << 28,
    DELTA_FILES[1]: 1 << 42,
}
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
"""What Windows takes for a device, whatever comes after the first dot."""
_NUMBERED = {
    re.compile(rf"{SUITES}/{_NAME}\.yaml", re.ASCII): MAX_BYTES,
    re.compile(rf"{SCORES}/{_NAME}\.json", re.ASCII): _MAX_SCORES,
}


def limit(name: str) -> int | None:
    """The most bytes that a file of this name may have; None if a bundle holds no file of this name."""
    if name in _LIMITS:
        return _LIMITS[name]
    if name.rpartition("/")[2].partition(".")[0].casefold() in _DEVICES:
        return None
    return next((most for pattern, most in _NUMBERED.items() if pattern.fullmatch(name)), None)


def require_names(names: Iterable[str], where: str) -> None:
    """Refuse names that a bundle cannot hold: so no path leaves its folder, and nothing in it can be run.

    Raises:
        UsageError: one is none of a bundle's, stands twice, differs from another by case only, or there are too many;
            or what a bundle needs is missing.
    """
    seen: dict[str, str] = {}
    for name in names:
        if limit(name) is None:
            raise UsageError(
                f"{where}: holds '{_short(name)}', which is no file of a bundle (recipe, lock, card, {SUITES}/*.yaml, "
                f"{SCORES}/*.json, {DELTA}); nothing was unpacked."
            )
        if name.casefold() in seen:
            raise UsageError(f"{where}: holds '{name}' twice (or in two spellings); nothing was unpacked.")
        seen[name.casefold()] = name
        if len(seen) > MAX_FILES:
            raise UsageError(f"{where}: holds more than {MAX_FILES} files; nothing was unpacked.")
    missing = [name for name in REQUIRED if name.casefold() not in seen]
    if missing:
        raise UsageError(f"{where}: is no bundle of a recipe: it has no {missing[0]}; 'ktmerge recipe pack' makes one.")
    if 0 < sum(name.casefold() in seen for name in DELTA_FILES) < len(DELTA_FILES):
        raise UsageError(f"{where}: holds half of a delta; nothing was unpacked.")


def require_sizes(sizes: Mapping[str, int], where: str) -> None:
    """Refuse sizes that are told before anything is read.

    Raises:
        UsageError: a file, or all together, are larger than a bundle's.
    """
    for name, size in sizes.items():
        most = limit(name)
        if most is None or not 0 <= size <= most:
            raise UsageError(f"{where}: '{_short(name)}' has {size} bytes, at most {most or 0} are taken.")
    total = sum(size for name, size in sizes.items() if name not in DELTA_FILES)
    if total > MAX_TOTAL:
        raise UsageError(f"{where}: its files have {total} bytes, at most {MAX_TOTAL} are taken.")


def _short(name: str) -> str:
    return printable(name if len(name) <= 80 else f"{name[:77]}...")
