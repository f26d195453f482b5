from __future__ import annotations

import math

import pytest
from pydantic import BaseModel

from ktmerge.eval import metrics


def test_acc_is_the_argmax_and_the_first_wins_a_tie() -> None:
    assert metrics.acc([-3.0, -1.0, -2.0], ["a", "b", "c"], 1) == 1.0
    assert metrics.acc([-3.0, -1.0, -2.0], ["a", "b", "c"], 0) == 0.0
    assert metrics.acc([-1.0, -1.0], ["a", "b"], 0) == 1.0
    assert metrics.acc([-1.0, -1.0], ["a", "b"], 1) == 0.0


def test_acc_norm_divides_by_characters() -> None:
    # -4 / 8 > -3 / 2, so the longer one wins; by acc the shorter.
    assert metrics.acc_norm([-3.0, -4.0], ["ab", "abcdefgh"], 1) == 1.0
    assert metrics.acc([-3.0, -4.0], ["ab", "abcdefgh"], 0) == 1.0
    # 4 characters are 8 bytes here: -5 / 4 < -6 / 5 in characters, -5 / 8 > -6 / 5 in bytes.
    assert metrics.acc_norm([-5.0, -6.0], ["éééé", "abcde"], 1) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference", "normalise", "score"),
    [
        (" yes\n", "yes", "strip", 1.0),
        (" yes", "yes", "none", 0.0),
        ("yes", "yes", "none", 1.0),
        ("Yes", "yes", "strip", 0.0),
        (" YES ", "yes", "lower", 1.0),
        ("yes.", "yes", "lower", 0.0),
        ("", " ", "strip", 1.0),
    ],
)
def test_exact_match(prediction: str, reference: str, normalise: str, score: float) -> None:
    assert metrics.exact_match(prediction, reference, normalise) == score


def test_every_metric_and_normalisation_of_the_schema_is_known() -> None:
    from typing import get_args

    from ktmerge.recipes.suites import ChoiceTask, GenerateTask

    def values(model: type[BaseModel], key: str) -> set[str]:
        return set(get_args(model.model_fields[key].annotation))

    assert values(ChoiceTask, "metric") == set(metrics.CHOICE)
    assert values(GenerateTask, "metric") == set(metrics.GENERATE)
    assert values(GenerateTask, "normalise") == set(metrics.NORMALISATIONS)


def test_perplexity_and_bits_per_byte() -> None:
    # A uniform guess among 256 bytes: 8 bits a byte, perplexity 256.
    nll = 10 * math.log(256)
    assert metrics.perplexity_per_byte(nll, 10) == pytest.approx(256)
    assert metrics.bits_per_byte(nll, 10) == pytest.approx(8)
    assert metrics.next_token_accuracy(3, 12) == 0.25
