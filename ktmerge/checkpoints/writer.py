"""Writes a checkpoint folder that appears whole or not at all.

Knows where every byte goes before the first is written; knows nothing about what the numbers mean.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.blocks import Pool
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import BITS, tag_of
from ktmerge.checkpoints.files import clear_os_errors, copy_files, file_digest
from ktmerge.checkpoints.follower import Follower
from ktmerge.checkpoints.header import FilePlan, TensorInfo, build_header
from ktmerge.checkpoints.inheritance import Departure, Inheritance, differing
from ktmerge.checkpoints.journal import FILE, Entry, Journal, Remains, journal_room
from ktmerge.checkpoints.output import OutputFile
from ktmerge.checkpoints.signals import uninterrupted
from ktmerge.checkpoints.staging import Staging, sync_tree
from ktmerge.errors import KtmergeError, UsageError

if TYPE_CHECKING:
    import torch

_SPARE = 16 << 20
"""Bytes left free beside what the plan needs: folder entries, texts, the index."""


class Writer:
    """Context manager around one output folder; leaving it cleanly publishes the folder, any exception removes it.

    Inside: `plan` (or `plan_like`) once, then `write`, `write_bytes` and `copy_range` from any thread until every
    planned tensor is complete, `copy_files` and `add_text` at any time after it.

    With a ``pin``, each tensor that `finish` is told of is written down, so that the next writer of the same output
    with the same pin can go on where this one was killed: what `finished` answers for need not be written again.

    Args:
        out: the folder to appear.
        overwrite: replace the checkpoint that is there; otherwise an existing output is refused at once.
        pin: everything the bytes depend on, as JSON data; None to keep no journal.
        resume: go on with what an interrupted run left, and leave that again, and more, if this one does not come to
            its end; what it has made itself only if interrupted (by Ctrl-C, not by an error).
        departure: tells the pin of what was left from this one.

    Raises:
        UsageError: ``out`` exists and may not be replaced.
    """

    def __init__(
        self,
        out: Path,
        overwrite: bool = False,
        *,
        pin: Mapping[str, Any] | None = None,
        resume: bool = False,
        departure: Departure = differing,
    ) -> None:
        self.out = Path(out)
        self.notes: list[str] = []
        self._pin: dict[str, Any] = json.loads(json.dumps(pin or {}))  # as it will be read back
        self._resume = resume and pin is not None
        self._inheritance = Inheritance(self._pin, self._resume, departure)
        self._remains: Mapping[str, Entry] = {}
        self._journal: Journal | None = None
        self._staging = Staging(self.out, overwrite)
        self._planned: dict[str, TensorInfo] = {}
        self._files: dict[str, OutputFile] = {}
        self._arrived = threading.Condition()
        self._pool = Pool()
        self._follower: Follower | None = None
        self._indexes: dict[str, str] = {}  # with what the names in it leave out

    def __enter__(self) -> Writer:
        try:
            removed = self._staging.open(self._inheritance.fits)
            self.notes += self._inheritance.notes(len(removed))
            self._remains = self._inheritance.entries
            if self._pin:
                with clear_os_errors(self.folder):
                    self._journal = Journal(self.folder, Remains(self._pin, self._remains))
        except BaseException as error:
            self._end(isinstance(error, KeyboardInterrupt))
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        interrupted = isinstance(error, KeyboardInterrupt)
        try:
            if error is None:
                self._commit()
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            self._end(interrupted)

    def _end(self, interrupted: bool) -> None:
        wanted = self._resume and (interrupted or self._inheritance.is_taken)
        with uninterrupted():
            if wanted:
                with suppress(KtmergeError):  # whoever resumes reads back what is there
                    for file in self._files.values():
                        file.flush()
            self._close()
            if wanted and (self.folder / FILE).exists():
                self._staging.leave()
            else:
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

        Raises:
            UsageError, KtmergeError: as `plan`; or a file of the base is gone.
        """
        changed = dtypes or {}
        files: dict[str, list[TensorInfo]] = {file: [] for file in base.weight_files}
        for name, info in base.tensors.items():
            files[info.file].append(replace(info, dtype=changed.get(name, info.dtype)))
        prefixes = {file: f"{file.partition('/')[0]}." if base.branches else "" for file in files}
        plans = [
            FilePlan(file, tensors, {"format": "pt", **base.metadata[file]}, prefixes[file])
            for file, tensors in files.items()
        ]
        with clear_os_errors(base.root):
            carried = sum((base.root / file).stat().st_size for file in base.other_files)
        self.plan(plans, base.index_file, extra_bytes=carried)
        if base.branches:
            self._indexes = {f"{folder}/{index}": f"{folder}." for folder, index in base.branches if index is not None}

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
        if self._inheritance.is_taken:
            self._keep_only({*sizes, FILE})
        room = journal_room(self._planned.values()) if self._pin else 0
        there = sum(path.stat().st_blocks * 512 for file in sizes if (path := self.folder / file).exists())
        self._staging.require_space(sum(sizes.values()) - there + extra_bytes + room + _SPARE)
        if index_file is not None or len(files) > 1:
            self._indexes = {index_file or "model.safetensors.index.json": ""}
        for file, (header, _) in headers.items():
            self._files[file] = OutputFile(self.folder / file, self.out / file, sizes[file], self._arrived, self._pool)
            self._files[file].write(memoryview(header), 0)
        with uninterrupted():
            self._follower = Follower(self._files, self._arrived)

    def _keep_only(self, files: Collection[str]) -> None:
        """Remove whatever else is there: what an interrupted run had carried may be cut off."""
        with clear_os_errors(self.folder):
            for path in self.folder.rglob("*"):
                if path.is_file() and path.relative_to(self.folder).as_posix() not in files:
                    path.unlink()

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

    def copy_range(self, name: str, descriptor: int, begin: int, end: int) -> bool:
        """Let the kernel copy a whole tensor, the bytes ``[begin, end)`` of an open file; False if it cannot.

        Raises:
            KtmergeError: the tensor is planned with another size, or the disk is full.
        """
        info = self._info(name)
        if end - begin != info.nbytes:
            raise KtmergeError(f"tensor '{name}' has {info.nbytes} bytes; {end - begin} were given.")
        return self._files[info.file].copy(descriptor, begin, end, info.begin)

    def digests(self) -> dict[str, str]:
        """sha256 of every weight file as hexadecimal; to be asked when every tensor is complete.

        Raises:
            KtmergeError: a tensor is incomplete, or a file cannot be read back.
        """
        self._require_complete()
        if self._follower is None:
            raise KtmergeError(f"{self.out}: nothing was planned, so there is nothing to hash.")
        return self._follower.digests()

    def beside(self, known: Mapping[str, str], skip: Collection[str] = ()) -> dict[str, str]:
        """sha256 of every file beside the weights that is there by now, as hexadecimal, but for those in ``skip``.

        Args:
            known: those of files that need not be read for it.
            skip: files that are left out.

        Raises:
            KtmergeError: a file cannot be read or written.
        """
        self._write_indexes()
        apart = {*self._files, *skip, FILE}
        paths = {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*") if path.is_file()}
        return {file: known.get(file) or file_digest(path) for file, path in sorted(paths.items()) if file not in apart}

    def copy_files(self, checkpoint: Checkpoint, skip: Collection[str] = ()) -> list[str]:
        """Carry the non-weight files of ``checkpoint``; texts added before stay."""
        return copy_files(checkpoint, self.folder, skip)

    def add_text(self, file: str, text: str) -> None:
        """Add a text file, replacing a carried one of that name."""
        path = self.folder / file
        with clear_os_errors(self.out / file):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Names of files that are no text are told with their odd bytes escaped.
            path.write_text(text, encoding="utf-8", errors="backslashreplace")

    def finish(self, name: str, report: dict[str, Any]) -> None:
        """Say that a tensor is complete; ``report``, JSON data, is what `finished` will answer. Any thread may.

        Raises:
            KtmergeError: the disk is full.
        """
        if self._journal is not None:
            with clear_os_errors(self.out):
                self._journal.finish(name, self._info(name).nbytes, report)

    def finished(self, name: str) -> dict[str, Any] | None:
        """The report of a tensor that an interrupted run completed, if its bytes are still what they were; else None.

        Raises:
            KtmergeError: they cannot be read.
        """
        entry, info = self._remains.get(name), self._info(name)
        if entry is None or not self._files[info.file].holds(info.begin, entry):
            return None
        self._files[info.file].mark(info.begin, info.end)
        return entry.report

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._planned[name]
        except KeyError:
            raise KtmergeError(f"{self.out}: tensor '{name}' is not planned.") from None

    def _write(self, info: TensorInfo, data: memoryview, start: int) -> None:
        stop = start + len(data)
        if start < 0 or stop > info.nbytes:
            raise KtmergeError(f"tensor '{info.name}' has {info.nbytes} bytes; bytes {start} to {stop} were given.")
        if self._journal is not None:
            self._journal.wrote(info.name, start, data)
        self._files[info.file].write(data, info.begin + start)

    def _commit(self) -> None:
        if not self._planned:
            raise KtmergeError(f"{self.out}: nothing was planned, so nothing is written.")
        self._require_complete()
        self._write_indexes()
        for file in self._files.values():
            file.sync()
        self._close()
        self._verify_headers()
        sync_tree(self.folder, skip={*self._files, FILE})
        self._staging.publish(without=FILE)

    def _verify_headers(self) -> None:
        """Read the headers back from the disk and hold them against the plan."""
        try:
            found = Checkpoint.open(self.folder).tensors
        except UsageError as error:
            raise KtmergeError(f"{self.out}: what was written does not read back: {error}") from None
        wrong = sorted(name for name in {*found, *self._planned} if found.get(name) != self._planned.get(name))
        if wrong:
            raise KtmergeError(f"{self.out}: the written header differs from the plan at '{wrong[0]}'.")

    def _require_complete(self) -> None:
        for info in self._planned.values():
            count = self._files[info.file].count(info.begin, info.end)
            if count != info.nbytes:
                raise KtmergeError(f"tensor '{info.name}': only {count} of its {info.nbytes} bytes were written.")

    def _write_indexes(self) -> None:
        for index, prefix in self._indexes.items():
            self.add_text(index, self._index_text(index, prefix))

    def _index_text(self, index: str, prefix: str) -> str:
        listed = {name: info for name, info in sorted(self._planned.items()) if name.startswith(prefix)}
        folder = index.rpartition("/")[0]
        weight_map = {
            name.removeprefix(prefix): info.file.removeprefix(f"{folder}/" if folder else "")
            for name, info in listed.items()
        }
        total = sum(info.nbytes for info in listed.values())
        return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"

    def _close(self) -> None:
        if self._follower is not None:
            self._follower.stop()
        self._pool.stop()
        for file in self._files.values():
            file.close()
        if self._journal is not None:
            self._journal.close()
