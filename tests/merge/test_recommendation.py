"""Which recipes are recommended for which models, and that every recommended command is one that works."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from merge_models import llama_tensors, tuned, write

from ktmerge import api, cli
from ktmerge.errors import UsageError
from ktmerge.merge import recommendation
from ktmerge.merge.diagnostics.rank import rank_share
from ktmerge.merge.diagnostics.signs import Signs
from ktmerge.merge.settings import blend_setting
from ktmerge.recipes import load_recipe

ONE = Signs(
    experts=1, statistics=False, relative=0.02, changed=1.0, small=0.0, rank=0.6, cosine=None, conflict=None,
    effective=1.0,
)  # fmt: skip
TWO = replace(ONE, experts=2, cosine=0.02, conflict=0.49, effective=2.0)


def names(signs: Signs) -> list[str]:
    return [one.recipe for one in recommendation.choose(signs)]


def test_every_recipe_and_key_that_can_be_recommended_exists() -> None:
    cases = [
        replace(signs, statistics=data, rank=rank, cosine=cosine, conflict=conflict, changed=changed)
        for signs, data, rank, cosine, conflict, changed in product(
            (ONE, TWO), (False, True), (0.05, 0.6), (0.0, 0.3, 0.95), (0.2, 0.5), (0.1, 1.0)
        )
    ]
    advice = {one for case in cases for one in map(_key, recommendation.choose(case))}
    assert len(advice) >= 12
    for recipe, key, value in advice:
        blend = load_recipe(recipe, overrides=[f"{key}={value:g}"]).blend
        assert blend is not None
        blend_setting(blend)


def _key(one: recommendation.Advice) -> tuple[str, str, float]:
    return one.recipe, one.sweep[0], one.sweep[1][0]


def test_number_of_experts_and_data_decide_first() -> None:
    assert "regmean-back" not in names(ONE)
    assert names(replace(ONE, statistics=True))[0] == "regmean-back"
    assert names(TWO)[0] == "swudi-a"
    assert names(replace(TWO, statistics=True))[:2] == ["regmean-back", "regmean"]


def test_an_adapter_has_no_noise_to_clean() -> None:
    assert "dg-hard" in names(ONE)
    assert "dg-hard" not in names(replace(ONE, rank=0.02))


def test_experts_of_one_task_are_averaged_and_not_added() -> None:
    found = names(replace(TWO, cosine=0.95))
    assert found[0] == "linear"
    assert "task-arithmetic" not in found


def test_what_experts_share_and_how_they_clash_decides_the_rest() -> None:
    assert names(TWO)[1:] == ["tsv-m", "task-arithmetic"]
    assert names(replace(TWO, cosine=0.4, conflict=0.3))[1:] == ["cts", "ties"]


def test_rank_tells_an_adapter_from_full_tuning(tmp_path: Path) -> None:
    base = llama_tensors(torch.float32, width=64)
    generator = torch.Generator().manual_seed(0)
    low = {
        name: values + torch.outer(*(torch.randn(size, generator=generator) for size in values.shape))
        if values.ndim == 2 else values
        for name, values in base.items()
    }  # fmt: skip
    for name, tensors in {"base": base, "low": low, "full": tuned(base, 0.01, 1)}.items():
        write(tmp_path / name, tensors)
    assert rank_share(tmp_path / "base", {"low": tmp_path / "low"}) == pytest.approx(1 / 64, abs=0.02)
    assert (rank_share(tmp_path / "base", {"full": tmp_path / "full"}) or 0) > 0.5
    assert rank_share(tmp_path / "base", {"base": tmp_path / "base"}) is None


def test_the_command_prints_signs_recipes_and_commands_that_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = llama_tensors()
    for name, tensors in {"base": base, "a": tuned(base, 0.002, 1), "b": tuned(base, 0.002, 2)}.items():
        write(tmp_path / name, tensors)
    assert cli._exit_code(["recommend", "base", "a", "second=b"]) == 0
    printed = capsys.readouterr().out
    assert "opposite signs" in printed
    commands = [line for line in printed.splitlines() if line.startswith("ktmerge blend")]
    assert len(commands) == 3
    for command in commands:
        assert cli._exit_code([*shlex.split(command)[1:], "--dry-run"]) == 0
        capsys.readouterr()
    assert "statistics" not in printed
    assert cli._exit_code(["recommend", "base", "a", "--statistics", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["recipe"] for one in document["recipes"]] == ["regmean-back", "fisher-back", "wise-ft"]
    assert len(document["prepare"]) == 2
    assert all(command.endswith("--fisher empirical") for command in document["prepare"])
    assert "experts.a.statistics=stats/a" in document["recipes"][0]["command"]
    assert "statistics" not in document["recipes"][2]["command"]


def test_small_steps_are_rounded_stochastically_and_far_models_shrunk() -> None:
    fitted = recommendation._fit(recommendation.LINE, replace(ONE, small=0.9, relative=0.3))
    assert fitted.settings == {"output.rounding": "stochastic"}
    assert fitted.sweep[1] == [value / 2 for value in recommendation.LINE.sweep[1]]
    assert recommendation._fit(recommendation.LINE, ONE) == recommendation.LINE


def test_a_model_that_equals_the_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "base", llama_tensors())
    write(tmp_path / "same", llama_tensors())
    with pytest.raises(UsageError, match="same: none of its matrices differs"):
        api.recommend(tmp_path / "base", [tmp_path / "same"])


def test_odd_matrices_say_nothing_of_the_rank(tmp_path: Path) -> None:
    base = {**llama_tensors(torch.float32), "model.layers.0.none.weight": torch.zeros(0, 4)}
    sound = tuned(base, 3e-3, seed=1)
    write(tmp_path / "base", base)
    write(tmp_path / "a", sound)
    write(tmp_path / "b", {name: values / (values.ndim == 1) for name, values in sound.items()})
    assert rank_share(tmp_path / "base", {"a": tmp_path / "a"}) is not None
    assert rank_share(tmp_path / "base", {"b": tmp_path / "b"}) is None


def test_an_expert_with_a_dot_in_its_name_is_named_as_keys_are() -> None:
    words = shlex.split(recommendation._command(recommendation.BACK, "base", {"qwen2.5": "q"}, True))
    assert 'experts."qwen2.5".statistics=stats/qwen2.5' in words
