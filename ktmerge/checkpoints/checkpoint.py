"""A checkpoint as its headers describe it: every tensor's name, type, shape and place. No weights are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.classes import TensorClass, tensor_classes
from ktmerge.checkpoints.header import FileStamp, TensorInfo, TensorSpec, read_header
from ktmerge.checkpoints.layout import Layout, files_beside, read_config, read_layout
from ktmerge.checkpoints.reader import Reader, TensorReader
from ktmerge.checkpoints.tree import find_branches, tree_config
from ktmerge.errors import UsageError, did_you_mean
from ktmerge.progress import SILENT, Progress


@dataclass(frozen=True)
class Checkpoint:
    """The index of a checkpoint folder, or of a tree of them.

    Attributes:
        root: the folder.
        tensors: by name, in file order: files sorted by name, tensors by position.
        config: ``config.json``, or empty.
        weight_files: the safetensors files, relative to ``root``.
        index_file: the shard index, if there is one.
        other_files: everything that travels with the weights (tokenizer, processor, remote code), recursive.
        left_behind: what does not travel: the weights in other formats, the state of a training run.
        metadata: ``__metadata__`` of each weight file.
        stamps: size, time and inode of each weight file when its header was read.
        notes: what a person should know of how it is understood.
        written: the type of tensors that are to be written in another than they are shown in.
        stale: keys of the config that do not hold for what is shown.
        branches: of a tree, its folders with the shard index of each; the names of their tensors begin with them.
    """

    root: Path
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    weight_files: tuple[str, ...]
    index_file: str | None
    other_files: tuple[str, ...]
    left_behind: tuple[str, ...]
    metadata: dict[str, dict[str, str]]
    stamps: dict[str, FileStamp]
    notes: tuple[str, ...] = ()
    branches: tuple[tuple[str, str | None], ...] = ()
    written: Mapping[str, str] = field(default_factory=dict)
    stale: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read all headers of the checkpoint in the folder ``path``.

        Raises:
            UsageError: whatever is wrong with it; file and tensor are named.
        """
        root = Path(path)
        if branches := find_branches(root):
            return cls._open_tree(root, {name: cls.open(root / name) for name in branches})
        layout = read_layout(root)
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, dict[str, str]] = {}
        stamps: dict[str, FileStamp] = {}
        for file in layout.weight_files:
            header = read_header(root / file, file)
            for info in header.tensors:
                if info.name in tensors:
                    raise UsageError(f"{root}: tensor '{info.name}' is in both {tensors[info.name].file} and {file}.")
                tensors[info.name] = info
            metadata[file], stamps[file] = header.metadata, header.stamp
        _check_index(root, layout, tensors)
        if not tensors:
            raise UsageError(f"{root}: the checkpoint has no tensors.")
        config = read_config(root)
        return cls(
            root=root,
            tensors=tensors,
            config=config,
            weight_files=layout.weight_files,
            index_file=layout.index_file,
            other_files=layout.other_files,
            left_behind=layout.left_behind,
            metadata=metadata,
            stamps=stamps,
        )

    @classmethod
    def _open_tree(cls, root: Path, branches: dict[str, Checkpoint]) -> Checkpoint:
        def placed(folder: str, files: Mapping[str, Any]) -> dict[str, Any]:
            return {f"{folder}/{file}": value for file, value in files.items()}

        carried, left_behind = files_beside(root, {f"{f}/{file}" for f, one in branches.items() for file in one.stamps})
        config = read_config(root)
        return cls(
            root=root,
            tensors={
                f"{folder}.{name}": replace(info, name=f"{folder}.{name}", file=f"{folder}/{info.file}")
                for folder, one in branches.items()
                for name, info in one.tensors.items()
            },
            config=tree_config(config, {folder: one.config for folder, one in branches.items()}),
            weight_files=tuple(f"{folder}/{file}" for folder, one in branches.items() for file in one.weight_files),
            index_file=None,
            other_files=carried,
            left_behind=left_behind,
            metadata={k: v for folder, one in branches.items() for k, v in placed(folder, one.metadata).items()},
            stamps={k: v for folder, one in branches.items() for k, v in placed(folder, one.stamps).items()},
            branches=tuple((folder, one.index_file) for folder, one in branches.items()),
        )

    def __getitem__(self, name: str) -> TensorInfo:
        """The tensor called ``name``.

        Raises:
            UsageError: there is none.
        """
        try:
            return self.tensors[name]
        except KeyError:
            near = did_you_mean(name, self.tensors, list_all=False)
            raise UsageError(f"{self.root}: has no tensor '{name}'.{near}") from None

    @property
    def roots(self) -> tuple[Path, ...]:
        """Every folder it is read from."""
        return (self.root,)

    @cached_property
    def classes(self) -> dict[str, TensorClass]:
        """The class of every tensor, by name."""
        return tensor_classes(self.tensors, self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def reader(self) -> Reader:
        """Open the weights for reading; use as a context manager."""
        return TensorReader(self.root, self.tensors, self.stamps)

    def header_digest(self) -> str:
        """sha256 over the sorted (name, type, shape) of all tensors: the same however they are sharded."""
        return self._header_digest

    @cached_property
    def _header_digest(self) -> str:
        return header_digest(self.tensors.values())

    def content_digest(self, progress: Progress = SILENT, without: Collection[str] = ()) -> str:
        """sha256 over names, types, shapes and bytes of all tensors, in name order: equal however sharded.

        Args:
            progress: where to report to.
            without: names of tensors that are left out.

        Raises:
            KtmergeError: a file cannot be read or changed since its header was read.
        """
        inner: dict[str, str] = {}
        wanted = {name: info for name, info in self.tensors.items() if name not in without}
        with self.reader() as reader, progress.task(f"hash {self.root.name}", self.nbytes, "bytes") as step:
            for name in wanted:
                digest = hashlib.sha256()
                for block in reader.blocks(name):
                    digest.update(block)
                    step.advance(len(block))
                inner[name] = digest.hexdigest()
        return content_digest(wanted.values(), inner)


def header_digest(tensors: Iterable[TensorSpec]) -> str:
    """sha256 over sorted (name, type, shape), as hexadecimal."""
    return _digest([info.name, info.dtype, list(info.shape)] for info in tensors)


def content_digest(tensors: Iterable[TensorSpec], digests: dict[str, str]) -> str:
    """sha256 over sorted (name, type, shape, sha256 of the bytes), as hexadecimal; ``digests`` by tensor name."""
    return _digest([info.name, info.dtype, list(info.shape), digests[info.name]] for info in tensors)


def _digest(rows: Iterable[list[Any]]) -> str:
    outer = hashlib.sha256()
    for row in sorted(rows, key=lambda row: str(row[0])):
        outer.update(json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n")
    return outer.hexdigest()


def _check_index(root: Path, layout: Layout, tensors: dict[str, TensorInfo]) -> None:
    if layout.weight_map is None:
        return
    where = root / str(layout.index_file)
    for name, file in layout.weight_map.items():
        if name not in tensors:
            raise UsageError(f"{where}: promises tensor {name!r} in {file}, which does not have it.")
        if tensors[name].file != file:
            raise UsageError(f"{where}: promises tensor '{name}' in {file}, but it is in {tensors[name].file}.")
    for name, info in tensors.items():
        if name not in layout.weight_map:
            raise UsageError(f"{where}: does not list tensor '{name}', which is in {info.file}.")
