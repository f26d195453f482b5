"""Recipes of earlier schema versions are read as if written today; those of later ones are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.recipes import load, load_recipe, load_suite
from ktmerge.recipes.migration import migrated


def renamed(document: dict[str, Any]) -> dict[str, Any]:
    """A step as there may be one: a key was called otherwise."""
    method = document.pop("how")
    return {**document, "blend": {"method": method}}


def test_steps_are_taken_one_after_the_other() -> None:
    steps = {1: lambda d: {**d, "path": [*d.get("path", []), 1]}, 2: lambda d: {**d, "path": [*d["path"], 2]}}
    given = {"v": 1, "path": [0]}
    assert migrated(given, "v", 3, steps, "x") == {"v": 3, "path": [0, 1, 2]}
    assert migrated({"v": 2, "path": []}, "v", 3, steps, "x") == {"v": 3, "path": [2]}
    assert migrated({"v": 3}, "v", 3, steps, "x") == {"v": 3}
    assert given == {"v": 1, "path": [0]}


@pytest.mark.parametrize(
    ("version", "words"),
    [(4, "written for schema version 4, this ktmerge knows 3: .*Upgrade ktmerge"), (0, "never was a version 0"),
     (True, "is a number, e.g. 3, not True"), ("1", "is a number, e.g. 3, not '1'")],
)  # fmt: skip
def test_versions_that_cannot_be_read_are_refused(version: Any, words: str) -> None:
    with pytest.raises(UsageError, match=rf"^x.yaml: {'' if version == 4 else 'v: '}.*{words}"):
        migrated({"v": version}, "v", 3, {1: dict, 2: dict}, "x.yaml")


def test_an_old_recipe_takes_todays_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "RECIPE_STEPS", {0: renamed})
    (tmp_path / "r.yaml").write_text("ktmerge: 0\nhow: ties\n")
    recipe = load_recipe(tmp_path / "r.yaml", overrides=["blend.density=0.3"])
    assert recipe.ktmerge == 1
    assert recipe.blend is not None
    assert (recipe.blend.method, recipe.blend.parameters) == ("ties", {"density": 0.3})


def test_a_newer_suite_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("ktmerge_suite: 2\nupstream: []\n")
    with pytest.raises(UsageError, match=r"s\.yaml: written for schema version 2"):
        load_suite(tmp_path / "s.yaml")
