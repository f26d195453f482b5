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
from ktmerge.merge import blend

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


def test_another_input_starts_from_the_beginning(tmp_path: Path, llamas: Path, recipe_in: Any) -> None:
    shutil.copytree(llamas, tmp_path / "models")
    recipe = recipe_in(tmp_path / "models", TWO, TIES)
    out = tmp_path / "place" / "out"
    with pytest.raises(KeyboardInterrupt):
        blend(recipe, out, device="cpu", resume=True, progress=Interrupting(8))
    weights = tmp_path / "models" / "b" / "model.safetensors"
    weights.write_bytes((tmp_path / "models" / "a" / "model.safetensors").read_bytes())
    progress = Interrupting()
    blend(recipe, out, device="cpu", resume=True, progress=progress)
    assert any("differs in input files" in note for note in progress.notes)
    blend(recipe, tmp_path / "whole", device="cpu")
    assert files(out) == files(tmp_path / "whole")


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
