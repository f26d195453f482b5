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
from ktmerge.errors import KtmergeError

_SETTLED_NS = 2_000_000_000
"""A file younger than this could be written again without its time showing it: it is not remembered."""

_MEANT = frozenset(
    {"config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
     "tokenizer.model", "vocab.json", "merges.txt"}
)  # fmt: skip
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
    """Whether a file of which no more than the ctime has changed has the bytes that it had with an earlier stamp.

    It is read for that; what was not remembered before cannot be told, and is denied.

    Raises:
        KtmergeError: it cannot be read, or changes meanwhile.
    """
    known = _recall(path, before)
    if known is None:
        return False
    with clear_os_errors(path):
        stamp = FileStamp.of(path.stat())
        same = stamp.may_have_bytes_of(before) and file_digest(path) == known.sha256
        return same and FileStamp.of(path.stat()) == stamp


def recalled(path: Path) -> FileDigest | None:
    """Size and sha256 of a file if they are remembered; it is not read."""
    try:
        return _recall(path, FileStamp.of(path.stat()))
    except OSError:
        return None


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
    files: dict[str, Path] = {}
    for folder in folders:
        found = _adapter(folder) if is_adapter(folder) else _files(Checkpoint.open(folder), carried=False)
        files |= {f"{folder.name}/{name}": path for name, path in found.items()}
    return files


def _files(checkpoint: Checkpoint, carried: bool) -> dict[str, Path]:
    beside = (name for name in checkpoint.other_files if carried or name.rpartition("/")[2] in _MEANT)
    indexes = [f"{branch}/{index}" for branch, index in checkpoint.branches if index] + [checkpoint.index_file or ""]
    names = {*checkpoint.weight_files, *filter(None, indexes), *beside}
    return {name: checkpoint.root / name for name in sorted(names)}


def _adapter(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in (CONFIG, WEIGHTS)}


def _place(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return cache_folder() / "digests" / name[:2] / f"{name}.json"


def _recall(path: Path, stamp: FileStamp) -> FileDigest | None:
    try:
        kept = json.loads(_place(path).read_text(encoding="ascii"))
        return FileDigest(stamp.size, str(kept["sha256"])) if kept["stamp"] == vars(stamp) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _keep(path: Path, stamp: FileStamp, found: FileDigest) -> None:
    """Whole or not at all; a memory that cannot be written costs only time."""
    place = _place(path)
    with suppress(OSError, KtmergeError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps({"stamp": vars(stamp), "sha256": found.sha256}), sync=False)
