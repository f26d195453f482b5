"""The same items through lm_eval, where it is installed: acc and acc_norm to the last digit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge.errors import UsageError
from ktmerge.eval import score_model
from ktmerge.recipes.suites import Suite


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_acc_and_acc_norm_equal_lm_evals(llama: Any, tokenizer: Any, tmp_path: Path, chat: bool) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    source = random.Random(0)
    words = ["the", "quick", "brown fox", "Paris", "good", "bad", "yes", "no", "dog", "earth", "élan", "世界", "three"]
    rows = [
        {
            "question": " ".join(source.choices(words, k=source.randint(1, 20))),
            "choices": [" ".join(source.choices(words, k=source.randint(1, 4))) for _ in range(4)],
            "answer": source.randrange(4),
        }
        for _ in range(60)
    ]
    path = tmp_path / "mc.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task = {
        "task": "kt_mc", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": metrics,
    }  # fmt: skip
    theirs = simple_evaluate(
        model=HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=8), tasks=[task], bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False), apply_chat_template=chat, log_samples=True,
    )  # fmt: skip
    for metric in ("acc", "acc_norm"):
        suite = Suite(
            upstream=[
                {"name": "mc", "kind": "choice", "data": "mc.jsonl", "prompt": "{{ question }}\nAnswer:", "chat": chat,
                 "choices": "choices", "answer": "{{ answer }}", "metric": metric},
            ],
            folder=tmp_path,
        )  # fmt: skip
        ours = score_model(llama, tokenizer, suite)["mc"]
        assert ours.mean / 100 == pytest.approx(theirs["results"]["kt_mc"][f"{metric},none"], abs=1e-12)
        samples = sorted(theirs["samples"]["kt_mc"], key=lambda sample: sample["doc_id"])
        logprobs = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
        np.testing.assert_allclose(ours.details["logprobs"], logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, lm_eval's task files of two choice tasks, their group and a generation, and a suite."""
    folder = tmp_path_factory.mktemp("harness")
    source = random.Random(1)
    words = ["the", "quick", "brown fox", "Paris", "good", "bad", "yes", "no", "dog", "earth"]
    rows = [
        {"question": " ".join(source.choices(words, k=source.randint(1, 20))), "answer": source.randrange(4),
         "choices": [" ".join(source.choices(words, k=source.randint(1, 4))) for _ in range(4)]}
        for _ in range(30)
    ]  # fmt: skip
    (folder / "mc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = folder / "tasks"
    own.mkdir()
    choice = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "mc.jsonl")}},
        "test_split": "test", "fewshot_split": "test", "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }  # fmt: skip
    says = {
        **choice, "task": "kt_says", "output_type": "generate_until", "doc_to_choice": None,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
    }  # fmt: skip
    group = {
        "group": "kt_group",
        "task": ["kt_a", "kt_b"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    documents = {
        "kt_a": {**choice, "task": "kt_a"},
        "kt_b": {**choice, "task": "kt_b"},
        "kt_says": says,
        "group": group,
    }
    for name, document in documents.items():
        (own / f"{name}.yaml").write_text(json.dumps(document))
    return folder


def door(folder: Path, *tasks: dict[str, Any], **more: Any) -> Suite:
    return Suite(upstream=[{"include_path": "tasks", **task} for task in tasks], folder=folder, **more)


@pytest.mark.slow
def test_its_own_tasks_score_what_lm_eval_says(llama: Any, tokenizer: Any, tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks / "tasks"), include_defaults=False)
    lm = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=4)

    def theirs(name: str, **settings: Any) -> Any:
        return simple_evaluate(model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0, **settings)

    before = random.getstate()
    ours = score_model(llama, tokenizer, door(
        tasks, {"lm_eval": "kt_group", "num_fewshot": 2, "limit": 20},
        {"lm_eval": "kt_says", "metric": "exact_match,whole"},
        {"name": "chat", "lm_eval": "kt_a", "chat": True, "metric": "acc_norm"},
    ))  # fmt: skip
    assert random.getstate() == before
    group = theirs("kt_group", num_fewshot=2, limit=20)
    assert ours["kt_group"].mean / 100 == pytest.approx(group["groups"]["kt_group"]["acc,none"], abs=1e-12)
    assert len(ours["kt_group"].scores) == 40
    samples = [
        one for name in ("kt_a", "kt_b") for one in sorted(group["samples"][name], key=lambda one: one["doc_id"])
    ]
    assert ours["kt_group"].scores.tolist() == [one["acc"] for one in samples]
    logprobs = [[float(answer[0][0]) for answer in one["resps"]] for one in samples]
    np.testing.assert_allclose(ours["kt_group"].details["logprobs"], logprobs, atol=1e-4)
    assert ours["kt_group"].figures["acc_norm"] / 100 == pytest.approx(np.mean([one["acc_norm"] for one in samples]))

    said = [one for one in theirs("kt_says")["samples"]["kt_says"] if one["filter"] == "whole"]
    assert ours["kt_says"].details["outputs"] == [one["resps"][0][0] for one in said]
    assert set(ours["kt_says"].figures) == {"exact_match,word"}
    chat = theirs("kt_a", apply_chat_template=True)
    assert ours["chat"].mean / 100 == pytest.approx(chat["results"]["kt_a"]["acc_norm,none"], abs=1e-12)


@pytest.mark.slow
def test_a_run_with_it_is_kept_compared_and_divided(
    tiny_llama: Path, tuned_llama: Path, tasks: Path, tmp_path: Path
) -> None:
    from ktmerge.eval import evaluate, read_sets
    from ktmerge.eval.results import Results

    suite = door(tasks, {"lm_eval": "kt_a", "num_fewshot": 1}, selection=0.4)
    models = {"base": tiny_llama, "tuned": tuned_llama}
    results = evaluate(models, suite, bootstrap=100, device="cpu", cache=tmp_path / "cache")
    results.save(tmp_path / "scores.json")
    again = Results.load(tmp_path / "scores.json")
    (task,) = again.tasks
    assert (task.kind, task.metric) == ("lm_eval", "acc")
    assert again.versions["lm_eval"]
    assert "kt_a" in again.scores["base"]["kt_a"].signature
    assert again.summary.models["tuned"].F is not None
    assert set(again.mcnemar("base", "tuned")) == {"kt_a"}
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 2
    assert "Answer:" in task.prompts[0]

    parts = {part: read_sets(suite, part)[0] for part in ("selection", "report", "all")}
    rows = {part: set(one.harness.rows["kt_a"]) for part, one in parts.items()}
    assert rows["selection"] | rows["report"] == rows["all"] == set(range(30))
    assert not rows["selection"] & rows["report"]
    assert len({one.digest for one in parts.values()}) == 3
    assert read_sets(suite, "report")[0].digest == task.digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"lm_eval": "kt_a", "metric": "acc_nrm"}, "no metric 'acc_nrm'.*Did you mean 'acc_norm'"),
        ({"lm_eval": "kt_a", "include_path": "nowhere"}, "no such folder"),
        ({"lm_eval": "kt_broken"}, "lm_eval cannot make 'kt_broken'"),
    ],
)
def test_what_is_wrong_is_said(tasks: Path, task: dict[str, Any], message: str) -> None:
    from ktmerge.eval import read_sets

    broken = {
        **json.loads((tasks / "tasks" / "kt_a.yaml").read_text()),
        "task": "kt_broken",
        "doc_to_text": "{{nothing}}",
    }
    (tasks / "tasks" / "broken.yaml").write_text(json.dumps(broken))
    with pytest.raises(UsageError, match=message):
        read_sets(door(tasks, task))


def test_a_task_is_named_by_lm_evals_name() -> None:
    suite = load_suite_from(
        {"upstream": [{"lm_eval": "mmlu", "num_fewshot": 5}], "downstream": [{"lm_eval": "x", "name": "y"}]}
    )
    assert [(one.kind, one.name) for one in suite.tasks()] == [("lm_eval", "mmlu"), ("lm_eval", "y")]
    with pytest.raises(UsageError, match=r"upstream\[0\].nshots.*unknown key|unknown key.*upstream\[0\].nshots"):
        load_suite_from({"upstream": [{"lm_eval": "mmlu", "nshots": 5}]})


def load_suite_from(document: dict[str, Any]) -> Suite:
    from ktmerge.recipes.load import validate

    return validate(Suite, document, "suite.yaml")


def test_without_it_the_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from ktmerge.eval import harness, read_sets

    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"task 'mmlu' is lm_eval's; install it with: pip install 'ktmerge\[lm-eval\]'"
    ):
        read_sets(load_suite_from({"upstream": [{"lm_eval": "mmlu"}]}))


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("task: a\ndoc_to_text: '{{q}}'\n", None),
        ("task: a\nprocess_docs: !function utils.f\n", "names Python code"),
        ("metric_list:\n  - metric: ./evil.py\n", "names Python code"),
        ("include: ../../elsewhere.yaml\n", "includes ../../elsewhere.yaml"),
        ("include: other.yaml\n", None),
    ],
)
def test_task_files_that_run_code_are_refused_unless_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, refused: str | None
) -> None:
    from ktmerge.eval.task_files import TRUST, refuse_code

    (tmp_path / "task.yaml").write_text(text)
    if refused is None:
        refuse_code(tmp_path)
        return
    with pytest.raises(UsageError, match=refused):
        refuse_code(tmp_path)
    monkeypatch.setenv(TRUST, "1")
    refuse_code(tmp_path)
