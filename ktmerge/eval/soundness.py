"""Whether the parts of a score file fit together: files are cut off, joined and mended by hand. Knows no JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from math import inf, isclose, isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.errors import UsageError
from ktmerge.eval.letters import LETTERS

if TYPE_CHECKING:
    from ktmerge.eval.results import Results
    from ktmerge.eval.scores import TaskInfo, TaskScore

LARGEST = {"cider": 10.0}  # item score of metrics that go beyond 1
_CHOSEN = ("choice", "classify", "letter")  # kinds of task whose references are numbers of choices
_ADDED = ("correct", "tokens", "nll", "bytes", "words")  # columns of numbers that are summed


def damaged(where: str, what: str) -> UsageError:
    """The error for a score file that contradicts itself."""
    return UsageError(
        f"{where}: a damaged score file: {what}; score again with 'ktmerge eval', or take an unchanged copy."
    )


def check(results: Results, means: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Refuse results whose parts do not fit together.

    Args:
        results: what a file holds.
        means: per model and task, the score that stands beside the items' in it.
        where: names the file.

    Raises:
        UsageError: it names the file, and the item if it is one's fault.
    """
    for what in chain(_problems(results), _other_means(results, means)):
        raise damaged(where, what)


def _problems(results: Results) -> Iterator[str]:
    names = [task.name for task in results.tasks]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if results.base not in results.models or not names:
        yield "no base, or no tasks"
    if twice:
        yield f"two tasks are called '{twice[0]}'"
    if results.reference is not None and results.reference not in results.models:
        yield f"the reference '{results.reference}' is no model of it"
    for task in results.tasks:
        yield from _of_task(task)
    for model, tasks in results.scores.items():
        if list(tasks) != names:
            yield f"the tasks of '{model}' ({', '.join(tasks)}) are not the suite's ({', '.join(names)})"
        for task in results.tasks:
            yield from (f"'{model}': {what}" for what in _of_score(task, tasks[task.name]))


def _other_means(results: Results, means: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for model, own in means.items():
        for task, said in own.items():
            mean = results.scores[model][task].mean
            if not (_is_number(said) and isclose(said, mean, abs_tol=1e-6)):
                yield f"'{model}': the items of '{task}' come to {mean:.6g}, the score beside them is {said!r}"


def _of_task(task: TaskInfo) -> Iterator[str]:
    items = len(task.rows)
    for name, column in (
        ("prompts", task.prompts),
        ("references", task.references),
        ("choices", task.choices),
        ("clusters", task.clusters),
    ):
        if len(column) not in (0, items):
            yield f"'{task.name}' has {items} items and {len(column)} {name}"
    twice = [row for row, count in Counter(task.rows).items() if count > 1]
    if twice and task.kind != "text":
        yield f"row {twice[0]} is two items of '{task.name}'"
    if task.kind not in _CHOSEN:
        return
    for i, choices in enumerate(task.choices):
        if task.kind == "letter" and len(choices) > len(LETTERS):
            yield f"item {i + 1} of '{task.name}' has {len(choices)} choices, there are {len(LETTERS)} letters"
    for i, reference in enumerate(task.references):
        right = _right(reference)
        if not right or not all(_is_choice(task, i, one) for one in right):
            yield f"item {i + 1} of '{task.name}' has {reference!r} as its reference, which is none of its choices"


def _of_score(task: TaskInfo, score: TaskScore) -> Iterator[str]:
    items, total, scores = len(task.rows), score.total, score.scores
    if scores.shape != (items,):
        yield f"'{task.name}' has {items} items and scores of shape {list(scores.shape)}"
    if (total is None) != bool(items):
        yield f"'{task.name}' has neither items nor a total, or both"
    if total is not None and not (0 <= total[0] <= 100 and 0 <= total[1] < inf):
        yield f"'{task.name}' has the total {total[0]} and the standard error {total[1]}, which must be from 0 to 100"
    largest = LARGEST.get(task.metric, 1.0)
    beyond = np.flatnonzero(~((scores >= 0) & (scores <= largest)))
    if len(beyond):
        i = int(beyond[0])
        yield f"item {i + 1} of '{task.name}' has the score {scores[i]}, which must be from 0 to {largest:g}"
    for name, figure in score.figures.items():
        if not isfinite(figure):
            yield f"'{task.name}' has the figure {name} {figure}"
    for name, column in score.details.items():
        if not isinstance(column, list) or len(column) != items:
            yield f"'{task.name}' has {items} items, and not as many entries of '{name}'"
    for i in range(items):
        yield from (f"item {i + 1} of '{task.name}' has {what}" for what in _of_item(task, score, i))


def _of_item(task: TaskInfo, score: TaskScore, i: int) -> Iterator[str]:
    own = {name: column[i] for name, column in score.details.items()}
    for name in _ADDED:
        if name in own and not _is_number(own[name]):
            yield f"{own[name]!r} as '{name}'"
    logprobs = own.get("logprobs", [0.0])
    fewest = len(task.choices[i]) if task.choices else 1
    if not isinstance(logprobs, list) or len(logprobs) < fewest or not all(map(_is_number, logprobs)):
        yield f"{logprobs!r} as 'logprobs', not a number for each of its choices"
    told = task.kind == "text" and {"correct", "tokens"} <= own.keys()
    if told and not isclose(score.scores[i] * own["tokens"], own["correct"], abs_tol=1e-6):
        yield f"the score {score.scores[i]:g}, but {own['correct']} of {own['tokens']} tokens correct"
    if task.kind not in _CHOSEN or "predicted" not in own:
        return
    predicted = own["predicted"]
    if not _is_choice(task, i, predicted) and not (predicted is None and task.kind == "letter"):
        yield f"{predicted!r} as 'predicted', which is none of its choices"
    if task.references and score.scores[i] != (predicted in _right(task.references[i])):
        yield f"the score {score.scores[i]:g}, but {predicted!r} predicted and {task.references[i]!r} as its reference"


def _right(reference: Any) -> list[Any]:
    return reference if isinstance(reference, list) else [reference]


def _is_choice(task: TaskInfo, i: int, number: Any) -> bool:
    """Whether it is the number of a choice of item ``i``; of older files that keep no choices, whether it may be."""
    return type(number) is int and 0 <= number < (len(task.choices[i]) if task.choices else inf)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # nor NaN
