"""Deltas: a model as what it is apart from its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from ktmerge.deltas import DeltaReport


def export_delta(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    error: float | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> DeltaReport:
    """Write what ``model`` is apart from ``base`` into the folder ``out``.

    Args:
        base: folder or hub id of what whoever applies the delta has.
        model: folder or hub id of what is handed over.
        out: folder of the delta.
        error: norm of what may be left out of each tensor's change, over the norm of the change; None: nothing.
        overwrite: replace a delta that is there.
        progress: where to report to.

    Raises:
        UsageError: a folder is no checkpoint, ``error`` is not between 0 and 1, or ``out`` exists.
        KtmergeError: weights cannot be read, or the disk is full.
    """
    from ktmerge import deltas
    from ktmerge.checkpoints.hub import resolve

    below, above = (resolve(str(one), Path.cwd()) for one in (base, model))
    return deltas.export_delta(below, above, Path(out), error=error, overwrite=overwrite, progress=progress)


def apply_delta(
    base: str | Path, delta: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> DeltaReport:
    """Write the model that ``delta`` makes of ``base`` into the folder ``out``.

    In the folder of a bundle, it has to be what the bundle's lock says came out of the recipe.

    Raises:
        UsageError: another base than the delta's, a folder that is no delta or a broken one, or ``out`` exists; or
            the bundle's recipe gave another model.
        KtmergeError: something cannot be read or written.
    """
    from ktmerge import deltas
    from ktmerge.checkpoints.hub import resolve

    below, wanted = resolve(str(base), Path.cwd()), _locked_beside(Path(delta))
    return deltas.apply_delta(below, Path(delta), Path(out), wanted=wanted, overwrite=overwrite, progress=progress)


def _locked_beside(delta: Path) -> dict[str, str]:
    """What came out of the recipe whose bundle a delta lies in; nothing of one that lies in none."""
    from ktmerge.merge.lock import read_lock
    from ktmerge.sharing import contents

    folder = delta.absolute().parent
    if delta.name != contents.DELTA or not (folder / contents.MANIFEST).is_file():
        return {}
    return dict(read_lock(folder / contents.LOCK).get("output", {}).get("sha256", {}))
