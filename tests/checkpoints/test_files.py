"""Carrying files, and outputs that must not touch inputs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.files import clear_os_errors, copy_files, refuse_overlap
from ktmerge.checkpoints.regular import read_regular
from ktmerge.errors import KtmergeError, UsageError

MakeCheckpoint = Callable[..., Path]


def test_everything_but_the_weights(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    files = {"tokenizer.json": "t", "a/b/c.py": "c", ".hidden/x": "x", "ktmerge.json": "{}", "LICENSE": "l"}
    base = Checkpoint.open(make_checkpoint(files=files))
    out = tmp_path / "out"
    out.mkdir()
    (out / "LICENSE").write_text("mine")
    assert copy_files(base, out, skip=["tokenizer.json"]) == ["a/b/c.py", "config.json"]
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"a/b/c.py", "config.json", "LICENSE"}
    assert (out / "LICENSE").read_text() == "mine"
    assert (out / "a/b/c.py").read_text() == "c"


def test_links_become_files(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    root = make_checkpoint()
    (root / "vocab.txt").symlink_to("config.json")
    copy_files(Checkpoint.open(root), tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()


def test_a_file_gone_meanwhile_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    base = Checkpoint.open(make_checkpoint(files={"vocab.txt": "v"}))
    (base.root / "vocab.txt").unlink()
    with pytest.raises(KtmergeError, match=r"model/vocab\.txt: No such file"):
        copy_files(base, tmp_path / "out")


@pytest.mark.parametrize(
    ("out", "reason"),
    [("base", "is one of the inputs"), ("base/new", "lies inside the input"), (".", "contains the input")],
)
def test_overlap(tmp_path: Path, out: str, reason: str) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    for root in (tmp_path, tmp_path / "link"):
        with pytest.raises(UsageError, match=reason):
            refuse_overlap(root / out, [tmp_path / "other", tmp_path / "base"])
    refuse_overlap(tmp_path / "base2", [tmp_path / "base"])
    refuse_overlap(tmp_path / "bas", [tmp_path / "base"])


def test_an_input_under_another_name_is_one_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounted twice, or spelled otherwise where letters' cases are one, it has another path and the same place."""
    (tmp_path / "base" / "inner").mkdir(parents=True)
    stat = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda path, **_: stat(Path(str(path).replace(str(tmp_path / "again"), str(tmp_path))))
    )
    for out, reason in [("base", "is one of"), ("base/inner/new", "lies inside"), ("", "contains")]:
        with pytest.raises(UsageError, match=reason):
            refuse_overlap(tmp_path / "again" / out, [tmp_path / "base"])


@pytest.mark.parametrize(
    ("code", "reason"), [(28, "disk is full"), (13, "no permission"), (30, "no permission"), (5, "Input/output")]
)
def test_os_errors_become_sentences(code: int, reason: str) -> None:
    with pytest.raises(KtmergeError, match=reason) as caught, clear_os_errors(Path("some/file")):
        raise OSError(code, os.strerror(code))
    assert "some/file" in str(caught.value)


def test_what_is_no_file_leaves_nothing_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = os.listdir("/proc/self/fd")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match=r"directory|regular file"):
            read_regular(place)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_larger_than_allowed_is_told_from_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(KtmergeError, match=r"f: is larger than files may be here; raise the limit"),
        clear_os_errors(tmp_path / "f"),
    ):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KTMERGE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(UsageError, match="set HOME, or KTMERGE_CACHE"):
        cache_folder()
