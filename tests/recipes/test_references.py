"""References of a recipe that is written elsewhere still lead to the same models."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktmerge import api
from ktmerge.recipes import load_recipe
from ktmerge.recipes.references import moved, way_to


def test_only_relative_paths_change(tmp_path: Path) -> None:
    source, folder = tmp_path / "a", tmp_path / "b" / "c"
    for name in ("base", "adapter", "one+two"):
        (source / name).mkdir(parents=True)
    for reference, wanted in (
        ("base", "../../a/base"), ("base+adapter", "../../a/base+../../a/adapter"), ("one+two", "../../a/one+two"),
        ("org/name@main", "org/name@main"), ("org/name+adapter", "org/name+../../a/adapter"), ("", ""),
        (str(source / "base"), str(source / "base")), ("~/base", "~/base"),
    ):  # fmt: skip
        assert moved(reference, source, folder) == wanted


def test_a_way_out_of_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "far" / "away" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to("far/away/out")
    way = way_to(tmp_path / "base", tmp_path / "out")
    assert (tmp_path / "out" / way).samefile(tmp_path / "base")


def test_a_new_recipe_in_another_folder_names_models_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "runs/e", "recipes"):
        Path(name).mkdir(parents=True)
    recipe = load_recipe(api.new_recipe("recipes/r.yaml", base="base", experts=["e=runs/e"]))
    assert recipe.base == "../base"
    assert recipe.experts["e"].model == "../runs/e"
