"""The same items through lm_eval, where it is installed: acc and acc_norm to the last digit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
