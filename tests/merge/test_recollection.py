"""What a blend leaves for the next one of the same inputs: fewer looks at them, never other bytes."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.merge import blend, recollection, selection
from ktmerge.merge.kernels.native import native
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.recollection import Recollection
from ktmerge.merge.workspace import Workspace

TWO = {"a": ("a", 1.0), "b": ("b", 1.0)}
WEIGHTS = "model.safetensors"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where things are kept; a test's tensors are large enough for samples."""
    if native() is None:
        pytest.skip("there are no compiled kernels here")
    kernels = cache_folder() / "kernels"
    monkeypatch.setenv("KTMERGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(kernels)
    monkeypatch.setattr(selection, "_LARGE", 512)
    return tmp_path / "cache" / "thresholds"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the weights are looked at before they are blended."""
    counted: Counter[str] = Counter()
    for name in ("note", "sample", "measure"):
        whole = getattr(Workspace, name)

        def look(*arguments: Any, name: str = name, whole: Any = whole) -> Any:
            counted[name] += 1
            return whole(*arguments)

        monkeypatch.setattr(Workspace, name, look)
    return counted


@pytest.fixture
def models(llamas: Path, tmp_path: Path) -> Path:
    """Old enough that their digests are remembered."""
    folder = tmp_path / "models"
    shutil.copytree(llamas, folder)
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return folder


def ties(**parameters: Any) -> dict[str, Any]:
    return {"method": "ties", "density": 0.3, **parameters}


def test_the_same_trim_again_takes_no_look(
    models: Path, cache: Path, looks: Counter[str], recipe_in: Any, tmp_path: Path
) -> None:
    blend(recipe_in(models, TWO, ties()), tmp_path / "first", device="cpu")
    assert looks["note"]
    assert looks["sample"]
    looks.clear()
    blend(recipe_in(models, TWO, ties() | {"lambda": 0.5}), tmp_path / "second", device="cpu")
    assert not looks
    blend(recipe_in(models, TWO, ties() | {"lambda": 0.5}), tmp_path / "afresh", device="cpu", afresh=True)
    assert looks["note"]
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "afresh" / WEIGHTS).read_bytes()


@pytest.mark.every(2)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_another_density_takes_no_sample(
    models: Path, cache: Path, looks: Counter[str], recipe_in: Any, tmp_path: Path, scope: str
) -> None:
    blend(recipe_in(models, TWO, ties(scope=scope)), tmp_path / "first", device="cpu")
    looks.clear()
    other = recipe_in(models, TWO, ties(scope=scope, density=0.6))
    blend(other, tmp_path / "second", device="cpu")
    assert looks["note"]
    assert not looks["sample"]
    blend(other, tmp_path / "afresh", device="cpu", afresh=True)
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "afresh" / WEIGHTS).read_bytes()


def test_a_wrong_threshold_is_noticed_and_forgotten(models: Path, cache: Path, recipe_in: Any, tmp_path: Path) -> None:
    recipe = recipe_in(models, TWO, ties())
    blend(recipe, tmp_path / "first", device="cpu")
    plan = plan_blend(recipe)
    spoiled = Recollection(plan)
    digests = {name: recollection._recalled(one) for name, one in recollection.inputs_of(plan).items()}
    for key, found in spoiled.found.thresholds.items():
        spoiled.found.thresholds[key] = [(replace(kept, floor=kept.floor + (1 << 20)), None) for kept, _ in found]
    spoiled.found.is_new = True
    spoiled.keep(digests)  # type: ignore[arg-type]
    blend(recipe, tmp_path / "second", device="cpu")
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "first" / WEIGHTS).read_bytes()
    right = Recollection(plan).found.thresholds
    assert right
    assert all(right[key] != wrong for key, wrong in spoiled.found.thresholds.items() if wrong[0][0].kept)


@pytest.mark.every(3)
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", None])
def test_a_broken_memory_is_none(
    models: Path, cache: Path, looks: Counter[str], recipe_in: Any, tmp_path: Path, content: bytes | None
) -> None:
    blend(recipe_in(models, TWO, ties()), tmp_path / "first", device="cpu")
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    looks.clear()
    blend(recipe_in(models, TWO, ties()), tmp_path / "second", device="cpu")
    assert looks["sample"]
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "first" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_other_inputs_and_other_seeds_have_their_own(models: Path, cache: Path, recipe_in: Any, tmp_path: Path) -> None:
    blend(recipe_in(models, TWO, ties()), tmp_path / "first", device="cpu")
    blend(recipe_in(models, TWO, ties(), seed=1), tmp_path / "second", device="cpu")
    blend(recipe_in(models, {"a": ("b", 1.0), "b": ("a", 1.0)}, ties()), tmp_path / "third", device="cpu")
    assert len(list(cache.iterdir())) == 3


@pytest.mark.slow
def test_only_so_many_are_kept(
    models: Path, cache: Path, recipe_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recollection, "_MOST", 2)
    cache.mkdir(parents=True)
    (cache / ".killed.npz.1.1.tmp").write_bytes(b"half")
    for seed in range(4):
        blend(recipe_in(models, TWO, ties(), seed=seed), tmp_path / str(seed), device="cpu")
    assert len(list(cache.iterdir())) == 2


def test_an_interrupt_leaves_nothing_half_written(
    models: Path, cache: Path, recipe_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if target.parent == cache:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        blend(recipe_in(models, TWO, ties()), tmp_path / "first", device="cpu")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_harm(models: Path, cache: Path, recipe_in: Any, tmp_path: Path) -> None:
    cache.write_text("in the way")
    blend(recipe_in(models, TWO, ties()), tmp_path / "first", device="cpu")
    assert (tmp_path / "first" / WEIGHTS).exists()
