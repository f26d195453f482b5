"""Scores that need no labels, for cheap choices among many blends: how far a model has moved from two others.

KL to the base on upstream prompts says what may be forgotten, KL to the expert on downstream ones what is not learned
yet; both are single forward passes. Neighbour disagreement needs no second model, only the generations of a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktmerge.errors import UsageError
from ktmerge.eval.batching import by_length, padded
from ktmerge.eval.finite import NotFiniteError
from ktmerge.eval.normalisation import NORMALISATIONS
from ktmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from ktmerge.eval.sight import Sight, View

MOST_TOKENS = 2048
"""Of a batch: both models' logits are held whole."""


def divergence(
    teacher: Any,
    student: Any,
    texts: Sequence[Sequence[int]],
    *,
    starts: Sequence[int] | None = None,
    views: Sequence[View | None] = (),
    sight: Sight | None = None,
    batch_size: int = 8,
    progress: Progress = SILENT,
    label: str = "KL",
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """KL(teacher || student) of the next-token distributions, in nats, a mean over each text's positions [texts].

    Args:
        teacher: a causal transformers model: the base (upstream prompts) or an expert (its own prompts and answers).
        student: the model to judge, of the same vocabulary.
        texts: token ids, each at least two; the last token of a text is only predicted.
        starts: of each text, the first token whose prediction counts; by default the second.
        views: of each text, the images in it, or None.
        sight: prepares the images, for both models alike.
        batch_size: texts in a forward pass; results do not depend on it.
        progress: where to report to.
        label: names the work there.

    Raises:
        UsageError: a text has nothing to predict, or the vocabularies differ in size.
        NotFiniteError: a model gives logits that are not finite; with the number of a text.
    """
    first = list(starts) if starts is not None else [1] * len(texts)
    for i, (text, start) in enumerate(zip(texts, first, strict=True)):
        if not 1 <= start < len(text):
            raise UsageError(f"text {i}: {len(text)} tokens, of which none from {start} on can be predicted.")
    found = np.zeros(len(texts))
    seen = list(views) or [None] * len(texts)
    with progress.task(label, len(texts), "items") as step, torch.inference_mode():
        for chosen in by_length(texts, seen, batch_size, MOST_TOKENS):
            own = [texts[i] for i in chosen]
            inputs = _inputs(own, [view for i in chosen if (view := seen[i]) is not None], sight, student)
            found[chosen] = _batch(teacher, student, inputs, own, [first[i] for i in chosen])
            step.advance(len(chosen))
    if not np.isfinite(found).all():
        raise NotFiniteError(int(np.flatnonzero(~np.isfinite(found))[0]))
    return found


def _inputs(
    texts: Sequence[Sequence[int]], views: Sequence[View], sight: Sight | None, model: Any
) -> dict[str, torch.Tensor]:
    """What both models read of a batch: all tokens but the last of each text, padded on the right."""
    read = [text[:-1] for text in texts]
    if views and sight is not None:
        return sight.inputs(views, read, "right", model.dtype)
    return padded(read, "right")


def _batch(
    teacher: Any,
    student: Any,
    inputs: Mapping[str, torch.Tensor],
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
) -> list[float]:
    logits = [
        model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False).logits
        for model in (teacher, student)
    ]
    if logits[0].shape != logits[1].shape:
        raise UsageError(
            f"vocabularies of {logits[0].shape[-1]} and {logits[1].shape[-1]} tokens cannot be compared; "
            "both models need the same."
        )
    means = []
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        p, q = (torch.log_softmax(one[row, start - 1 : len(text) - 1].float().cpu(), dim=-1) for one in logits)
        means.append(float((p.double().exp() * (p.double() - q.double())).sum(dim=-1).mean()))
    return means


def trade_off(to_base: float, to_expert: float, weight: float = 0.5) -> float:
    """J = a KL(expert || model) + (1 - a) KL(base || model) in nats, lower is better; ``weight`` is a, in [0, 1]."""
    return weight * to_expert + (1 - weight) * to_base


def disagreement(answers: Mapping[float, Sequence[str]], normalise: str = "strip") -> dict[float, float]:
    """How much each coefficient's answers differ from its neighbours', in [0, 1] (AdaMMS, arXiv 2503.23733).

    A coefficient's value is the share of prompts answered differently, a mean over its one or two neighbours. Ends have
    one neighbour; the paper's search sums over consecutive coefficients, which ranks inner ones the same.

    Args:
        answers: per coefficient, what the blend answers to the same prompts.
        normalise: applied before answers are compared.

    Raises:
        UsageError: fewer than two coefficients, or they did not answer the same number of prompts, or none.
    """
    steps = sorted(answers)
    counts = {len(answers[step]) for step in steps}
    if len(steps) < 2:
        raise UsageError("neighbours need at least two coefficients.")
    if len(counts) > 1 or counts == {0}:
        raise UsageError("every coefficient must answer the same prompts, at least one.")
    normal = NORMALISATIONS[normalise]
    shares = disagreeing([[normal(text) for text in answers[step]] for step in steps])
    return dict(zip(steps, shares.mean(axis=1).tolist(), strict=True))


def disagreeing(answers: Sequence[Sequence[str]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each item, the share of one's one or two neighbours that answer otherwise [answerers, items]."""
    said = np.array([list(own) for own in answers], dtype=object)
    gaps = (said[1:] != said[:-1]).astype(float)
    return np.stack([gaps[max(0, i - 1) : i + 1].mean(axis=0) for i in range(len(answers))])


def least_disagreeing(answers: Mapping[float, Sequence[str]], normalise: str = "strip") -> float:
    """The coefficient whose answers differ least from its neighbours'; the smallest of equal ones."""
    found = disagreement(answers, normalise)
    return min(found, key=lambda step: (found[step], step))
