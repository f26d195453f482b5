"""Replacing an earlier result: what was there stays until its successor is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commands import digests

from ktmerge import api, cli, pipeline
from ktmerge.errors import KtmergeError, UsageError


@pytest.fixture
def result(small: Path) -> Path:
    """The folder of an earlier run, with scores as if it had been scored, and a note of its owner's."""
    out = small / "result"
    api.run(small / "recipe.yaml", out, device="cpu")
    for file in (pipeline.SCORES, pipeline.REPORT, "notes.txt"):
        (out / file).write_text("old")
    return out


def spoil(small: Path) -> None:
    """Let an expert hold infinite values, which a blend refuses."""
    path = small / "a" / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4000] + b"\x80\x7f" * 2000)


@pytest.mark.slow
def test_a_failed_run_leaves_the_earlier_result(small: Path, result: Path) -> None:
    before = digests(result)
    spoil(small)
    with pytest.raises(KtmergeError, match="infinite"):
        api.run(small / "recipe.yaml", result, device="cpu", overwrite=True)
    assert digests(result) == before


def test_a_run_replaces_what_it_makes_and_what_told_of_it(small: Path, result: Path) -> None:
    changed = api.load_recipe(str(small / "recipe.yaml"), overrides=["blend.density=0.9"])
    before = digests(result)
    api.run(changed, result, device="cpu", overwrite=True)
    assert sorted(os.listdir(result)) == [pipeline.BLENDED, "notes.txt"]
    after = digests(result)
    assert after["blended/model-00001-of-00002.safetensors"] != before["blended/model-00001-of-00002.safetensors"]


def test_a_resumed_run_keeps_the_blend_it_asks_for(small: Path, result: Path) -> None:
    before = (result / "blended" / "ktmerge.json").stat().st_ino
    api.run(small / "recipe.yaml", result, device="cpu", resume=True)
    assert (result / "blended" / "ktmerge.json").stat().st_ino == before
    changed = api.load_recipe(str(small / "recipe.yaml"), overrides=["output.rounding=nearest"])
    api.run(changed, result, device="cpu", resume=True)
    assert (result / "blended" / "ktmerge.json").stat().st_ino != before


def test_a_file_is_no_result(small: Path) -> None:
    (small / "result").write_text("precious")
    with pytest.raises(UsageError, match="is a file"):
        api.run(small / "recipe.yaml", small / "result", device="cpu", overwrite=True)
    assert (small / "result").read_text() == "precious"


@pytest.mark.slow
def test_resuming_what_is_done_keeps_it(small: Path) -> None:
    out = small / "out"
    first = api.blend(small / "recipe.yaml", out, device="cpu")
    before = (out / "ktmerge.json").stat().st_ino
    again = api.blend(small / "recipe.yaml", out, device="cpu", resume=True)
    assert (out / "ktmerge.json").stat().st_ino == before
    assert again.parts() == first.parts()
    assert again.out == first.out
    assert "was there already" in again.table()[2]
    other = api.load_recipe(str(small / "recipe.yaml"), overrides=["seed=4"])
    with pytest.raises(UsageError, match="--overwrite"):
        api.blend(other, out, device="cpu", resume=True)
    shard = out / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")  # no longer what it says it is
    with pytest.raises(UsageError, match="--overwrite"):
        api.blend(small / "recipe.yaml", out, device="cpu", resume=True)
    shard.unlink()
    with pytest.raises(UsageError, match="--overwrite"):
        api.blend(small / "recipe.yaml", out, device="cpu", resume=True)


@pytest.mark.parametrize("file", ["b/model-00001-of-00002.safetensors", "base/tokenizer.json"])
def test_resuming_over_other_files_of_an_older_time_keeps_nothing(small: Path, file: str) -> None:
    """``rsync -a`` brings another expert, or another tokenizer, that is older than the output."""
    out = small / "out"
    api.blend(small / "recipe.yaml", out, device="cpu")
    path = small / file
    other = (small / "a" / path.name).read_bytes() if path.parent.name == "b" else path.read_bytes() + b"\n"
    path.write_bytes(other)
    os.utime(path, (0, 0))
    with pytest.raises(UsageError, match="--overwrite"):
        api.blend(small / "recipe.yaml", out, device="cpu", resume=True)


def test_resuming_over_the_same_files_copied_anew_keeps_the_blend(small: Path) -> None:
    out = small / "out"
    api.blend(small / "recipe.yaml", out, device="cpu")
    before = (out / "ktmerge.json").stat().st_ino
    weights = small / "b" / "model-00001-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes())
    api.blend(small / "recipe.yaml", out, device="cpu", resume=True)
    assert (out / "ktmerge.json").stat().st_ino == before


def test_a_blend_without_out_says_all_that_is_wrong(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["blend", "-r", str(small / "recipe.yaml"), "--set", "blend.density=7"]
    assert cli._exit_code(arguments) == 2
    said = capsys.readouterr().err
    assert "density" in said
    assert "--out: say where" in said
    assert cli._exit_code(arguments[:3]) == 2
    assert "--out: say where" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(small))
    recipe = str(small / "recipe.yaml")
    assert cli._exit_code(["blend", "-r", recipe, "--out", str(small / "out"), "--dry-run"]) == 0
    assert "two-tasks: " in capsys.readouterr().out
    assert sorted(os.listdir(small)) == before
