"""Writes a checkpoint folder that appears whole or not at all.

Knows where every byte goes before the first is written; knows nothing about what the numbers mean.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import BITS, tag_of
from ktmerge.checkpoints.files import clear_os_errors, copy_files
from ktmerge.checkpoints.header import FilePlan, TensorInfo, build_header
from ktmerge.checkpoints.staging import Staging, preallocate, sync_tree
from ktmerge.errors import KtmergeError, UsageError

if TYPE_CHECKING:
    import torch

_SPARE = 16 << 20
"""Bytes left free beside what the plan needs: folder entries, texts, the index."""


class Writer:
    """Context manager around one output folder; leaving it cleanly publishes the folder, any exception removes it.

    Inside: `plan` (or `plan_like`) once, then `write` and `write_bytes` from any thread until every planned tensor is
    complete, `copy_files` and `add_text` at any time.

    Args:
        out: the folder to appear.
        overwrite: replace the checkpoint that is there; otherwise an existing output is refused at once.

    Raises:
        UsageError: ``out`` exists and may not be replaced.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out = Path(out)
        self._staging = Staging(self.out, overwrite)
        self._planned: dict[str, TensorInfo] = {}
        self._written: dict[str, list[tuple[int, int]]] = {}
        self._descriptors: dict[str, int] = {}
        self._index: str | None = None
        self._idle = threading.Condition()
        self._writing = 0

    def __enter__(self) -> Writer:
        self._staging.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._close()
            self._staging.discard()

    @property
    def folder(self) -> Path:
        """The temporary folder that will become the output; files put here are published with it."""
        return self._staging.folder

    @property
    def planned(self) -> Mapping[str, TensorInfo]:
        """Every planned tensor and its place."""
        return self._planned

    def plan_like(self, base: Checkpoint, dtypes: Mapping[str, str] | None = None) -> None:
        """Plan the tensors of ``base`` in its files, under its names and in its order.

        Args:
            base: the checkpoint to mirror.
            dtypes: safetensors tags of the tensors whose type changes, by name.
        """
        changed = dtypes or {}
        files: dict[str, list[TensorInfo]] = {file: [] for file in base.weight_files}
        for name, info in base.tensors.items():
            files[info.file].append(replace(info, dtype=changed.get(name, info.dtype)))
        plans = [FilePlan(file, tensors, {"format": "pt", **base.metadata[file]}) for file, tensors in files.items()]
        carried = sum((base.root / file).stat().st_size for file in base.other_files)
        self.plan(plans, base.index_file, extra_bytes=carried)

    def plan(self, files: Sequence[FilePlan], index_file: str | None = None, *, extra_bytes: int = 0) -> None:
        """Fix what will be written, check that there is room, and reserve it.

        Args:
            files: every weight file with its tensors.
            index_file: name of the shard index; ``model.safetensors.index.json`` if absent and there are several files.
            extra_bytes: room wanted for other files.

        Raises:
            UsageError: a tensor is planned twice or cannot be stored.
            KtmergeError: the disk has too little room, or cannot be written.
        """
        if self._planned:
            raise KtmergeError(f"{self.out}: its tensors are already planned.")
        headers = {plan.file: build_header(plan) for plan in files}
        for _, tensors in headers.values():
            for info in tensors:
                if info.name in self._planned:
                    raise KtmergeError(f"{self.out}: tensor '{info.name}' is planned in two files.")
                self._planned[info.name] = info
        sizes = {
            file: max([len(header), *(info.end for info in tensors)]) for file, (header, tensors) in headers.items()
        }
        self._staging.require_space(sum(sizes.values()) + extra_bytes + _SPARE)
        self._index = index_file or ("model.safetensors.index.json" if len(files) > 1 else None)
        for file, (header, _) in headers.items():
            self._create(file, header, sizes[file])

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write the elements of ``tensor`` from element ``start`` of the planned tensor ``name`` on; any thread may.

        Raises:
            KtmergeError: name, type or range are not as planned, or the disk is full.
        """
        import torch

        info = self._info(name)
        if tag_of(tensor.dtype) != info.dtype:
            raise KtmergeError(f"tensor '{name}' is planned as {info.dtype}, but {tag_of(tensor.dtype)} was given.")
        flat = tensor.detach().reshape(-1).contiguous().cpu()
        self._write(info, flat.view(torch.uint8).numpy().data, start * (BITS[info.dtype] // 8))

    def write_bytes(self, name: str, data: memoryview | bytes | bytearray, start: int = 0) -> None:
        """Write raw bytes from byte ``start`` of the planned tensor ``name`` on; any thread may."""
        self._write(self._info(name), memoryview(data).cast("B"), start)

    def copy_files(self, checkpoint: Checkpoint, skip: Collection[str] = ()) -> list[str]:
        """Carry the non-weight files of ``checkpoint``; texts added before stay."""
        return copy_files(checkpoint, self.folder, skip)

    def add_text(self, file: str, text: str) -> None:
        """Add a text file, replacing a carried one of that name."""
        path = self.folder / file
        with clear_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._planned[name]
        except KeyError:
            raise KtmergeError(f"{self.out}: tensor '{name}' is not planned.") from None

    def _create(self, file: str, header: bytes, size: int) -> None:
        path = self.folder / file
        with clear_os_errors(self.out / file):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._descriptors[file] = descriptor
            preallocate(descriptor, size)
            _pwrite(descriptor, memoryview(header), 0)

    def _write(self, info: TensorInfo, data: memoryview, start: int) -> None:
        stop = start + len(data)
        if start < 0 or stop > info.nbytes:
            raise KtmergeError(f"tensor '{info.name}' has {info.nbytes} bytes; bytes {start} to {stop} were given.")
        with self._open(info.file) as descriptor, clear_os_errors(self.out / info.file):
            _pwrite(descriptor, data, info.begin + start)
        if len(data):
            with self._idle:
                self._written[info.name] = _joined([*self._written.get(info.name, ()), (start, stop)])

    def _commit(self) -> None:
        if not self._planned:
            raise KtmergeError(f"{self.out}: nothing was planned, so nothing is written.")
        self._require_complete()
        if self._index is not None:
            self.add_text(self._index, self._index_text())
        with clear_os_errors(self.out):
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
        self._close()
        self._verify()
        sync_tree(self.folder, skip=frozenset(info.file for info in self._planned.values()))
        self._staging.publish()

    def _require_complete(self) -> None:
        for info in self._planned.values():
            done = self._written.get(info.name, [])
            if info.nbytes and done != [(0, info.nbytes)]:
                count = sum(stop - start for start, stop in done)
                raise KtmergeError(f"tensor '{info.name}': only {count} of its {info.nbytes} bytes were written.")

    def _verify(self) -> None:
        """Read the headers back from the disk and hold them against the plan."""
        try:
            found = Checkpoint.open(self.folder)
        except UsageError as error:
            raise KtmergeError(f"{self.out}: what was written does not read back: {error}") from None
        if found.tensors != self._planned:
            wrong = sorted(
                name for name in {*found.tensors, *self._planned} if found.tensors.get(name) != self._planned.get(name)
            )
            raise KtmergeError(f"{self.out}: the written header differs from the plan at '{wrong[0]}'.")

    def _index_text(self) -> str:
        weight_map = {name: info.file for name, info in sorted(self._planned.items())}
        total = sum(info.nbytes for info in self._planned.values())
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"

    @contextmanager
    def _open(self, file: str) -> Iterator[int]:
        """A file's descriptor, which stays open while it is used: a closed one's number may soon be another file's."""
        with self._idle:
            if file not in self._descriptors:
                raise KtmergeError(f"{self.out}: is closed; nothing more can be written.")
            descriptor = self._descriptors[file]
            self._writing += 1
        try:
            yield descriptor
        finally:
            with self._idle:
                self._writing -= 1
                self._idle.notify_all()

    def _close(self) -> None:
        with self._idle:
            descriptors = list(self._descriptors.values())
            self._descriptors.clear()
            self._idle.wait_for(lambda: self._writing == 0)
        for descriptor in descriptors:
            os.close(descriptor)


def _pwrite(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint sorted spans that cover the same bytes."""
    spans.sort()
    joined = [spans[0]]
    for start, stop in spans[1:]:
        if start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined
