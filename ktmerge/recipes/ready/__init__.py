"""Evaluation suites that come with ktmerge, written against public datasets; their data are not included."""

from __future__ import annotations

import os
from pathlib import Path

from ktmerge.checkpoints.files import near_file
from ktmerge.checkpoints.regular import is_file
from ktmerge.errors import UsageError, did_you_mean

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the ready suites, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def locate(reference: str | Path) -> tuple[Path, Path]:
    """The file that a reference means, and the folder where its relative paths start.

    An existing file wins over a ready suite's name. Of a ready suite, paths start in ``$KTMERGE_DATASETS``, else in the
    current folder.

    Raises:
        UsageError: neither a file nor a ready suite.
    """
    path = Path(reference)
    if is_file(path, reference):
        return path, path.resolve().parent
    if str(reference) in names():
        return _FOLDER / f"{reference}.yaml", Path(os.environ.get("KTMERGE_DATASETS") or Path.cwd())
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UsageError(f"{reference}: no such file.{near_file(path)}")
    raise UsageError(f"'{reference}' is neither a file nor a ready suite.{did_you_mean(str(reference), names())}")
