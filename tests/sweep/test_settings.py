"""What tells one sweep from another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ktmerge import api
from ktmerge.progress import SILENT
from ktmerge.recipes.load import load_recipe, load_suite
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.space import Range


def test_other_statistics_are_another_sweep(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    suite = load_suite(world.suite)
    settings = SweepSettings(
        load_recipe(world.recipe), (Range.parse("lambda=0:1"),), (), suite, suite, ("selection", "report"), "j"
    )

    def digest(*overrides: str) -> str:
        return replace(settings, recipe=load_recipe(world.recipe, overrides=overrides)).digest([], SILENT)

    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "statistics.json").write_text(json.dumps(name.replace("c", "a")))
    for key in ("statistics", "experts.e.statistics"):
        a, b, c = (digest(f"{key}={tmp_path}/{name}") for name in "abc")
        assert a == c != b
        assert digest() not in (a, b)


def test_a_method_that_computes_otherwise_is_another_sweep(  # type: ignore[no-untyped-def]
    world, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite(world.suite)
    recipe, knob = load_recipe(world.recipe), Range.parse("lambda=0:1")
    settings = SweepSettings(recipe, (knob,), ("ties",), suite, suite, ("selection", "report"), "j")
    before = settings.digest([], SILENT)
    assert settings.digest([], SILENT) == before
    monkeypatch.setattr("ktmerge.sweep.settings.find_method", lambda name: SimpleNamespace(semantics=99))
    assert settings.digest([], SILENT) != before


def test_the_recipes_eval_section_is_heeded(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    found: list[SweepSettings] = []
    monkeypatch.setattr("ktmerge.sweep.launch.launch", lambda settings, *_: found.append(settings))
    monkeypatch.setattr("ktmerge.sweep.folder.finish", lambda *_: None)
    recipe = load_recipe(world.recipe, overrides=["eval.seed=7", "eval.bootstrap=300", "eval.batch_size=2"])
    api.sweep(recipe, tmp_path / "o", ranges=["lambda=0:1"])
    assert [(one.bootstrap_seed, one.bootstrap, one.batch_size) for one in found] == [(7, 300, 2)]
