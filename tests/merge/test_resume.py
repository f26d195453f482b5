"""A blend goes on where an interrupted one stopped, to the same bytes and the same record."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ktmerge.checkpoints import blocks
from ktmerge.errors import KtmergeError
from ktmerge.merge import blend
from ktmerge.merge.lock import locked_now
from ktmerge.merge.planning import plan_blend

TWO = {"a": ("a", 0.7), "b": ("b", 0.5)}
TIES = {"method": "ties", "density": 0.4, "scope": "global", "where": [{"part": "embed", "keep": "a"}]}


class Interrupting:
    """A progress that keeps what it is told, and interrupts after some steps of the blend itself."""

    def __init__(self, after: int = 1_000_000) -> None:
        self.left = after
        self.notes: list[str] = []
        self._blending = False

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "items") -> Iterator[Interrupting]:
        self._blending = description == "blend"
        yield self

    def advance(self, amount: float = 1) -> None:
        self.left -= self._blending
        if self.left < 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True, params=["cached", pytest.param("direct", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files through the page cache, as small ones are, or past it in blocks."""
    if request.param == "direct":
        monkeypatch.setattr(blocks, "LEAST", 1)
        monkeypatch.setattr(blocks, "SIZE", 8192)
    return str(request.param)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.every(2)
@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("models", ["llamas", "llavas"])
def test_the_same_bytes_and_record(
    models: str, after: int, tmp_path: Path, recipe_in: Any, request: pytest.FixtureRequest
) -> None:
    recipe = recipe_in(request.getfixturevalue(models), TWO, TIES, output={"rounding": "stochastic"}, seed=5)
    whole = blend(recipe, tmp_path / "whole", device="cpu")
    out = tmp_path / "place" / "out"
    with pytest.raises(KeyboardInterrupt):
        blend(recipe, out, device="cpu", resume=True, progress=Interrupting(after))
    assert len(os.listdir(out.parent)) == 1
    progress = Interrupting()
    resumed = blend(recipe, out, device="cpu", resume=True, progress=progress)
    assert any(note.startswith("going on with an interrupted run") for note in progress.notes)
    assert files(out) == files(tmp_path / "whole")
    assert os.listdir(out.parent) == ["out"]
    assert {**resumed.to_json(), "seconds": 0} == {**whole.to_json(), "seconds": 0}


@pytest.mark.every(2)
@pytest.mark.parametrize("after", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_methods_that_take_whole_tensors(llamas: Path, tmp_path: Path, recipe_in: Any, after: int) -> None:
    """What the compiled kernels do not cover goes by torch, and is written in other pieces."""
    recipe = recipe_in(llamas, TWO, {"method": "mergekit:della", "density": 0.5, "epsilon": 0.1}, seed=5)
    blend(recipe, tmp_path / "whole", device="cpu")
    out = tmp_path / "place" / "out"
    with pytest.raises(KeyboardInterrupt):
        blend(recipe, out, device="cpu", resume=True, progress=Interrupting(after))
    progress = Interrupting()
    blend(recipe, out, device="cpu", resume=True, progress=progress)
    assert any("an interrupted run, which finished" in note for note in progress.notes)
    assert files(out) == files(tmp_path / "whole")
    assert json.loads((out / "ktmerge.json").read_text())["versions"]["mergekit"] == version("mergekit")


def test_finished_tensors_are_not_made_again(
    llamas: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ktmerge.merge.sinks import FileSink

    recipe = recipe_in(llamas, TWO, TIES)
    with pytest.raises(KeyboardInterrupt):
        blend(recipe, tmp_path / "out", device="cpu", resume=True, progress=Interrupting(8))
    found: dict[str, bool] = {}
    whole = FileSink.finished

    def finished(self: FileSink, name: str) -> dict[str, Any] | None:
        report = whole(self, name)
        found[name] = report is not None
        return report

    written: set[str] = set()
    for method in ("write", "write_bytes"):
        monkeypatch.setattr(FileSink, method, _noting(getattr(FileSink, method), written))
    monkeypatch.setattr(FileSink, "finished", finished)
    blend(recipe, tmp_path / "out", device="cpu", resume=True)
    there = {name for name, is_there in found.items() if is_there}
    assert there
    assert not there & written
    assert there | written == found.keys() - {"model.embed_tokens.weight"}  # which is copied


def _noting(method: Any, names: set[str]) -> Any:
    def noting(self: Any, name: str, *arguments: Any) -> None:
        names.add(name)
        method(self, name, *arguments)

    return noting


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blend": {**TIES, "density": 0.5}}, "recipe, coefficients"),
        ({"seed": 6}, "recipe, random"),
        ({"output": {"rounding": "stochastic"}}, "recipe, coefficients"),
    ],
)
def test_another_blend_starts_from_the_beginning(
    llamas: Path, tmp_path: Path, recipe_in: Any, change: dict[str, Any], said: str
) -> None:
    out = tmp_path / "place" / "out"
    with pytest.raises(KeyboardInterrupt):
        blend(recipe_in(llamas, TWO, TIES), out, device="cpu", resume=True, progress=Interrupting(8))
    changed = recipe_in(llamas, TWO, **{"blend": TIES, **change})
    progress = Interrupting()
    blend(changed, out, device="cpu", resume=True, progress=progress)
    assert progress.notes == [
        f"starting from the beginning: what an interrupted run left differs in {said}; it is removed"
    ]
    blend(changed, tmp_path / "whole", device="cpu")
    assert files(out) == files(tmp_path / "whole")


@pytest.fixture
def aged(tmp_path: Path, llamas: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models as if they had been there for long; what is remembered of files is empty."""
    monkeypatch.setattr("ktmerge.checkpoints.digests.cache_folder", lambda: tmp_path / "cache")
    folder = Path(shutil.copytree(llamas, tmp_path / "models"))
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return folder


def stopped(recipe: Any, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        blend(recipe, out, device="cpu", resume=True, progress=Interrupting(8))


@pytest.mark.every(3)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("file", ["b/model.safetensors", "base/tokenizer.json"])
def test_another_input_starts_from_the_beginning(
    aged: Path, tmp_path: Path, recipe_in: Any, file: str, known: bool
) -> None:
    recipe = recipe_in(aged, TWO, TIES)
    out = tmp_path / "place" / "out"
    if known:
        locked_now(plan_blend(recipe))
    stopped(recipe, out)
    if not known:
        shutil.rmtree(tmp_path / "cache")
    path = aged / file
    path.write_bytes((aged / "a" / path.name).read_bytes() if path.suffix == ".safetensors" else b"[]")
    progress = Interrupting()
    blend(recipe, out, device="cpu", resume=True, progress=progress)
    said = f"{file} {'has other bytes' if known else 'was touched or written, and its bytes of before are not known'}"
    assert progress.notes == [
        f"starting from the beginning: what an interrupted run left differs in input files ({said}); it is removed"
    ]
    blend(recipe, tmp_path / "whole", device="cpu")
    assert files(out) == files(tmp_path / "whole")


def copied_anew(path: Path) -> None:
    shutil.copy(path, path.with_name("again"))
    path.with_name("again").rename(path)


@pytest.mark.every(3)
@pytest.mark.parametrize("meddle", [lambda path: path.chmod(0o600), Path.touch, copied_anew])
def test_inputs_that_were_touched_and_hold_what_they_held_are_gone_on_with(
    aged: Path, tmp_path: Path, recipe_in: Any, meddle: Any
) -> None:
    recipe = recipe_in(aged, TWO, TIES)
    whole, out = tmp_path / "whole", tmp_path / "place" / "out"
    blend(recipe, whole, device="cpu")
    stopped(recipe, out)
    for _ in range(2):
        for file in ("base/config.json", "base/model.safetensors", "b/model.safetensors"):
            meddle(aged / file)
        locked_now(plan_blend(recipe))  # as another blend of these inputs in between
    progress = Interrupting()
    blend(recipe, out, device="cpu", resume=True, progress=progress)
    assert [note[:34] for note in progress.notes] == ["going on with an interrupted run, "]
    assert files(out) == files(whole)


def test_what_was_made_of_other_bytes_is_not_gone_on_with(aged: Path, tmp_path: Path, recipe_in: Any) -> None:
    """An input overwritten under the run, which is stopped for it; then the input is as it was before."""
    recipe = recipe_in(aged, TWO, TIES)
    whole, out, weights = tmp_path / "whole", tmp_path / "place" / "out", aged / "b" / "model.safetensors"
    blend(recipe, whole, device="cpu")
    sound = weights.read_bytes()

    class Overwriting(Interrupting):
        def advance(self, amount: float = 1) -> None:
            if self._blending and weights.read_bytes() == sound:
                weights.write_bytes((aged / "a" / "model.safetensors").read_bytes())
            super().advance(amount)

    with pytest.raises((KeyboardInterrupt, KtmergeError)):
        blend(recipe, out, device="cpu", resume=True, progress=Overwriting(8))
    weights.write_bytes(sound)
    blend(recipe, out, device="cpu", resume=True)
    assert files(out) == files(whole)


def test_a_file_that_came_or_went_is_named(aged: Path, tmp_path: Path, recipe_in: Any) -> None:
    recipe = recipe_in(aged, TWO, TIES)
    stopped(recipe, tmp_path / "out")
    (aged / "base" / "vocab.txt").write_text("x")
    (aged / "base" / "tokenizer.json").unlink()
    progress = Interrupting()
    blend(recipe, tmp_path / "out", device="cpu", resume=True, progress=progress)
    assert any("(base/tokenizer.json is gone, base/vocab.txt is new)" in note for note in progress.notes)


@pytest.mark.every(3)
def test_a_carried_module_that_was_cut_off_is_carried_anew(
    tmp_path: Path, llamas: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called as weights are, which stay when a run is gone on with."""
    shutil.copytree(llamas, tmp_path / "models")
    base = tmp_path / "models" / "base"
    (base / "modules.json").write_text(json.dumps([{"path": "2_Dense"}]))
    shutil.copytree(llamas / "a", base / "2_Dense")
    recipe = recipe_in(tmp_path / "models", TWO, TIES)
    copy = shutil.copyfile

    def killed(source: Path, target: Path) -> None:
        if target.name != "model.safetensors":
            copy(source, target)
            return
        target.write_bytes(Path(source).read_bytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            blend(recipe, tmp_path / "out", device="cpu", resume=True)
    blend(recipe, tmp_path / "out", device="cpu", resume=True)
    dense = Path("2_Dense", "model.safetensors")
    assert (tmp_path / "out" / dense).read_bytes() == (base / dense).read_bytes()
