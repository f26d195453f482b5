"""Orders of samples: what comes first, that it is the same whenever it is asked for, and stages that experts share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tuning import CHATS, JOB, ROWS, sha256, tune, write

from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.schema import Recipe
from ktmerge.staging import SHARED, jobs_of
from ktmerge.tuners.curriculum import apart, difficulties, ordered, tasks_of


def test_the_hard_ones_are_those_the_base_says_so(tiny_llama: Path) -> None:
    """Held against the model's own loss on one sample at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    from ktmerge.progress import SILENT
    from ktmerge.tuners.data import PlainSample
    from ktmerge.tuners.encode import Encoder
    from ktmerge.tuners.trainer import build_collator

    encoder = Encoder.load(tiny_llama)
    samples = [encoder.encode(PlainSample(row["prompt"], row["completion"], "")) for row in ROWS[:7]]
    collate: Any = build_collator(encoder.tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    found = difficulties(model, samples, collate, 3, SILENT)
    with torch.no_grad():
        alone = [float(model(**collate([sample])).loss) for sample in samples]
    assert found.tolist() == pytest.approx(alone, rel=1e-5)


def test_what_tasks_share_is_near_and_the_rest_far() -> None:
    """Two tasks vary along one common axis and each along its own; samples on the common one come first."""
    import torch

    rows, tasks = [], []
    for task in (0, 1):
        for sign in (-1.0, 1.0):
            rows += [[3 * sign, 0, 0, 5.0 * task], [0, *((sign, 0) if task == 0 else (0, sign)), 5.0 * task]]
            tasks += [task, task]
    found = apart(torch.tensor(rows, dtype=torch.float64), torch.tensor(tasks))
    assert found[0::2].max() < 1e-9
    assert found[1::2].min() > 1 - 1e-9


def test_tasks_are_told_by_their_files() -> None:
    assert tasks_of([3, 0, 2], [0, 2, 3, 4]) == [0, 0, 2, 2]


def test_an_order_is_found_once_and_kept(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "order.json"
    found = ordered(lambda: torch.tensor([0.5, 0.1, 0.5, 0.1 + 1e-9], dtype=torch.float64), path)
    assert list(found) == [1, 3, 0, 2]

    def never() -> Any:
        raise AssertionError

    assert list(ordered(never, path)) == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"curriculum": "common"}, "each data file for a task, so it needs several"),
        ({"curriculum": "easy", "replay": ["y"]}, "takes no replay"),
        ({"curriculum": "easy", "group_by_length": True}, "takes no group_by_length"),
        ({"curriculum": "shared", "max_steps": None}, "needs max_steps"),
        ({"shared_on": "common"}, "shared_on needs curriculum: shared"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FinetuneJob.model_validate({"data": ["x"], "max_steps": 4, **settings})


def recipe(tmp_path: Path, **changes: dict[str, Any]) -> Recipe:
    own = {"a": {"data": "a.jsonl"}, "b": {"data": "b.jsonl"}, "c": {"data": "c.jsonl", "curriculum": "none"}}
    common = {"max_steps": 10, "curriculum": "shared", "shared_steps": 0.3}
    jobs = {name: {**common, **job, **changes.get(name, {})} for name, job in own.items()}
    jobs["c"].pop("shared_steps", None)
    document = {
        "ktmerge": 1, "name": "r", "base": "base", "experts": {name: {"model": f"runs/{name}"} for name in jobs},
        "finetune": {"experts": jobs}, "blend": {"method": "linear"},
    }  # fmt: skip
    (tmp_path / "base").mkdir(exist_ok=True)
    return Recipe.model_validate(document).model_copy(update={"folder": tmp_path})


def test_experts_share_a_stage_and_have_as_many_steps(tmp_path: Path) -> None:
    jobs = jobs_of(recipe(tmp_path))
    assert [job.name for job in jobs] == [SHARED, "a", "b", "c"]
    shared, first, second, alone = jobs
    assert shared.job.data == ["a.jsonl", "b.jsonl"]
    assert shared.base == first.shape == alone.base == tmp_path / "base"
    assert first.base == second.base == shared.out == tmp_path / "runs/shared"
    assert [job.job.max_steps for job in jobs] == [3, 7, 7, 10]
    assert {job.job.curriculum for job in jobs} == {"none"}
    assert "3 of 10 steps on the data of a, b, then 7" in shared.note
    assert [job.name for job in jobs_of(recipe(tmp_path), ["b"])] == [SHARED, "b"]
    assert [job.name for job in jobs_of(recipe(tmp_path), ["c"])] == ["c"]
    (common, *_) = jobs_of(recipe(tmp_path, a={"shared_on": "common"}, b={"shared_on": "common"}))
    assert common.job.curriculum == "common"
    for job in jobs:
        FinetuneJob.model_validate(job.job.model_dump())


def test_experts_that_differ_cannot_share_a_stage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a and b share a stage, so they need the same learning_rate"):
        jobs_of(recipe(tmp_path, b={"learning_rate": 1e-3}))
    alone = {"b": {"curriculum": "none", "shared_steps": 0.5}}
    with pytest.raises(UsageError, match="a: curriculum shared needs several experts"):
        jobs_of(recipe(tmp_path, **alone))


@pytest.mark.slow
def test_samples_come_in_order_and_a_stopped_run_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    from stopping import StopsAt

    settings = {"data": ["train.jsonl", "chats.jsonl"], "curriculum": "common", "max_steps": 12}
    tune(tiny_llama, tmp_path, "whole", **settings)
    told = json.loads((tmp_path / "whole/ktmerge-curriculum.json").read_text())
    assert sorted(told["order"]) == list(range(len(ROWS) + len(CHATS)))
    ranked = [told["scores"][place] for place in told["order"]]
    assert ranked == sorted(ranked)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **settings, progress=StopsAt(5))
    tune(tiny_llama, tmp_path, **settings, resume=True)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")
    shuffled = tune(tiny_llama, tmp_path, "shuffled", **{**settings, "curriculum": "none"})
    assert shuffled.record["run"]["steps"] == 12
    assert sha256(tmp_path / "shuffled") != sha256(tmp_path / "whole")


@pytest.mark.slow
def test_a_recipe_goes_through_both_stages(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", CHATS)
    job = {key: value for key, value in JOB.items() if key != "data"} | {"max_steps": 4, "curriculum": "shared"}
    document = {
        "ktmerge": 1, "name": "r", "base": str(tiny_llama),
        "experts": {"a": {"model": "runs/a"}, "b": {"model": "runs/b"}},
        "finetune": {"experts": {"a": {**job, "data": "a.jsonl"}, "b": {**job, "data": "b.jsonl"}}},
        "blend": {"method": "task_arithmetic"},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(document))
    command = [sys.executable, "-m", "ktmerge", "finetune", "--recipe", "r.yaml", "--resume"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 4 steps on the data of a, b" in done.stderr
    digests = {name: sha256(tmp_path / "runs" / name) for name in ("shared", "a", "b")}
    assert len(set(digests.values())) == 3
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.stderr.count("is already what the job asks for") == 3


@pytest.mark.slow
def test_the_base_is_asked_before_a_prompt_stands_before_it(tiny_llama: Path, tmp_path: Path) -> None:
    for adapter in ("prompt", "lora"):
        tune(tiny_llama, tmp_path, adapter, adapter=adapter, curriculum="easy", max_steps=2, show_samples=0)
    told = [(tmp_path / adapter / "ktmerge-curriculum.json").read_text() for adapter in ("prompt", "lora")]
    assert told[0] == told[1]
    assert (tmp_path / "prompt/ktmerge-losses.png").exists()
