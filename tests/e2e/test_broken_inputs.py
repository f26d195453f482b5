"""What is wrong with an input, or happens to it under the run, is found and named by ``blend``; nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import check_refused

from ktmerge import cli, console

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:stop]), content[stop:]


def write(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a shard's header."""
    header, data = header_of(path)
    change(header)
    write(path, json.dumps(header).encode(), data)


def edit_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads(path.read_text())
    change(document["weight_map"])
    path.write_text(json.dumps(document))


def largest(header: dict[str, Any]) -> str:
    return max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])


# --- broken inputs ----------------------------------------------------------------------------------------------------


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def duplicate_key(path: Path) -> None:
    header, data = header_of(path)
    name = largest(header)
    text = json.dumps(header)
    write(path, f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode(), data)


def overlap(header: dict[str, Any]) -> None:
    last = header[largest(header)]["data_offsets"]
    last[:] = [last[0] - 2, last[1] - 2]


def second_home(folder: Path) -> None:
    """A tensor in both shards, as after a merge of folders."""
    shutil.copy(folder / SHARD, folder / OTHER)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda a: (a / SHARD).unlink(), f"names the file '{SHARD}', which is missing"),
    "missing index": (lambda a: (a / INDEX).unlink(), "their index .* is missing"),
    "truncated data": (lambda a: os.truncate(a / SHARD, (a / SHARD).stat().st_size - 1), "may be truncated"),
    "truncated header": (lambda a: os.truncate(a / SHARD, 100), "may be truncated"),
    "empty file": (lambda a: os.truncate(a / SHARD, 0), "fewer than the 8"),
    "longer file": (lambda a: os.truncate(a / SHARD, (a / SHARD).stat().st_size + 1), "belong to no tensor"),
    "flipped length": (lambda a: flip(a / SHARD, 5, 0), "its header claims"),
    "flipped brace": (lambda a: flip(a / SHARD, 8, 0), "not JSON"),
    "flipped letter": (lambda a: flip(a / SHARD, 9, 7), "not UTF-8|not JSON"),
    "duplicate key": (lambda a: duplicate_key(a / SHARD), "the key 'model.* stands twice"),
    "overlap": (lambda a: edit(a / SHARD, overlap), "overlaps the tensor before it"),
    "hole": (
        lambda a: edit(a / SHARD, lambda h: h.pop(next(name for name in h if name != "__metadata__"))),
        "leaves a hole before it|belong to no tensor",
    ),
    "out of range": (
        lambda a: edit(a / SHARD, lambda h: h[largest(h)].update(shape=[10**9], data_offsets=[0, 2 * 10**9])),
        "reaches to byte 2000000000",
    ),
    "2^63 shape": (lambda a: edit(a / SHARD, lambda h: h[largest(h)].update(shape=[2**63, 1])), r"from 0 to 2\^63 - 1"),
    "shapes that overflow": (
        lambda a: edit(a / SHARD, lambda h: h[largest(h)].update(shape=[2**62, 2**62])),
        "has shape .* which takes",
    ),
    "negative offset": (
        lambda a: edit(a / SHARD, lambda h: h[largest(h)].update(data_offsets=[-2, 0])),
        "has data_offsets that are not two whole numbers",
    ),
    "unknown type": (lambda a: edit(a / SHARD, lambda h: h[largest(h)].update(dtype="BF61")), "unknown type 'BF61'"),
    "renamed tensor": (lambda a: edit(a / SHARD, lambda h: h.update(x=h.pop(largest(h)))), "which does not have it"),
    "a tensor twice": (second_home, "is in both"),
    "index promises": (lambda a: edit_index(a / INDEX, lambda m: m.update(ghost=SHARD)), "promises tensor 'ghost'"),
    "index misplaces": (
        lambda a: edit_index(a / INDEX, lambda m: m.update({NORM: SHARD if m[NORM] != SHARD else OTHER})),
        f"promises tensor '{NORM}' in .* but it is in",
    ),
    "index forgets": (lambda a: edit_index(a / INDEX, lambda m: m.pop(NORM)), f"does not list tensor '{NORM}'"),
    "index outside": (
        lambda a: edit_index(a / INDEX, lambda m: m.update({NORM: "../a/x.safetensors"})),
        "outside the folder",
    ),
    "index doubles": (
        lambda a: (a / INDEX).write_text((a / INDEX).read_text().replace("map\": {", f'map": {{"{NORM}": "x", ')),
        f"the key '{NORM}' stands twice",
    ),
    "index is no JSON": (lambda a: (a / INDEX).write_text("{"), "not JSON"),
    "other shape": (
        lambda a: edit(a / SHARD, lambda h: h[largest(h)].update(shape=[*h[largest(h)]["shape"], 1])),
        "differs from the base in 1 of its tensors",
    ),
    "infinite weights": (
        lambda a: (a / SHARD).write_bytes((a / SHARD).read_bytes()[:-64] + b"\x80\x7f" * 32),
        "values that are NaN or infinite",
    ),
}  # fmt: skip


@pytest.mark.every(5)
@pytest.mark.parametrize("owner", ["base", "a"])
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_inputs_are_named(small: Path, owner: str, broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = BROKEN[broken]
    damage(small / owner)
    check_refused(small, small / "place" / "out", expected, capsys)
    assert not (small / "place").exists()


# --- inputs that change under the run ---------------------------------------------------------------------------------


class Meddling(console.TerminalProgress):
    """Does something to an input at a moment of the run: when a task begins, or some steps later."""

    def __init__(self, act: Callable[[], object], after: int) -> None:
        super().__init__()
        self._act: Callable[[], object] | None = act
        self._left = after

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "items") -> Iterator[Meddling]:  # type: ignore[override]
        self.advance(0)
        yield self

    def advance(self, amount: float = 1) -> None:
        if self._left == 0 and self._act is not None:
            self._act()
            self._act = None
        self._left -= 1


def replace(path: Path) -> None:
    """Put another file of the same size and age in its place."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


def change(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\0\0")


def change_unseen(path: Path) -> None:
    """Change it in place, and put its time back as a copy that keeps times does."""
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "replaced": (replace, "was changed while it was in use"),
    "changed": (change, "was changed while it was in use"),
    "changed, its time put back": (change_unseen, "was changed while it was in use"),
    "truncated": (lambda path: os.truncate(path, 500), "was changed while it was in use|truncated while it was in use"),
    "removed": (lambda path: path.unlink(), "cannot be read any more|cannot be opened"),
}


@pytest.mark.every(5)
@pytest.mark.parametrize("after", [0, 4])
@pytest.mark.parametrize("owner", ["base", "b"])
@pytest.mark.parametrize("kind", CHANGES)
def test_inputs_that_change_are_named(
    small: Path, kind: str, owner: str, after: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meddle, expected = CHANGES[kind]
    path = small / owner / SHARD
    monkeypatch.setattr(console, "TerminalProgress", lambda: Meddling(lambda: meddle(path), after))
    check_refused(small, small / "place" / "out", f"{SHARD}: .*({expected})", capsys, code=1)
    assert not (small / "place").exists()


# --- what is no file --------------------------------------------------------------------------------------------------

NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device without end": lambda path: os.symlink("/dev/zero", path),
    "a link to itself": lambda path: os.symlink(path.name, path),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("file", [SHARD, INDEX, "config.json"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_named(small: Path, kind: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "a" / file).unlink()
    NO_FILES[kind](small / "a" / file)
    check_refused(small, small / "place" / "out", file, capsys, code=2)
    assert not (small / "place").exists()


def test_an_address_is_no_model(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("base: base", "base: https://huggingface.co/org/name"))
    check_refused(small, small / "out", r"is an address; name a folder, or a hub id", capsys, code=2)


def test_a_folder_that_may_not_be_entered(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a" and allowed(path, mode))
    check_refused(small, small / "out", r"experts\.a\.model: a: no permission to read this folder", capsys, code=2)


@pytest.mark.parametrize("words", [["inspect", "base", "a", "--plot"], ["recipe", "import", "recipe.yaml", "--out"]])
def test_a_folder_that_takes_no_files_is_told_before_the_work(
    small: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the system's answer is made up."""
    (small / "shut").mkdir()
    monkeypatch.chdir(small)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut" and allowed(path, mode))
    check_refused(small, small / "shut/new/out", "nothing may be written into the folder .*shut", capsys, code=2)
    assert cli._exit_code([*words, "shut/x.png"]) == 2
    assert "shut/x.png: nothing may be written into the folder" in capsys.readouterr().err
    assert not list((small / "shut").iterdir())
