"""sha256 of files, remembered by size, times and inode: a file that has not changed is read for it once."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ktmerge.checkpoints.adapter import CONFIG, WEIGHTS, is_adapter
from ktmerge.checkpoints.cache import cache_folder
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.files import clear_os_errors, file_digest, write_whole
from ktmerge.checkpoints.header import FileStamp
from ktmerge.checkpoints.tokens import FILES
from ktmerge.errors import KtmergeError

_SETTLED_NS = 2_000_000_000
"""A file younger than this could be written again without its time showing it: it is not remembered."""
_STAMPS = 16
"""So many earlier stamps are remembered of a file that is touched again and again, but not changed."""

_MEANT = frozenset({"config.json", *FILES, "special_tokens_map.json", "tokenizer.model", "merges.txt"})
"""What says how the weights beside it are to be read."""


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and sha256, as hexadecimal, of one file."""

    size: int
    sha256: str


class Stopped(Exception):  # noqa: N818 - not an error: the caller asked for it
    """Hashing was stopped half-way."""


def digest_of(path: Path, stop: threading.Event | None = None, *, rehash: bool = False) -> FileDigest:
    """Size and sha256 of a file, from memory if it is the same file still.

    Args:
        path: of the file.
        stop: ends the reading when it is set.
        rehash: read the file, whatever is remembered.

    Raises:
        KtmergeError: it cannot be read, or changed meanwhile.
        Stopped: ``stop`` was set.
    """
    with clear_os_errors(path):
        stamp = FileStamp.of(path.stat())
        known = None if rehash else _recall(path, stamp)
        if known is not None:
            return known

        def look() -> None:
            if stop is not None and stop.is_set():
                raise Stopped

        while True:
            digest = file_digest(path, look)
            before, stamp = stamp, FileStamp.of(path.stat())
            if stamp == before:
                break
            if not stamp.may_have_bytes_of(before):
                raise KtmergeError(f"{path}: changed while it was read.")
    found = FileDigest(stamp.size, digest)
    if time.time_ns() - stamp.mtime_ns > _SETTLED_NS:
        _keep(path, stamp, found)
    return found


def holds_still(path: Path, before: FileStamp) -> bool:
    """Whether a file has the bytes that it had with an earlier stamp.

    It is read for that if it was touched since; what was not remembered before cannot be told, and is denied.

    Raises:
        KtmergeError: it cannot be read, or changes meanwhile.
    """
    known = _recall(path, before)
    return known is not None and digest_of(path) == known


def recalled(path: Path, stamp: FileStamp | None = None) -> FileDigest | None:
    """Size and sha256 of a file, as it is or as it was with a stamp, if they are remembered; it is not read."""
    try:
        return _recall(path, stamp or FileStamp.of(path.stat()))
    except OSError:
        return None


def is_remembered(path: Path) -> bool:
    """Whether the sha256 of a file is known, be it as it was before it was touched."""
    return bool(_kept(path)[1])


def remember(path: Path, sha256: str) -> None:
    """Take the digest of a file that was just written, from who wrote it."""
    with suppress(OSError):
        stamp = FileStamp.of(path.stat())
        _keep(path, stamp, FileDigest(stamp.size, sha256))


def input_files(checkpoint: Checkpoint, *, carried: bool = False) -> dict[str, Path]:
    """The files that decide what a checkpoint means: weights, index, configuration, tokenizer.

    Args:
        checkpoint: or an adapter over a model, whose folders both count.
        carried: also everything that travels with the weights.

    Returns:
        paths by name below the checkpoint's folder; where there are two, names start with the folder's.
    """
    folders = list(dict.fromkeys(checkpoint.roots))
    if len(folders) == 1:
        return _files(checkpoint, carried)
    are_alike = len({folder.name for folder in folders}) < len(folders)
    files: dict[str, Path] = {}
    for number, folder in enumerate(folders):
        found = _adapter(folder) if is_adapter(folder) else _files(Checkpoint.open(folder), carried=False)
        called = f"{folder.name}-{number}" if are_alike else folder.name
        files |= {f"{called}/{name}": path for name, path in found.items()}
    return files


def _files(checkpoint: Checkpoint, carried: bool) -> dict[str, Path]:
    beside = (name for name in checkpoint.other_files if carried or name.rpartition("/")[2] in _MEANT)
    indexes = [f"{branch}/{index}" for branch, index in checkpoint.branches if index] + [checkpoint.index_file or ""]
    names = {*checkpoint.weight_files, *filter(None, indexes), *beside}
    return {name: checkpoint.root / name for name in sorted(names)}


def _adapter(folder: Path) -> dict[str, Path]:
    """Its tokenizer, if it has one, goes before its model's."""
    tokens = sorted(name for name in FILES if (folder / name).exists())
    return {name: folder / name for name in (CONFIG, WEIGHTS, *tokens)}


def _place(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return cache_folder() / "digests" / name[:2] / f"{name}.json"


def _recall(path: Path, stamp: FileStamp) -> FileDigest | None:
    sha256, stamps = _kept(path)
    return FileDigest(stamp.size, sha256) if vars(stamp) in stamps else None


def _kept(path: Path) -> tuple[str, list[dict[str, int]]]:
    """The sha256 that is remembered of a file, and the stamps it had with it, the last at the end."""
    try:
        kept = json.loads(_place(path).read_text(encoding="ascii"))
        return str(kept["sha256"]), list(kept["stamps"])
    except (OSError, ValueError, LookupError, TypeError):
        return "", []


def _keep(path: Path, stamp: FileStamp, found: FileDigest) -> None:
    """Whole or not at all; a memory that cannot be written costs only time."""
    place = _place(path)
    sha256, stamps = _kept(path)
    earlier = [one for one in stamps if one != vars(stamp)][-_STAMPS:] if sha256 == found.sha256 else []
    with suppress(OSError, KtmergeError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps({"sha256": found.sha256, "stamps": [*earlier, vars(stamp)]}), sync=False)
