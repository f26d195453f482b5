"""A model to a delta: every tensor coded against the base's, header and other files as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.digests import digest_of
from ktmerge.checkpoints.dtypes import BITS, FLOATS
from ktmerge.checkpoints.files import clear_os_errors, refuse_overlap
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.hub import cached_as
from ktmerge.checkpoints.reader import Reader
from ktmerge.checkpoints.staging import Staging, sync_tree
from ktmerge.checkpoints.workers import Workers
from ktmerge.deltas.coding import Array, bits, packed
from ktmerge.deltas.manifest import BLOBS, FILE, LARGEST_OTHER, LARGEST_PIECE, Manifest, Other, Piece, Tensor
from ktmerge.deltas.pieces import cast, code, code_within, relative, width
from ktmerge.deltas.report import DeltaReport
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress

_EXACT_PIECE = 1 << 22
_THREADS = 2
_RECORDS = frozenset({"ktmerge.json", "ktmerge-run.json"})
"""What a model's folder says of how it was made; it does not travel into blends of it, but belongs to the model."""


def export_delta(
    base: Path,
    model: Path,
    out: Path,
    *,
    error: float | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> DeltaReport:
    """Write what ``model`` is apart from ``base`` into the folder ``out``.

    Args:
        base: folder of the checkpoint that whoever applies the delta has.
        model: folder of the checkpoint to hand over.
        out: folder of the delta; appears whole or not at all.
        error: norm of what may be left out of each tensor's change, over the norm of the change; None: nothing.
        overwrite: replace a delta that is there.
        progress: where to report.

    Raises:
        UsageError: a folder is no checkpoint, ``error`` is not between 0 and 1, or ``out`` exists.
        KtmergeError: weights cannot be read, or the disk is full.
    """
    if error is not None and not 0 < error < 1:
        raise UsageError(f"--error {error:g}: give a share between 0 and 1, e.g. 0.01, or none for an exact delta.")
    below, above = Checkpoint.open(base), Checkpoint.open(model)
    refuse_overlap(out, [base, model])
    staging = Staging(out, overwrite)
    staging.open()
    try:
        with clear_os_errors(staging.folder), (staging.folder / BLOBS).open("wb") as stream:
            export = _Export(below, above, error, _Blobs(stream))
            manifest = export.run(progress)
        text = json.dumps(manifest.to_json(), separators=(",", ":")) + "\n"
        with clear_os_errors(staging.folder):
            (staging.folder / FILE).write_text(text, encoding="utf-8")
            sync_tree(staging.folder)
        staging.publish()
    finally:
        staging.discard()
    return DeltaReport.of(out, manifest)


class _Blobs:
    """Bytes one after the other in a file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._end = 0

    def add(self, blob: bytes) -> tuple[int, int]:
        """Append ``blob``; return where it begins, and its length."""
        begin = self._end
        self._stream.write(blob)
        self._end += len(blob)
        return begin, len(blob)


class _Export:
    """One export: what it reads and where it writes."""

    def __init__(self, base: Checkpoint, model: Checkpoint, error: float | None, blobs: _Blobs) -> None:
        self._base, self._model, self._error, self._blobs = base, model, error, blobs

    def run(self, progress: Progress) -> Manifest:
        files = {file: self._header(file) for file in self._model.weight_files}
        with (
            self._base.reader() as below,
            self._model.reader() as above,
            progress.task(f"compare {self._model.root.name}", self._model.nbytes, "bytes") as step,
            Workers(_THREADS) as pool,
        ):

            def coded(info: TensorInfo) -> tuple[Tensor, list[list[bytes]]]:
                found = self._tensor(info, below, above)
                step.advance(info.nbytes)
                return found

            tensors: dict[str, Tensor] = {}
            infos = list(self._model.tensors.values())
            made = pool.in_order((partial(coded, info) for info in infos), 2 * _THREADS)
            for info, (tensor, blobs) in zip(infos, made, strict=True):  # the same model gives the same bytes
                places = (tuple(map(self._blobs.add, piece)) for piece in blobs)
                pieces = (replace(piece, blobs=spans) for piece, spans in zip(tensor.pieces, places, strict=True))
                tensors[info.name] = replace(tensor, pieces=tuple(pieces))
        for checkpoint in (self._base, self._model):
            with checkpoint.reader() as reader:
                reader.check_unchanged()
        name = cached_as(self._base.root) or self._base.root.absolute().name
        return Manifest(
            base={"model": name, "headers": self._base.header_digest()},
            exact=self._error is None,
            files=files,
            tensors=tensors,
            others={file: self._other(file) for file in self._others()},
        )

    def _header(self, file: str) -> tuple[int, tuple[int, int]]:
        path = self._model.root / file
        with clear_os_errors(path), path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            stream.seek(0)
            return path.stat().st_size, self._blobs.add(packed(stream.read(8 + length)))

    def _tensor(self, info: TensorInfo, below: Reader, above: Reader) -> tuple[Tensor, list[list[bytes]]]:
        """A tensor, and of each of its pieces the blobs, which have no places yet."""
        twin = self._base.tensors.get(info.name)
        if twin is not None and (twin.shape != info.shape or not _comparable(twin.dtype, info.dtype)):
            twin = None
        digest, base_digest = hashlib.sha256(), hashlib.sha256()
        pieces: list[Piece] = []
        blobs: list[list[bytes]] = []
        left_out, change = 0.0, 0.0
        lossy = self._error is not None and twin is not None and info.dtype in FLOATS and info.dtype != "F64"
        for start, stop in _spans(info, LARGEST_PIECE if lossy else _EXACT_PIECE):
            target = read_bits(above, info, start, stop)
            reference: Array | None = None
            if twin is not None:
                own = read_bits(below, twin, start, stop)
                base_digest.update(own.data)
                reference = cast(own, twin.dtype, info.dtype)
            if lossy and reference is not None and self._error is not None:
                whole = info.shape if stop - start == info.numel else None
                coded = code_within(target, reference, info.dtype, self._error, whole)
            else:
                coded = code(target, reference, info.dtype)
            left_out, change = left_out + coded.left_out, change + coded.change
            digest.update((target if coded.decoded is None else coded.decoded).data)
            blobs.append(coded.blobs)
            pieces.append(Piece(coded.count, coded.coding, (), coded.parameters))
        error = relative(left_out, change)
        checked = base_digest.hexdigest() if twin is not None else ""
        sha256 = digest.hexdigest()
        return Tensor(info.file, info.dtype, info.begin, info.end, checked, sha256, error, tuple(pieces)), blobs

    def _others(self) -> Iterator[str]:
        indexes = [self._model.index_file, *(f"{branch}/{index}" for branch, index in self._model.branches if index)]
        yield from (index for index in indexes if index)
        yield from self._model.other_files
        yield from (file for file in self._model.left_behind if file.rpartition("/")[2] in _RECORDS)

    def _other(self, file: str) -> Other:
        path = self._model.root / file
        found = digest_of(path)
        twin = self._base.root / file
        if twin.is_file() and digest_of(twin) == found:
            return Other(found.size, found.sha256, None)
        if found.size > LARGEST_OTHER:
            raise UsageError(
                f"{path}: {found.size / 1e6:.0f} MB beside the weights are too much for a delta; move the file away."
            )
        with clear_os_errors(path):
            return Other(found.size, found.sha256, self._blobs.add(packed(path.read_bytes())))


def read_bits(reader: Reader, info: TensorInfo, start: int, stop: int) -> Array:
    """The bits of elements ``[start, stop)``; of packed types, of bytes."""
    raw = bytearray((stop - start) * width(info.dtype))
    if raw:
        reader.read_into(info.name, start, memoryview(raw))
    return bits(raw, width(info.dtype))


def _spans(info: TensorInfo, size: int) -> Iterator[tuple[int, int]]:
    count = info.nbytes // width(info.dtype)
    if BITS[info.dtype] % 8:  # packed elements have no places of their own
        size = max(count, 1)
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _comparable(one: str, other: str) -> bool:
    """Whether elements of one type can be told from those of another."""
    return one == other or (one in FLOATS and other in FLOATS)
