from __future__ import annotations

import math

import pytest
from pydantic import BaseModel

from ktmerge.eval import metrics


def test_acc_takes_the_argmax_and_the_first_wins_a_tie() -> None:
    assert metrics.likeliest([-3.0, -1.0, -2.0], ["a", "b", "c"]) == 1
    assert metrics.likeliest([-2.0, -1.0, -1.0], ["a", "b", "c"]) == 1


def test_acc_norm_divides_by_characters() -> None:
    # -4 / 8 > -3 / 2, so the longer one wins; by acc the shorter.
    assert metrics.likeliest_by_length([-3.0, -4.0], ["ab", "abcdefgh"]) == 1
    assert metrics.likeliest([-3.0, -4.0], ["ab", "abcdefgh"]) == 0
    # 4 characters are 8 bytes here: -5 / 4 < -6 / 5 in characters, -5 / 8 > -6 / 5 in bytes.
    assert metrics.likeliest_by_length([-5.0, -6.0], ["éééé", "abcde"]) == 1


def test_every_metric_and_normalisation_of_the_schema_is_known() -> None:
    from typing import get_args

    from ktmerge.eval.answers import ANSWER
    from ktmerge.eval.normalisation import NORMALISATIONS
    from ktmerge.eval.overlap import OVERLAP
    from ktmerge.recipes.suites import ChoiceTask, GenerateTask

    def values(model: type[BaseModel], key: str) -> set[str]:
        return set(get_args(model.model_fields[key].annotation))

    assert values(ChoiceTask, "metric") == set(metrics.CHOICE)
    assert values(GenerateTask, "metric") == {*ANSWER, *OVERLAP}
    assert values(GenerateTask, "normalise") == set(NORMALISATIONS)


def test_macro_f1_and_balanced_accuracy_weigh_classes_alike() -> None:
    predicted, wanted = [0, 0, 0, 1, 2], [0, 0, 1, 1, 0]
    # class 0: 2 right of 3 said, 3 wanted; class 1: 1 of 1, 2; class 2: 0 of 1, 0; class 3 never occurs
    assert metrics.macro_f1(predicted, wanted, 4) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert metrics.balanced_accuracy(predicted, wanted, 4) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_perplexity_and_bits_per_byte() -> None:
    # A uniform guess among 256 bytes: 8 bits a byte, perplexity 256.
    nll = 10 * math.log(256)
    assert metrics.perplexity_per_byte(nll, 10) == pytest.approx(256)
    assert metrics.bits_per_byte(nll, 10) == pytest.approx(8)
    assert metrics.perplexity_per_token(nll, 5) == pytest.approx(256**2)
    assert metrics.perplexity_per_word(nll, 2) == pytest.approx(256**5)
    assert metrics.next_token_accuracy(3, 12) == 0.25
