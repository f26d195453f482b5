"""Candidates that are drawn by chance: compared by the mean of several draws, reported by the recipe's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ktmerge import api
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import UsageError
from ktmerge.eval import read_sets
from ktmerge.progress import SILENT
from ktmerge.recipes.load import load_recipe, load_suite
from ktmerge.sweep.live import LiveModel

DARE = ["blend.method=dare", "blend.density=0.3", "blend.lambda=0.8"]


@pytest.mark.slow
def test_scores_are_the_mean_of_the_draws_item_by_item(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    recipe = load_recipe(world.recipe, overrides=DARE)
    live = LiveModel(recipe, "cpu", None, 0, SILENT)
    (items,) = live.cut(read_sets(load_suite(world.suite), "selection"), [1.0])
    draws, digests = [], set()
    for seed in range(recipe.seed, recipe.seed + 2):
        other = LiveModel(recipe, "cpu", None, 0, SILENT)
        drawn = load_recipe(world.recipe, overrides=[*DARE, f"seed={seed}"])
        draws.append(other.score_blend(drawn, items, ""))
        digests.add(other.digest(drawn)[0])
    assert len(digests) == 2
    found = live.score_blend(recipe, items, "", seeds=2)
    assert found == {name: np.mean([one[name] for one in draws], axis=0).tolist() for name in draws[0]}
    assert live.score_blend(recipe, items, "") == draws[0]
    api.blend(recipe, tmp_path / "own")
    live.score_blend(recipe, items, "", seeds=2)
    assert live.digest(recipe) == (Checkpoint.open(tmp_path / "own").content_digest(), [])


@pytest.mark.slow
def test_a_sweep_over_draws_says_so_and_is_a_study_of_its_own(world, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    asked = {"ranges": ["lambda=0.4:1"], "trials": 2, "sampler": "grid", "finalists": 1, "keep_upstream": 0.3}
    recipe = load_recipe(world.recipe, overrides=DARE)
    outcome = api.sweep(recipe, tmp_path / "found", seeds=2, **asked)
    assert any("mean of 2 draws" in caution for caution in outcome.cautions())
    digest = outcome.finals[0].digest
    api.blend(api.trial_recipe(tmp_path / "found", outcome.finals[0].candidate.number), tmp_path / "blended")
    assert Checkpoint.open(tmp_path / "blended").content_digest() == digest
    assert json.loads((tmp_path / "found" / "result.json").read_text())["study"] == outcome.study
    with pytest.raises(UsageError, match="another sweep"):
        api.sweep(recipe, tmp_path / "found", resume=True, **asked)
    with pytest.raises(UsageError, match="--seeds: must be 1 or more"):
        api.sweep(recipe, tmp_path / "none", seeds=0, **asked)
