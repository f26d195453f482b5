"""KL between models against float64 numpy, and the disagreement of neighbours by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.eval.loading import load_model
from ktmerge.eval.unlabelled import disagreement, divergence, least_disagreeing, trade_off

TEXTS = [[5, 9, 12, 30, 7], [8, 3], [11, 4, 6, 9, 30, 2, 17], [5, 9, 12]]


@pytest.fixture(scope="module")
def tuned(tuned_llama: Path) -> Any:
    return load_model(tuned_llama, torch.device("cpu"), torch.float32)


def test_divergence_is_the_kl_of_every_scored_position(llama: Any, tuned: Any) -> None:
    def softmax(model: Any, text: list[int]) -> Any:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([text])).logits[0].double().numpy()
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    expected = []
    for text, start in zip(TEXTS, (1, 1, 4, 2), strict=True):
        p, q = softmax(llama, text)[start - 1 : -1], softmax(tuned, text)[start - 1 : -1]
        expected.append(np.mean([sum(a * np.log(a / b)) for a, b in zip(p, q, strict=True)]))
    found = divergence(llama, tuned, TEXTS, starts=(1, 1, 4, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.min() > 0


def test_divergence_knows_no_batches_and_itself(llama: Any, tuned: Any) -> None:
    one, many = (divergence(llama, tuned, TEXTS, batch_size=size) for size in (1, 4))
    np.testing.assert_allclose(one, many, rtol=1e-4)
    np.testing.assert_allclose(divergence(llama, llama, TEXTS), 0, atol=1e-12)
    assert not np.allclose(divergence(tuned, llama, TEXTS), many), "it has a direction"


def test_what_cannot_be_compared_is_refused(llama: Any) -> None:
    with pytest.raises(UsageError, match="text 1: 1 tokens"):
        divergence(llama, llama, [[3, 4], [3]])
    with pytest.raises(UsageError, match="text 0: 2 tokens, of which none from 2 on"):
        divergence(llama, llama, [[3, 4]], starts=[2])

    class Broken(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, size: int, value: float) -> None:
            super().__init__()
            self.size, self.value = size, value

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": torch.full((*input_ids.shape, self.size), self.value)})

    with pytest.raises(UsageError, match="vocabularies of 4 and 5"):
        divergence(Broken(4, 0.0), Broken(5, 0.0), [[1, 2]])
    with pytest.raises(KtmergeError, match="not finite"):
        divergence(Broken(4, 0.0), Broken(4, float("nan")), [[1, 2]])


def test_trade_off_weighs_both() -> None:
    assert trade_off(1.0, 3.0) == 2.0
    assert trade_off(1.0, 3.0, weight=0) == 1.0
    assert trade_off(1.0, 3.0, weight=1) == 3.0


def test_neighbours_disagree() -> None:
    answers = {
        0.0: ["a", "b", "c", "d"],
        1.0: ["x", "y", "z", "w"],
        0.5: ["a", "b", "c", "x"],
        0.75: [" a", "b", "c", "y"],
    }
    found = disagreement(answers)
    assert found == {0.0: 0.25, 0.5: 0.25, 0.75: (0.25 + 1) / 2, 1.0: 1.0}
    assert least_disagreeing(answers) == 0.0
    assert disagreement(answers, "none")[0.75] == (0.5 + 1) / 2
    for wrong in ({0.0: ["a"]}, {0.0: ["a"], 1.0: []}, {0.0: [], 1.0: []}):
        with pytest.raises(UsageError):
            disagreement(wrong)
