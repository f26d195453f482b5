"""What an item scores, in [0, 1], from what a model said of it. Pure functions; nothing here knows models or files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, inf, log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def likeliest(logprobs: ArrayLike, choices: Sequence[str]) -> int:
    """The choice with the highest sum of log p(choice given prompt); the first wins a tie."""
    return int(np.argmax(logprobs))


def likeliest_by_length(logprobs: ArrayLike, choices: Sequence[str]) -> int:
    """The same with each sum divided by the choice's length in characters, as lm_eval 0.4.13 defines ``acc_norm``.

    (Its documentation says bytes; they differ outside ASCII.) The separator before a choice does not count.
    """
    lengths = np.array([len(choice) for choice in choices], dtype=float)
    return int(np.argmax(np.asarray(logprobs) / lengths))


CHOICE: dict[str, Callable[[ArrayLike, Sequence[str]], int]] = {"acc": likeliest, "acc_norm": likeliest_by_length}
"""Which choice a metric takes for the model's; the item scores 1 if it is the right one."""


def macro_f1(predicted: Sequence[int], wanted: Sequence[int], classes: int) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    said, right = np.asarray(predicted), np.asarray(wanted)
    found = []
    for label in range(classes):
        hits = int(((said == label) & (right == label)).sum())
        asked = int((said == label).sum()) + int((right == label).sum())
        if asked:
            found.append(2 * hits / asked)
    return float(np.mean(found))


def balanced_accuracy(predicted: Sequence[int], wanted: Sequence[int], classes: int) -> float:
    """Mean over the classes that occur among the right answers of the share of them that was recognised."""
    said, right = np.asarray(predicted), np.asarray(wanted)
    recalls = [float((said[right == label] == label).mean()) for label in range(classes) if (right == label).any()]
    return float(np.mean(recalls))


def next_token_accuracy(correct: int, tokens: int) -> float:
    """Share of a chunk's scored tokens that were the likeliest next token."""
    return correct / tokens


def _exp(number: float) -> float:
    try:
        return exp(number)
    except OverflowError:  # of a model whose logits are of no use any more
        return inf


def perplexity_per_byte(nll: float, size: int) -> float:
    """exp(NLL / bytes), ``nll`` in nats. Comparable between tokenizers, as perplexity per token is not."""
    return _exp(nll / size)


def bits_per_byte(nll: float, size: int) -> float:
    """NLL / (bytes ln 2), ``nll`` in nats."""
    return nll / (size * log(2))


def perplexity_per_token(nll: float, tokens: int) -> float:
    """exp(NLL / scored tokens), ``nll`` in nats. Compares only models with one tokenizer."""
    return _exp(nll / tokens)


def perplexity_per_word(nll: float, words: int) -> float:
    """exp(NLL / words), ``nll`` in nats; words are what stands between white space."""
    return _exp(nll / words)
