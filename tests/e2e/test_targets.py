"""Targets that cannot be written, and disks that fill or fail: said in a sentence, and nothing is left or lost."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import blend, check_refused, digests

from ktmerge.checkpoints import staging


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A file system of its own at ``place``, where the machine lets us mount one."""
    place.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_too_small_a_disk_is_said_first(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(small / "disk", "size=1m") as disk:
        check_refused(small, disk / "out", r"needs 0\.02 GB, but only 0\.00 GB are free", capsys, code=1)
        assert os.listdir(disk) == []


def test_a_disk_that_fills_under_the_run(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.Staging, "require_space", lambda *_: None)
    for size in range(4, 160, 24):
        with mounted(small / "disk", f"size={size}k") as disk:
            (disk / "precious").write_bytes(b"x" * 4096)
            if blend(small, disk / "out") == 0:
                break
            assert "the disk is full" in capsys.readouterr().err
            assert os.listdir(disk) == ["precious"]
    assert size > 40


def test_a_disk_that_fills_leaves_the_old_output(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.Staging, "require_space", lambda *_: None)
    with mounted(small / "disk", "size=100k") as disk:
        assert blend(small, disk / "out", "--set", "blend.density=0.9") == 0
        before = digests(disk)
        assert blend(small, disk / "out", "--overwrite") == 1
        assert "the disk is full" in capsys.readouterr().err
        assert digests(disk) == before


def test_a_target_that_is_read_only(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(small / "disk", "size=1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        check_refused(small, disk / "out", "nothing may be written into the folder", capsys, code=2)
        check_refused(small, disk / "runs" / "out", "nothing may be written into the folder", capsys, code=2)
    place = small / "place"
    place.mkdir(mode=0o500)
    if os.geteuid():
        check_refused(small, place / "out", "nothing may be written into the folder", capsys, code=2)
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("recipe.yaml", "is a file"),
        ("recipe.yaml/out", "is a file, or lies below one"),
        ("base", "is one of the inputs"),
        ("base/out", "lies inside the input"),
        (".", "contains the input"),
        ("x" * 256, "name is too long"),
        ("x" * 245, "name is too long"),
        ("/proc/out", "No such file|Operation not permitted|nothing may be written"),
        ("/dev/null/out", "is a file, or lies below one"),
    ],
)
def test_targets_that_cannot_be_are_named(
    small: Path, target: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(small)
    check_refused(small, small / target, expected, capsys)
    assert digests(small) == before


def test_a_recipe_in_the_output_is_not_replaced_with_it(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no file may be one of the gallery's."""
    assert blend(small, small / "out") == 0
    (small / "recipe.yaml").rename(small / "out" / "recipe.yaml")
    (small / "recipe.yaml").symlink_to("out/recipe.yaml")
    before = digests(small)
    capsys.readouterr()
    assert blend(small, small / "out", "--overwrite") == 2
    assert "out: contains the input" in capsys.readouterr().err
    assert digests(small) == before


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_at_the_end(
    small: Path, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    expected = "the disk is full" if code == errno.ENOSPC else "Input/output error"
    check_refused(small, small / "place" / "out", expected, capsys, code=1)
    assert not (small / "place").exists()


def test_an_output_is_as_any_new_file(small: Path) -> None:
    """Permissions follow the umask, whatever those of the base are."""
    for path in (small / "base").iterdir():
        path.chmod(0o600)
    before = os.umask(0o027)
    try:
        assert blend(small, small / "out") == 0
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (small / "out").iterdir()} == {0o640}
    assert stat.S_IMODE((small / "out").stat().st_mode) == 0o750
