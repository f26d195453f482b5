"""What a recipe's whole way makes of its sections before and between the long steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ktmerge import api, pipeline
from ktmerge.errors import UsageError
from ktmerge.measurement import measurements_of
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Recipe
from ktmerge.staging import jobs_of

JOB = {"data": "train.jsonl", "max_steps": 2}
TASK = {"name": "prose", "kind": "text", "data": "prose.jsonl"}


@pytest.fixture
def workshop(tmp_path: Path, toy_pair: tuple[Path, Path]) -> Path:
    """A folder with a base, an adapter that nobody opens, and data."""
    (tmp_path / "base").symlink_to(toy_pair[0])
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "prose.jsonl").write_text('{"text": "In the beginning."}\n')
    return tmp_path


def recipe(folder: Path, **sections: Any) -> Recipe:
    return parse_recipe({"ktmerge": 1, "base": "base", **sections}, "r.yaml", folder)


def test_an_expert_over_another_model_is_both_folders(workshop: Path) -> None:
    found = pipeline.make_experts(recipe(workshop, experts={"a": {"model": "base+lora"}, "b": {"model": "lora"}}))
    assert found == {"a": (workshop / "base", workshop / "lora"), "b": workshop / "lora"}
    result = pipeline.RunResult(found, None, None, None)
    assert result.pairs()["expert a"] == f"{workshop}/base+{workshop}/lora"
    assert json.loads(json.dumps(result.to_json()))["experts"]["b"] == f"{workshop}/lora"


@pytest.mark.parametrize(("own", "expected"), [({}, "pictures"), ({"images": "others"}, "others")])
def test_an_expert_is_measured_on_the_images_it_was_tuned_on(
    workshop: Path, own: dict[str, str], expected: str
) -> None:
    whole = recipe(
        workshop,
        experts={"a": {"model": "lora", "statistics": {"samples": 4, **own}}},
        finetune={"experts": {"a": {**JOB, "image_root": "pictures"}}},
    )
    alone = whole.without_tuning()
    document = alone.model_dump(mode="json", by_alias=True, exclude={"finetune"})
    assert parse_recipe(document, "ktmerge.json", workshop) == alone  # a record says what its experts were measured on
    (one,) = measurements_of(whole)
    assert (one.job.data, one.job.images) == (["train.jsonl"], expected)
    assert (one.model, one.adapter) == (workshop / "base", workshop / "lora")


def test_two_experts_cannot_go_into_one_folder(workshop: Path) -> None:
    whole = recipe(
        workshop,
        experts={name: {"model": "runs/same"} for name in "ab"},
        finetune={"experts": dict.fromkeys("ab", JOB)},
    )
    with pytest.raises(UsageError, match="experts a and b go there"):
        jobs_of(whole)


def test_a_shared_stage_needs_several_in_python_too(workshop: Path) -> None:
    with pytest.raises(UsageError, match="needs several experts"):
        api.finetune(workshop / "base", "train.jsonl", workshop / "out", curriculum="shared", max_steps=4)


def test_losses_of_a_shared_stage_are_told_too(workshop: Path) -> None:
    shared = {**JOB, "curriculum": "shared", "max_steps": 4}
    whole = recipe(
        workshop,
        experts={name: {"model": f"runs/{name}"} for name in "ab"},
        finetune={"experts": {"a": shared, "b": shared}},
    )
    for name in ("shared", "b"):
        (workshop / "runs" / name).mkdir(parents=True)
        (workshop / "runs" / name / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    logs = pipeline.training_logs(whole, {"a": workshop / "runs/a", "b": workshop / "runs/b"})
    assert list(logs) == ["shared", "b"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"blend": {"method": "tiess"}}, "Did you mean 'ties'"),
        ({"blend": {"method": "regmean"}}, "statistics"),
        ({"eval": {"upstream": [{**TASK, "data": "nowhere.jsonl"}]}}, "nowhere.jsonl: no such file"),
        ({"eval": {"upstream": [{**TASK, "text": "{{ txet }}"}]}}, "txet"),
        ({"eval": {"suite": "nowhere.yaml"}}, "nowhere.yaml"),
    ],
)
def test_what_would_stop_it_later_is_found_before_anything_is_made(
    workshop: Path, changed: dict[str, Any], expected: str
) -> None:
    whole = recipe(
        workshop,
        **{"experts": {"a": {"model": "runs/a"}}, "finetune": {"experts": {"a": JOB}}, "eval": {"upstream": [TASK]}}
        | changed,
    )
    with pytest.raises(UsageError, match=expected):
        api.run(whole, workshop / "out")
    assert not (workshop / "runs").exists()
    assert not (workshop / "out").exists()
