"""Fetching packages as data into the user's cache: digest checked, nothing imported, nothing installed.

Knows how to ask pip and how to read archives; knows nothing about what is in them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ktmerge.checkpoints.files import file_digest
from ktmerge.errors import KtmergeError
from ktmerge.progress import SILENT, Progress

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """One file of a package index, pinned to the byte."""

    name: str
    version: str
    file: str
    sha256: str
    size: int  # bytes
    licence: str

    @property
    def is_source(self) -> bool:
        """Whether the file is a source distribution rather than a wheel."""
        return not self.file.endswith(".whl")


def fetch(package: Package, cache: Path, progress: Progress = SILENT) -> Path:
    """Return the package's file in ``cache``, downloading it with pip unless it is there and has the pinned digest.

    The file appears by one rename, after its digest is checked; what killed runs left behind is removed.

    Raises:
        KtmergeError: no connection, a different digest, a full disk, or a Python without pip.
    """
    folder = cache / "downloads"
    target = folder / package.file
    with _clear(package, folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        if target.is_file():
            if file_digest(target) == package.sha256:
                return target
            progress.note(f"{target} is damaged; fetching it again.")
        progress.note(f"Fetching {package.name} {package.version} ({package.size / 1e6:.1f} MB, {package.licence}).")
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".fetch-{os.getpid()}-") as temporary:
            found = _download(package, Path(temporary), folder)
            os.replace(found, target)
    return target


def member_names(archive: Path, prefix: str = "", suffix: str = "") -> list[str]:
    """The names of a zip archive's files that start and end so, sorted."""
    with zipfile.ZipFile(archive) as opened:
        return sorted(n for n in opened.namelist() if n.startswith(prefix) and n.endswith(suffix))


def read_member(archive: Path | bytes, member: str) -> bytes:
    """The bytes of one named file of a zip or tar archive, on disk or in memory; the archive is never unpacked.

    Raises:
        KtmergeError: there is no such regular file inside.
    """
    with _member(archive, member) as source:
        return source.read()


def extract_member(archive: Path, member: str, target: Path, sha256: str) -> None:
    """Write one named file of an archive to ``target``; the archive has no say in where it goes.

    Raises:
        KtmergeError: no such regular file inside, or its digest is not ``sha256``; then nothing is written.
    """
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        with _member(archive, member) as source, temporary.open("wb") as file:
            shutil.copyfileobj(source, file, _BLOCK)
        if file_digest(temporary) != sha256:
            raise KtmergeError(f"{archive}: {member} inside has another digest than the one pinned; nothing was used.")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _member(archive: Path | bytes, member: str) -> Iterator[IO[bytes]]:
    where = archive if isinstance(archive, Path) else "an archive in memory"
    missing = KtmergeError(f"{where}: has no file {member}; the package is not the one this ktmerge knows.")
    with archive.open("rb") if isinstance(archive, Path) else io.BytesIO(archive) as file:
        if zipfile.is_zipfile(file):
            file.seek(0)
            with zipfile.ZipFile(file) as zipped:
                if member not in zipped.namelist():
                    raise missing
                with zipped.open(member) as source:
                    yield source
            return
        file.seek(0)
        with tarfile.open(fileobj=file) as tarred:
            info = next((one for one in tarred if one.name == member), None)
            # extractfile follows links, so that a link is refused here
            inside = tarred.extractfile(info) if info is not None and info.isfile() else None
            if inside is None:
                raise missing
            with inside:
                yield inside


def _download(package: Package, temporary: Path, folder: Path) -> Path:
    """Have pip put the file into ``temporary``.

    pip knows the configured index, mirrors, proxies and credentials. It compares the digest before it looks inside: a
    source distribution's metadata is asked of the very bytes that are pinned, in an environment of its own.
    """
    requirement = temporary / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    kind = ["--no-binary", package.name] if package.is_source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--ignore-requires-python", "--retries", "2", "--progress-bar", "off", *kind]
    command += ["--require-hashes", "-r", str(requirement), "-d", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    found = temporary / package.file
    if done.returncode == 0 and found.is_file() and file_digest(found) == package.sha256:
        return found
    raise KtmergeError(_explain(package, folder, done.stderr))


_REASONS = (
    (r"No module named pip", "this Python has no pip; run 'python -m ensurepip' first"),
    (
        r"DO NOT MATCH THE HASHES|Expected sha256",
        "the index serves other bytes than the ones pinned here; nothing was used",
    ),
    (r"No space left|Disk quota", "the disk is full; free some space and start again"),
    (
        r"Connection|resolution|timed out|ProxyError|SSLError|unreachable|Max retries",
        "the package index cannot be reached; go online and start again",
    ),
    (r"No matching distribution|Could not find a version", "the package index does not have it"),
)


def _explain(package: Package, folder: Path, output: str) -> str:
    """One sentence from what pip said, and the way round it."""
    last = [line.strip() for line in output.splitlines() if line.strip().lower().startswith("error")]
    reason = next((text for pattern, text in _REASONS if re.search(pattern, output, re.IGNORECASE)), "")
    reason = reason or (f"pip says: {last[-1]}" if last else "pip failed without a reason")
    return (
        f"{package.name} {package.version}: cannot be fetched: {reason.rstrip('.')}. "
        f"Or put {package.file}, fetched elsewhere, into {folder}."
    )


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders of runs that no longer live."""
    for leftover in folder.glob(".fetch-*-*"):
        pid = leftover.name.split("-")[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _clear(package: Package, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KtmergeError(
            f"{package.name} {package.version}: cannot be kept in {folder}: {error.strerror or error}; "
            "set KTMERGE_CACHE to a folder with space that can be written."
        ) from error
