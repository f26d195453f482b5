"""A bundle from wherever it is into a folder, which appears whole or not at all, and only if all in it is in order."""

from __future__ import annotations

import hashlib
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
from ktmerge.sharing.manifest import FileEntry, Manifest, read_manifest
from ktmerge.sharing.source import Offer, offer_of


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
    staging = Staging(out, overwrite)
    staging.open()
    try:
        staging.require_space(offer.size or 0)
        if offer.manifest is None:  # fetched whole, it is a file that can be looked at
            offer = offer_of(_fetched(offer, staging.folder))
        manifest = offer.manifest
        if manifest is None:
            raise KtmergeError(f"{offer.where}: does not show what it holds.")
        place = staging.folder / "bundle"
        place.mkdir()
        with progress.task(f"fetch {offer.where}", offer.size, "bytes") as step:
            _copy(offer, manifest, place, staging.folder, step)
        recipe = require_bundle(place, manifest, offer.where)
        _publish(staging, place)
    finally:
        staging.discard()
    commands = {"blend": blend_command(manifest.inputs, recipe, str(out))}
    if contents.DELTA_FILES[0] in manifest.files:
        commands["or apply"] = apply_command(str(out))
    return Unpacked(out, offer, commands)


def _fetched(offer: Offer, folder: Path) -> Any:
    from ktmerge.sharing.web import UrlSource

    if not isinstance(offer.source, UrlSource):
        raise KtmergeError(f"{offer.where}: does not show what it holds.")
    return offer.source.fetched(folder)


def _copy(offer: Offer, manifest: Manifest, place: Path, scratch: Path, step: Step) -> None:
    """Every file as the manifest says, to the byte; nothing is read past the size it tells."""
    raw = offer.source.manifest()
    if read_manifest(raw, offer.where) != manifest:
        raise UsageError(f"{offer.where}: is not what was shown; it changed meanwhile.")
    with clear_os_errors(place):
        (place / contents.MANIFEST).write_bytes(raw)
    for name, entry in manifest.files.items():
        path = place / name
        with clear_os_errors(path):
            path.parent.mkdir(exist_ok=True)
            with path.open("xb") as target:
                _stream(offer, name, entry, target, scratch, step)


def _stream(offer: Offer, name: str, entry: FileEntry, target: Any, scratch: Path, step: Step) -> None:
    digest, count = hashlib.sha256(), 0
    for block in offer.source.blocks(name, scratch):
        count += len(block)
        if count > entry.size:
            raise UsageError(f"{offer.where}: '{name}' is larger than was told; nothing was unpacked.")
        digest.update(block)
        target.write(block)
        step.advance(len(block))
    if count != entry.size or digest.hexdigest() != entry.sha256:
        raise UsageError(f"{offer.where}: '{name}' is not what its manifest says; it is broken or was changed.")


def _publish(staging: Staging, place: Path) -> None:
    """Leave nothing in the temporary folder but the bundle, and make that the output."""
    import shutil

    with clear_os_errors(staging.folder):
        for other in staging.folder.iterdir():
            if other != place:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        for path in list(place.iterdir()):
            path.rename(staging.folder / path.name)
        place.rmdir()
        sync_tree(staging.folder)
    staging.publish()
