"""What an item scores, in [0, 1], from what a model said of it. Pure functions; nothing here knows models or files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def acc(logprobs: ArrayLike, choices: Sequence[str], answer: int) -> float:
    """1 if the right choice has the highest sum of log p(choice given prompt); the first wins a tie."""
    return float(int(np.argmax(logprobs)) == answer)


def acc_norm(logprobs: ArrayLike, choices: Sequence[str], answer: int) -> float:
    """The same with each sum divided by the choice's length in characters, as lm_eval 0.4.13 defines ``acc_norm``.

    (Its documentation says bytes; they differ outside ASCII.) The separator before a choice does not count.
    """
    lengths = np.array([len(choice) for choice in choices], dtype=float)
    return float(int(np.argmax(np.asarray(logprobs) / lengths)) == answer)


NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "strip": str.strip,
    "lower": lambda text: text.strip().lower(),
}


def exact_match(prediction: str, reference: str, normalise: str) -> float:
    """1 if both are equal after the normalisation: ``none``, ``strip`` (outer white space), ``lower`` (and case)."""
    normal = NORMALISATIONS[normalise]
    return float(normal(prediction) == normal(reference))


ChoiceMetric = Callable[["ArrayLike", Sequence[str], int], float]
AnswerMetric = Callable[[str, str, str], float]
CHOICE: dict[str, ChoiceMetric] = {"acc": acc, "acc_norm": acc_norm}
GENERATE: dict[str, AnswerMetric] = {"exact_match": exact_match}


def next_token_accuracy(correct: int, tokens: int) -> float:
    """Share of a chunk's scored tokens that were the likeliest next token."""
    return correct / tokens


def perplexity_per_byte(nll: float, size: int) -> float:
    """exp(NLL / bytes), ``nll`` in nats. Comparable between tokenizers, as perplexity per token is not."""
    return exp(nll / size)


def bits_per_byte(nll: float, size: int) -> float:
    """NLL / (bytes ln 2), ``nll`` in nats."""
    return nll / (size * log(2))
