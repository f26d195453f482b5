"""A bundle from wherever it is into a folder, which appears whole or not at all, and only if all in it is in order."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.staging import Staging, sync_tree
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.progress import SILENT, Progress, Step
from ktmerge.sharing import contents
from ktmerge.sharing.checking import require_bundle
from ktmerge.sharing.command import apply_command, blend_command
from ktmerge.sharing.fetching import PREFIX, bytes_in
from ktmerge.sharing.manifest import FileEntry, Manifest, read_manifest
from ktmerge.sharing.source import ArchiveSource, FolderSource, Offer, Source, offer_of

_BUNDLE = "bundle"
_WORTH_KEEPING = 1 << 20
"""Bytes of a download that was stopped, from which on the next goes on with them."""


@dataclass(frozen=True)
class Unpacked:
    """A bundle that was let in.

    Attributes:
        out: its folder.
        offer: what it was.
        commands: what can be done with it.
    """

    out: Path
    offer: Offer
    commands: dict[str, str]

    def pairs(self) -> dict[str, str]:
        """The main facts as text, for a terminal."""
        return {"written": str(self.out), **self.commands}

    def to_json(self) -> dict[str, Any]:
        return {"out": str(self.out), **self.offer.to_json(), "commands": self.commands}


def unpack(offer: Offer, out: Path, *, overwrite: bool = False, progress: Progress = SILENT) -> Unpacked:
    """Fetch a bundle that was looked at, check it, and make it the folder ``out``.

    Raises:
        UsageError: it is not what was shown, something in it is not in order, or ``out`` exists.
        KtmergeError: it cannot be fetched, or the disk is full.
    """
    staging, is_kept = Staging(out, overwrite), False
    staging.open(_has_parts)
    try:
        with clear_os_errors(staging.folder):
            shutil.rmtree(staging.folder / _BUNDLE, ignore_errors=True)
        copies = 1 if isinstance(offer.source, ArchiveSource | FolderSource) else 2  # as it comes, and unpacked
        staging.require_space(copies * (offer.size or 0) - bytes_in(staging.folder))
        try:
            with progress.task(f"fetch {offer.where}", offer.size, "bytes") as step:
                source = offer.source.fetched(staging.folder, step)
        except BaseException:
            is_kept = _is_worth_keeping(staging.folder, progress)
            raise
        if offer.manifest is None:  # now it is a file that can be looked at
            offer = offer_of(source)
        manifest = offer.manifest
        if manifest is None:
            raise KtmergeError(f"{offer.where}: does not show what it holds.")
        place = staging.folder / _BUNDLE
        place.mkdir()
        with progress.task(f"check {offer.where}", offer.size, "bytes") as step:
            _copy(source, offer.where, manifest, place, step)
        recipe = require_bundle(place, manifest, offer.where)
        _publish(staging, place)
    finally:
        staging.leave() if is_kept else staging.discard()
    commands = {"blend": blend_command(manifest.inputs, recipe, str(out))}
    if contents.DELTA_FILES[0] in manifest.files:
        commands["or apply"] = apply_command(str(out))
    return Unpacked(out, offer, commands)


def _has_parts(folder: Path) -> bool:
    """Whether a run of this user that was killed has left something of a download there."""
    return os.stat(folder).st_uid == os.getuid() and any(folder.glob(f"{PREFIX}*"))


def _is_worth_keeping(folder: Path, progress: Progress) -> bool:
    count = bytes_in(folder)
    if count >= _WORTH_KEEPING:
        progress.note(f"{count / 1e6:.1f} MB were fetched, and are kept: the same command goes on from there.")
    return count >= _WORTH_KEEPING


def _copy(source: Source, where: str, manifest: Manifest, place: Path, step: Step) -> None:
    """Every file as the manifest says, to the byte; nothing is read past the size it tells."""
    raw = source.manifest()
    if read_manifest(raw, where) != manifest:
        raise UsageError(f"{where}: is not what was shown; it changed meanwhile.")
    with clear_os_errors(place):
        (place / contents.MANIFEST).write_bytes(raw)
    for name, entry in manifest.files.items():
        path = place / name
        with clear_os_errors(path):
            path.parent.mkdir(exist_ok=True)
            with path.open("xb") as target:
                _stream(source, where, name, entry, target, step)


def _stream(source: Source, where: str, name: str, entry: FileEntry, target: Any, step: Step) -> None:
    digest, count = hashlib.sha256(), 0
    for block in source.blocks(name):
        count += len(block)
        if count > entry.size:
            raise UsageError(f"{where}: '{name}' is larger than was told; nothing was unpacked.")
        digest.update(block)
        target.write(block)
        step.advance(len(block))
    if count != entry.size or digest.hexdigest() != entry.sha256:
        raise UsageError(f"{where}: '{name}' is not what its manifest says; it is broken or was changed.")


def _publish(staging: Staging, place: Path) -> None:
    """Leave nothing in the temporary folder but the bundle, and make that the output."""
    with clear_os_errors(staging.folder):
        for other in staging.folder.iterdir():
            if other != place:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        for path in list(place.iterdir()):
            path.rename(staging.folder / path.name)
        place.rmdir()
        sync_tree(staging.folder)
    staging.publish()
