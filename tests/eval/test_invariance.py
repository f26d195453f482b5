"""Scores are the model's and the items': not the padding side's, not the order's, not that of where the weights lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge import api
from ktmerge.eval import score_model
from ktmerge.eval.loading import load_model
from ktmerge.recipes.suites import Suite


def same(a: Any, b: Any) -> None:
    assert list(a) == list(b)
    for task in a:
        np.testing.assert_array_equal(a[task].scores, b[task].scores)
        for column in ("logprobs", "nll"):
            for one, other in zip(a[task].details.get(column, ()), b[task].details.get(column, ()), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_not_on_the_tokenizers_padding(
    llama: Any, tokenizer: Any, suite: Suite, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    plain = score_model(llama, tokenizer, suite)
    monkeypatch.setattr(tokenizer, "padding_side", side)
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    same(plain, score_model(llama, tokenizer, suite, batch_size=3))


def test_not_on_the_order_of_rows(llama: Any, tokenizer: Any, suite: Suite, tmp_path: Path) -> None:
    plain = score_model(llama, tokenizer, suite)["facts"]
    path = tmp_path / "facts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    turned = score_model(llama, tokenizer, suite)["facts"]
    assert turned.scores.tolist() == plain.scores.tolist()[::-1]
    for one, other in zip(turned.details["logprobs"][::-1], plain.details["logprobs"], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.slow
def test_not_on_where_a_blend_lies(
    tiny_llama: Path, tuned_llama: Path, tokenizer: Any, suite: Suite, tmp_path: Path
) -> None:
    import torch

    recipe = {"ktmerge": 1, "name": "half", "base": str(tiny_llama), "experts": {"tuned": {"model": str(tuned_llama)}},
              "blend": {"method": "linear", "lambda": 0.5}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    api.blend(tmp_path / "recipe.yaml", out=tmp_path / "blended")
    written = load_model(tmp_path / "blended", torch.device("cpu"), torch.float32)
    live = load_model(tiny_llama, torch.device("cpu"), torch.bfloat16)  # as the file is written
    api.blend_into(live, tmp_path / "recipe.yaml")
    same(score_model(written, tokenizer, suite), score_model(live.float(), tokenizer, suite))
