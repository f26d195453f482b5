"""Locks: every input by its content, held against what is there now and against what comes out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from ktmerge import api
from ktmerge.checkpoints import digests
from ktmerge.cli import _exit_code
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge import blend
from ktmerge.merge.lock import FILE

WEIGHTS = "model.safetensors"


@pytest.fixture
def made(llamas: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models, ``recipe.yaml`` and its blend ``out``; a cache of its own."""
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "work"
    shutil.copytree(llamas, folder)
    recipe = recipe_in(folder, {"a": ("a", 1.0), "b": ("b", 0.5)}, {"method": "dare_ties"}, seed=5)
    document = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    blend(recipe, folder / "out", device="cpu")
    return folder


def changed_in_one_bit(weights: Path) -> None:
    """Flip a bit of the last value; size, header and times stay."""
    status = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_every_blend_writes_the_lock_of_its_inputs(made: Path) -> None:
    locked = yaml.safe_load((made / "out" / FILE).read_text())
    for name in ("base", "a", "b"):
        files = locked["inputs"][name]["files"]
        assert files[WEIGHTS]["sha256"] == hashlib.sha256((made / name / WEIGHTS).read_bytes()).hexdigest()
        assert files[WEIGHTS]["size"] == (made / name / WEIGHTS).stat().st_size
        assert "config.json" in files
    assert locked["output"]["sha256"] == {WEIGHTS: hashlib.sha256((made / "out" / WEIGHTS).read_bytes()).hexdigest()}
    assert locked["methods"] == {"dare_ties": 3}
    assert str(made) not in (made / "out" / FILE).read_text()


@pytest.mark.slow
def test_a_lock_made_beforehand_says_the_same_of_inputs(made: Path) -> None:
    path = api.lock(made / "recipe.yaml")
    assert path == made / "recipe.lock.yaml"
    before, after = yaml.safe_load(path.read_text()), yaml.safe_load((made / "out" / FILE).read_text())
    del after["output"]
    assert before == after
    assert api.check_lock(made / "recipe.yaml", path) == []
    with pytest.raises(UsageError, match="exists"):
        api.lock(made / "recipe.yaml")


def test_one_flipped_bit_of_an_input_is_found(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed_in_one_bit(made / "a" / WEIGHTS)
    found = api.check_lock(made / "recipe.yaml", made / "out")
    assert [(one.what, one.decides) for one in found] == [(f"a/{WEIGHTS}", True)]
    with pytest.raises(UsageError, match=r"a/model\.safetensors: sha256 \w+\.\.\., locked"):
        api.blend(made / "recipe.yaml", made / "again", lock=made / "out")
    assert not (made / "again").exists()
    verified = api.verify(made / "out", str(made / "recipe.yaml"))
    assert not verified.holds
    assert [check.what for check in verified.checks if check.state == "differs"] == [f"a/{WEIGHTS}"]
    assert _exit_code(["recipe", "lock", str(made / "recipe.yaml"), "--check", "--out", str(made / "out")]) == 1
    assert f"a/{WEIGHTS}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_change_with_the_old_time_is_found(made: Path) -> None:
    """Size, inode and time of writing are as they were; the time of the last change of any kind is not."""
    weights = made / "a" / WEIGHTS
    old = weights.stat().st_mtime_ns - 10**10
    os.utime(weights, ns=(old, old))
    path = api.lock(made / "recipe.yaml")
    changed_in_one_bit(weights)
    os.utime(weights, ns=(old, old))
    (found,) = api.check_lock(made / "recipe.yaml", path)
    assert found.what == f"a/{WEIGHTS}"


def test_a_bit_that_flips_on_the_disk_is_found_by_reading_again(made: Path) -> None:
    weights = made / "a" / WEIGHTS
    path = api.lock(made / "recipe.yaml")
    before = digests.digest_of(weights)
    changed_in_one_bit(weights)
    digests.remember(weights, before.sha256)  # as if nothing had been written
    assert api.check_lock(made / "recipe.yaml", path) == []
    (found,) = api.check_lock(made / "recipe.yaml", path, rehash=True)
    assert found.what == f"a/{WEIGHTS}"
    checks = api.verify(made / "out", made / "recipe.yaml", rehash=True).checks
    assert [one.what for one in checks if one.state == "differs"] == [f"a/{WEIGHTS}"]


def test_a_locked_blend_gives_the_locked_bytes(made: Path) -> None:
    api.blend(made / "recipe.yaml", made / "again", lock=made / "out")
    assert (made / "again" / WEIGHTS).read_bytes() == (made / "out" / WEIGHTS).read_bytes()
    locked = yaml.safe_load((made / "out" / FILE).read_text())
    locked["output"]["sha256"][WEIGHTS] = "0" * 64
    (made / "other.lock.yaml").write_text(yaml.safe_dump(locked))
    with pytest.raises(KtmergeError, match="gives other bytes than were locked"):
        api.blend(made / "recipe.yaml", made / "third", lock=made / "other.lock.yaml")
    assert not (made / "third").exists()


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 6, "seed and random numbers"),
        ("name", "other", None),
        ("experts", {"a": {"model": "a", "weight": 0.9}, "b": {"model": "b", "weight": 0.5}}, "what happens to every"),
        ("experts", {"a": {"model": "a"}}, "input b: is in the lock only"),
    ],
)
def test_what_decides_the_bytes_is_locked(made: Path, key: str, value: Any, words: str | None) -> None:
    document = yaml.safe_load((made / "recipe.yaml").read_text())
    document[key] = value
    (made / "changed.yaml").write_text(yaml.safe_dump(document))
    found = [f"{one.what}: {one.told}" for one in api.check_lock(made / "changed.yaml", made / "out")]
    assert bool(found) == (words is not None)
    assert words is None or any(words in sentence for sentence in found)


def test_the_base_s_other_files_are_locked(made: Path) -> None:
    (made / "base" / "generation_config.json").write_text('{"top_k": 3}')
    found = api.check_lock(made / "recipe.yaml", made / "out")
    assert "base/generation_config.json" in [one.what for one in found]


def test_a_newer_or_broken_lock_is_refused(made: Path) -> None:
    for text, words in (
        ("ktmerge_lock: 2\n", "upgrade ktmerge"),
        ("ktmerge_lock: 1\n", "missing or not what ktmerge writes"),
        ("- 1\n", "is no lock"),
        ("ktmerge_lock: 1\ninputs: {base: {files: {1: {size: 1, sha256: a}}}}\n", "the key '1' is no text"),
    ):
        (made / "x.lock.yaml").write_text(text)
        with pytest.raises(UsageError, match=words):
            api.check_lock(made / "recipe.yaml", made / "x.lock.yaml")
    with pytest.raises(UsageError, match="no such lock"):
        api.check_lock(made / "recipe.yaml", made / "a")


def test_a_file_is_read_once_while_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one" * 1000)
    os.utime(path, ns=(10**18, 10**18))
    first = digests.digest_of(path)
    assert first.sha256 == hashlib.sha256(b"one" * 1000).hexdigest()
    monkeypatch.setattr(digests.hashlib, "sha256", _only_names(digests.hashlib.sha256))
    assert digests.digest_of(path) == first
    path.write_bytes(b"two" * 1000)
    os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    with pytest.raises(AssertionError, match="read again"):
        digests.digest_of(path)


def test_a_file_whose_permissions_change_meanwhile_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    read, changes = digests.file_digest, [lambda: path.chmod(0o600), lambda: path.write_bytes(b"three")]

    def digest(*arguments: Any) -> str:
        found = read(*arguments)
        if changes:
            changes.pop(0)()
        return found

    monkeypatch.setattr(digests, "file_digest", digest)
    with pytest.raises(KtmergeError, match="changed while it was read"):
        digests.digest_of(path)
    changes[:] = [lambda: path.chmod(0o644)]
    assert digests.digest_of(path).sha256 == hashlib.sha256(b"three").hexdigest()


def _only_names(real: Any) -> Any:
    """sha256 for the names of kept digests; reading a file for it fails."""

    def digest(data: bytes | None = None) -> Any:
        assert data is not None, "read again"
        return real(data)

    return digest


def test_a_file_just_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = digests.digest_of(path)
    stamp = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert digests.digest_of(path) != first


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("at", "value", "named"),
    [
        (("inputs", "a", "files", WEIGHTS), 3, "inputs.a"),
        (("inputs", "a", "files", WEIGHTS, "sha256"), None, "inputs.a"),
        (("inputs", "base", "files", "config.json", "size"), "x", "inputs.base"),
        (("inputs", "b"), [], "inputs.b"),
        (("inputs",), 3, "inputs"),
        (("output",), 3, "output"),
        (("output", "sha256"), 3, "output"),
        (("output", "sha256", WEIGHTS), 3, "output"),
    ],
)
def test_a_broken_lock_is_refused_whoever_reads_it(
    made: Path, at: tuple[str, ...], value: object, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    locked = yaml.safe_load((made / "out" / FILE).read_text())
    inner = locked
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    file = made / "broken.lock.yaml"
    file.write_text(yaml.safe_dump(locked))
    for command in (
        ["lock", str(made / "recipe.yaml"), "--check", "--out", str(file)],
        ["diff", str(made / "recipe.yaml"), str(file)],
    ):
        assert _exit_code(["recipe", *command]) == 2
        assert f"{file}: the lock's '{named}' is missing or not what ktmerge writes" in capsys.readouterr().err


def test_two_that_say_the_same_are_told_in_a_line(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["recipe", "diff", str(made / "recipe.yaml"), str(made / "out")]) == 0
    assert capsys.readouterr().out.split() == ["same", "the", "two", "say", "the", "same"]


def test_the_same_model_in_other_files_is_told_as_such(made: Path) -> None:
    tensors = load_file(made / "base" / WEIGHTS)
    (made / "base" / WEIGHTS).unlink()
    names = sorted(tensors, reverse=True)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, made / "base" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (made / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError) as caught:
        api.blend(made / "recipe.yaml", made / "again", lock=made / "out" / FILE)
    (told,) = str(caught.value).splitlines()
    assert "input base: has the same tensors, but in model-00001-of-00002.safetensors, model-00002" in told
