"""A delta and its base to the model: every byte of both is checked on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.digests import digest_of
from ktmerge.checkpoints.files import clear_os_errors, file_digest, refuse_overlap, write_all
from ktmerge.checkpoints.header import MAX_HEADER, TensorInfo, read_header
from ktmerge.checkpoints.reader import Reader
from ktmerge.checkpoints.regular import is_file, open_regular
from ktmerge.checkpoints.staging import Staging, sync_tree
from ktmerge.checkpoints.workers import Workers
from ktmerge.deltas.coding import unpacked
from ktmerge.deltas.export import read_bits
from ktmerge.deltas.manifest import BLOBS, Manifest, Other, Tensor
from ktmerge.deltas.pieces import cast, decoded, width
from ktmerge.deltas.report import DeltaReport
from ktmerge.errors import UsageError
from ktmerge.progress import SILENT, Progress

_THREADS = 2


def apply_delta(
    base: Path,
    delta: Path,
    out: Path,
    *,
    wanted: Mapping[str, str] = MappingProxyType({}),
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> DeltaReport:
    """Write the model that ``delta`` makes of ``base`` into the folder ``out``.

    Args:
        base: folder of the checkpoint that the delta was made from.
        delta: folder that `export_delta` wrote.
        out: appears whole or not at all.
        wanted: sha256 that files of it have to have, by name.
        overwrite: replace a checkpoint that is there.
        progress: where to report.

    Raises:
        UsageError: another base, a folder that is no delta or a broken one, or ``out`` exists.
        KtmergeError: something cannot be read or written.
    """
    manifest = Manifest.load(delta)
    below = Checkpoint.open(base)
    if below.header_digest() != manifest.base.get("headers"):
        raise UsageError(
            f"{base}: is not the base of this delta, {manifest.base.get('model')}: its tensors, types or shapes are "
            "others."
        )
    refuse_overlap(out, [base, delta])
    staging = Staging(out, overwrite)
    staging.open()
    try:
        staging.require_space(manifest.size)
        with clear_os_errors(delta / BLOBS), open_regular(delta / BLOBS) as stream:
            _write(staging.folder, manifest, below, _Blobs(stream), progress)
        wrong = [
            file
            for file, sha256 in wanted.items()
            if file not in manifest.files or file_digest(staging.folder / file) != sha256
        ]
        if wrong:
            raise UsageError(
                f"{delta}: gives another {wrong[0]} than the lock beside it says its recipe gave; nothing was written."
            )
        with clear_os_errors(staging.folder):
            sync_tree(staging.folder)
        staging.publish()
    finally:
        staging.discard()
    return DeltaReport.of(delta, manifest, out)


class _Blobs:
    """Positional reads from the file of blobs."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def get(self, span: tuple[int, int]) -> bytes:
        """The blob at a place.

        Raises:
            UsageError: the file ends before it.
        """
        begin, length = span
        descriptor = self._stream.fileno()
        there = begin + length <= os.fstat(descriptor).st_size
        blob = os.pread(descriptor, length, begin) if there else b""
        if len(blob) != length:
            raise UsageError(f"{self._stream.name}: ends too early; the delta was cut short.")
        return blob


def _write(folder: Path, manifest: Manifest, base: Checkpoint, blobs: _Blobs, progress: Progress) -> None:
    descriptors: dict[str, int] = {}
    total = sum(tensor.end - tensor.begin for tensor in manifest.tensors.values())
    try:
        for file, (size, header) in manifest.files.items():
            descriptors[file] = _opened(folder / file, size, _header(blobs.get(header), file, size))
        _require_laid_out(folder, manifest)
        with (
            base.reader() as reader,
            progress.task(f"apply to {base.root.name}", total, "bytes") as step,
            Workers(_THREADS) as pool,
        ):

            def made(item: tuple[str, Tensor]) -> None:
                name, tensor = item
                _tensor(name, tensor, base, reader, blobs, descriptors[tensor.file])
                step.advance(tensor.end - tensor.begin)

            for _ in pool.map(made, sorted(manifest.tensors.items(), key=lambda item: item[1].begin - item[1].end)):
                pass
            reader.check_unchanged()
        for file, other in manifest.others.items():
            _other(folder / file, file, other, base, blobs)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _header(blob: bytes, file: str, size: int) -> bytes:
    """What a file of so many bytes begins with; it cannot be longer, nor what no safetensors file has."""
    import zstandard

    try:
        length = zstandard.frame_content_size(blob)
        if not 8 <= length <= min(size, 8 + MAX_HEADER):
            raise ValueError("no header")
        return unpacked(blob, length)
    except (ValueError, zstandard.ZstdError) as error:
        raise UsageError(f"the delta's header of {file} is broken: {error}.") from None


def _opened(path: Path, size: int, header: bytes) -> int:
    with clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.ftruncate(descriptor, size)
        os.pwrite(descriptor, header, 0)
    return descriptor


def _require_laid_out(folder: Path, manifest: Manifest) -> None:
    """Hold the tensors of a delta to the headers that it brings along: each has its place, and none is missing.

    Raises:
        UsageError: they are others.
    """
    try:
        laid = [info for file in manifest.files for info in read_header(folder / file, file).tensors]
    except UsageError as error:
        raise UsageError(f"the delta is broken: {error}") from None
    if _places(laid) != _places(manifest.tensors.values()):
        raise UsageError("the delta has other tensors than the headers of its files; it is broken.")


def _places(tensors: Iterable[Tensor | TensorInfo]) -> list[tuple[str, int, int, str]]:
    return sorted((one.file, one.begin, one.end, one.dtype) for one in tensors)


def _tensor(name: str, tensor: Tensor, base: Checkpoint, reader: Reader, blobs: _Blobs, descriptor: int) -> None:
    twin = base.tensors.get(name) if tensor.base else None
    if tensor.base and twin is None:
        raise UsageError(f"{base.root}: has no tensor '{name}', which the delta starts from; it is another base.")
    count = (tensor.end - tensor.begin) // width(tensor.dtype)
    if twin is not None and twin.nbytes // width(twin.dtype) != count:
        raise UsageError(f"tensor '{name}': the delta has another number of elements than the base; it is broken.")
    digest, base_digest = hashlib.sha256(), hashlib.sha256()
    start, position = 0, tensor.begin
    for piece in tensor.pieces:
        stop = start + piece.count
        if position + piece.count * width(tensor.dtype) > tensor.end:
            raise UsageError(f"tensor '{name}': the delta has more elements than the tensor; it is broken.")
        reference = None
        try:
            if twin is not None:
                own = read_bits(reader, twin, start, stop)
                base_digest.update(own.data)
                reference = cast(own, twin.dtype, tensor.dtype)
            found = [blobs.get(span) for span in piece.blobs]
            bits = decoded(piece.coding, piece.parameters, found, piece.count, reference, tensor.dtype)
        except (ValueError, LookupError, TypeError, OverflowError, RuntimeError) as error:
            raise UsageError(f"tensor '{name}': the delta is broken: {error}.") from None
        raw = bits.tobytes()
        digest.update(raw)
        with clear_os_errors(base.root):
            write_all(descriptor, raw, position)
        start, position = stop, position + len(raw)
    if twin is not None and base_digest.hexdigest() != tensor.base:
        raise UsageError(
            f"{base.root}: '{name}' is not as in the base that the delta was made from; give that one, to the byte."
        )
    if digest.hexdigest() != tensor.sha256 or position != tensor.end:
        raise UsageError(f"tensor '{name}' does not come out as it went in; the delta is broken.")


def _other(path: Path, file: str, other: Other, base: Checkpoint, blobs: _Blobs) -> None:
    if other.blob is None:
        twin = base.root / file
        if not is_file(twin, file) or digest_of(twin).sha256 != other.sha256:
            raise UsageError(f"{twin}: is not as in the base that the delta was made from; give that one, to the byte.")
        raw = twin.read_bytes()
    else:
        try:
            raw = unpacked(blobs.get(other.blob), other.size)
        except ValueError as error:
            raise UsageError(f"{file}: the delta is broken: {error}.") from None
        if hashlib.sha256(raw).hexdigest() != other.sha256:
            raise UsageError(f"{file}: does not come out as it went in; the delta is broken.")
    with clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("xb") as stream:
                stream.write(raw)
        except FileExistsError:  # it would take the place of one that was checked
            raise UsageError(f"{file}: stands in the delta twice; it is broken.") from None
