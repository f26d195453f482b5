"""The items on which models part, the worst regressions first: what each was asked, what each answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ktmerge.eval.letters import LETTERS
from ktmerge.eval.metrics import CHOICE, likeliest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.eval.results import Results
    from ktmerge.eval.scores import TaskInfo, TaskScore

MOST = 60
"""Items shown of one set: the first forty and, of what is left, the last, where gains are."""
_FIRST = 40
LONGEST = 2000
"""Characters shown of a text: of a prompt the last, where the question is, of an answer the first."""

Change = Literal["lost", "gained", "mixed"]


@dataclass(frozen=True)
class Answer:
    """One model's answer to one item.

    Attributes:
        text: what it said, or which choice it took.
        score: in [0, 1] for most metrics.
        right: whether the score is above one half.
    """

    text: str
    score: float
    right: bool


@dataclass(frozen=True)
class Item:
    """One item on which models part.

    Attributes:
        number: of the item in its set, from 1.
        change: ``lost``: no model is better than the base and one is worse; ``gained``: the other way round.
    """

    number: int
    prompt: str
    reference: str
    answers: dict[str, Answer]
    change: Change


def telling(results: Results, task: TaskInfo) -> list[Item]:
    """The items of a set whose scores differ between models, by how much was lost against the base.

    Empty for sets of text, for imported totals, and where all models score alike.
    """
    if not task.prompts or not task.rows:
        return []
    columns = {name: scores[task.name] for name, scores in results.scores.items()}
    table = np.stack([columns[name].scores for name in columns])
    base = columns[results.base].scores
    others = np.stack([columns[name].scores for name in columns if name != results.base] or [base])
    worst, total = (others - base).min(axis=0), (others - base).sum(axis=0)
    differing = np.flatnonzero(table.min(axis=0) < table.max(axis=0))
    order = sorted((int(i) for i in differing), key=lambda i: (float(worst[i]), float(total[i]), i))
    return [
        Item(
            i + 1,
            _end(task.prompts[i]),
            _start(_reference(task, i)),
            {name: _answer(task, score, i) for name, score in columns.items()},
            _change(others[:, i] - base[i]),
        )
        for i in _ends(order)
    ]


def _ends(order: Sequence[int]) -> Sequence[int]:
    return order if len(order) <= MOST else [*order[:_FIRST], *order[_FIRST - MOST :]]


def _change(differences: NDArray[np.float64]) -> Change:
    if (differences <= 0).all():
        return "lost"
    return "gained" if (differences >= 0).all() else "mixed"


def _reference(task: TaskInfo, i: int) -> str:
    reference = task.references[i] if i < len(task.references) else ""
    if isinstance(reference, list):
        return " | ".join(dict.fromkeys(_choice(task, i, one) for one in reference))
    return _choice(task, i, reference)


def _choice(task: TaskInfo, i: int, number: object) -> str:
    """What a choice of item ``i`` says, a letter task's behind its letter; what is no choice's number, as it is."""
    if not isinstance(number, int) or not (task.choices or task.kind in ("choice", "classify")):
        return str(number)
    if not (task.choices and 0 <= number < len(task.choices[i])):
        return f"choice {number + 1}"
    said = task.choices[i][number].strip()
    return f"{LETTERS[number]}. {said}" if task.kind == "letter" else said


def _answer(task: TaskInfo, score: TaskScore, i: int) -> Answer:
    value = float(score.scores[i])
    return Answer(_start(_said(task, score, i)), value, value > 0.5)


def _start(text: str) -> str:
    rest = len(text) - LONGEST
    return text if rest <= 0 else f"{text[:LONGEST]} … ({rest:,} more characters)"


def _end(text: str) -> str:
    rest = len(text) - LONGEST
    return text if rest <= 0 else f"({rest:,} more characters) … {text[-LONGEST:]}"


def _said(task: TaskInfo, score: TaskScore, i: int) -> str:
    if "outputs" in score.details:
        return str(score.details["outputs"][i])
    if "predicted" in score.details:
        return _choice(task, i, score.details["predicted"][i])
    if "logprobs" in score.details:
        return _choice(task, i, _taken(task, score.details["logprobs"][i], i))
    return ""


def _taken(task: TaskInfo, logprobs: Sequence[float], i: int) -> int:
    """The choice that the metric takes for a model's: lm_eval's tasks don't store which."""
    if not task.choices:
        return likeliest(logprobs, ())
    choices = task.choices[i]
    return CHOICE.get(task.metric.partition(",")[0], likeliest)(logprobs[: len(choices)], choices)
