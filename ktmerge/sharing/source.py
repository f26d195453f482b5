"""Where a bundle may come from, and what is shown of it before anything but its manifest is fetched."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.errors import KtmergeError, UsageError, printable
from ktmerge.progress import Step
from ktmerge.sharing import contents
from ktmerge.sharing.archive import Archive, opened_archive
from ktmerge.sharing.manifest import Manifest, read_manifest

_BLOCK = 1 << 20
_POINTER = range(120, 150)
"""Bytes of what Git LFS leaves in a file's place."""


class Source(Protocol):
    """A bundle somewhere."""

    @property
    def where(self) -> str:
        """What it is called, with the revision where there is one."""

    def sizes(self) -> Mapping[str, int] | None:
        """Bytes of every file; None if that cannot be known before all is fetched."""

    def manifest(self) -> bytes:
        """The bytes of its manifest, which may not be many."""

    def fetched(self, folder: Path, step: Step) -> Source:
        """The bundle on this machine, if need be in a folder of ours, where an earlier process may have left a part."""

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file of a bundle on this machine, piece by piece."""


@dataclass(frozen=True)
class Offer:
    """What can be had of a bundle.

    Attributes:
        source: it comes from.
        where: it is called.
        manifest: what it says of itself; None if that shows only once all is fetched.
        size: bytes to fetch; None: not told.
    """

    source: Source
    where: str
    manifest: Manifest | None
    size: int | None

    def pairs(self) -> dict[str, str]:
        """The main facts as text, for a terminal."""
        told = {"bundle": _printable(self.where)}
        if self.manifest is not None:
            description = f": {self.manifest.description}" if self.manifest.description else ""
            told["recipe"] = _printable(f"{self.manifest.name} ({self.manifest.method}){description}")
            told["packed by"] = _printable(f"ktmerge {self.manifest.ktmerge}")
        told["to fetch"] = _megabytes(self.size)
        if self.manifest is None:
            told["holds"] = "cannot be told before it is fetched; it is checked before it is unpacked"
        return told

    def files(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: every file of the bundle."""
        entries = self.manifest.files.items() if self.manifest is not None else ()
        return ["file", "size", "sha256"], [[name, _megabytes(one.size), one.sha256] for name, one in entries]

    def models(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: every model that the recipe blends, with its revision where it is on the hub."""
        inputs = self.manifest.inputs.items() if self.manifest is not None else ()
        rows = [[_printable(name), _told(one.model), _megabytes(one.size)] for name, one in inputs]
        return ["model", "from", "size"], rows

    def digests(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: every file of these models."""
        inputs = self.manifest.inputs.items() if self.manifest is not None else ()
        rows = [
            [_printable(f"{name}/{file}"), _megabytes(entry.size), entry.sha256]
            for name, one in inputs
            for file, entry in one.files.items()
        ]
        return ["pinned", "size", "sha256"], rows

    def downloads(self) -> str:
        """What a blend of it would download, in words."""
        if self.manifest is None:
            return ""
        there = {name: one for name, one in self.manifest.inputs.items() if not one.model.startswith("./")}
        own = [_printable(name) for name, one in self.manifest.inputs.items() if "./" in one.model]
        told = [f"{_printable(one.model)} ({_megabytes(one.size)})" for one in there.values()]
        sentences = [f"A blend of it downloads {', '.join(told)} from the hub." if told else ""]
        if own:
            sentences.append(f"Whoever blends it gives {', '.join(own)}; another than locked is refused.")
        if self.manifest.statistics:
            given = ", ".join(map(_printable, self.manifest.statistics))
            sentences.append(f"Statistics of {given} are given likewise.")
        return " ".join(filter(None, sentences))

    def to_json(self) -> dict[str, Any]:
        manifest = None if self.manifest is None else self.manifest.model_dump(mode="json")
        return {"bundle": self.where, "bytes": self.size, "manifest": manifest}


def offer_of(source: Source) -> Offer:
    """Look at a bundle: its list of files and its manifest, nothing else.

    Raises:
        UsageError: it is no bundle, or one that nobody should unpack.
        KtmergeError: it cannot be read, or reached.
    """
    sizes = source.sizes()
    if sizes is None:
        return Offer(source, source.where, None, getattr(source, "size", None))
    manifest = read_manifest(source.manifest(), source.where)
    told = {name: size for name, size in sizes.items() if name != contents.MANIFEST}
    if told != manifest.sizes:
        name = min(name for name in {**told, **manifest.sizes} if told.get(name) != manifest.sizes.get(name))
        there, said = (_megabytes(one.get(name), "missing") for one in (told, manifest.sizes))
        pointer = " (a pointer of Git LFS? Then 'git lfs pull' fetches it)" if told.get(name, 0) in _POINTER else ""
        raise UsageError(
            f"{source.where}: its manifest tells other files than there are: {name} {there}{pointer}, told {said}."
        )
    return Offer(source, source.where, manifest, sum(sizes.values()))


class ArchiveSource:
    """A bundle in a file on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)

    def sizes(self) -> Mapping[str, int]:
        with opened_archive(self._path) as archive:
            return archive.sizes

    def manifest(self) -> bytes:
        with opened_archive(self._path) as archive:
            return archive.read(contents.MANIFEST)

    def fetched(self, folder: Path, step: Step) -> Source:
        return self

    def blocks(self, name: str) -> Iterator[bytes]:
        with opened_archive(self._path) as archive:
            _require_there(archive, name, self.where)
            yield from archive.blocks(name)


class FolderSource:
    """A bundle whose files lie in a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)

    def sizes(self) -> Mapping[str, int]:
        names = []
        for folder, folders, files in os.walk(self._path):
            inside = Path(folder).relative_to(self._path)
            folders[:] = [name for name in folders if not name.startswith(".")]  # git's, and the hub's client's
            names += [(inside / name).as_posix() for name in files if not name.startswith(".")]
            if any(name not in contents.FOLDERS or inside.parts for name in folders):
                raise UsageError(f"{self.where}: holds folders that a bundle has not; give the folder of the bundle.")
            if len(names) > contents.MAX_FILES:
                raise UsageError(f"{self.where}: holds more than {contents.MAX_FILES} files.")
        contents.require_names(names, self.where)
        sizes = {name: self._status(name).st_size for name in names}
        contents.require_sizes(sizes, self.where)
        return sizes

    def manifest(self) -> bytes:
        return b"".join(self.blocks(contents.MANIFEST))

    def fetched(self, folder: Path, step: Step) -> Source:
        return self

    def blocks(self, name: str) -> Iterator[bytes]:
        self._status(name)
        path = self._path / name
        with clear_os_errors(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as stream:
                while block := stream.read(_BLOCK):
                    yield block

    def _status(self, name: str) -> os.stat_result:
        """Of a file that is one, in folders that are some: a stranger's links may lead anywhere."""
        path = self._path / name
        with clear_os_errors(path):
            above = [self._path / parent for parent in Path(name).parents if parent.parts]
            if any(stat.S_ISLNK(parent.lstat().st_mode) for parent in above):
                raise UsageError(f"{self.where}: '{name}' lies behind a link; nothing was unpacked.")
            status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{self.where}: '{name}' is a link or a device; nothing was unpacked.")
        return status


def _require_there(archive: Archive, name: str, where: str) -> None:
    if name not in archive.sizes:
        raise KtmergeError(f"{where}: changed while it was read.")


def _told(model: str) -> str:
    return "yours to give" if model.startswith("./") else _printable(model)


def _megabytes(size: int | None, unknown: str = "not told") -> str:
    if size is None:
        return unknown
    return f"{size} B" if size < 10_000 else f"{size / 1e6:.2f} MB"


def _printable(text: str) -> str:
    """A stranger's words, if not all."""
    return printable(text)[:300]
