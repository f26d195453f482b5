"""Generated answers marked: from what models said to item scores. Knows no model; what was said can be marked again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import regex

from ktmerge.errors import UsageError
from ktmerge.eval.answers import ANSWER
from ktmerge.eval.instructions import followed
from ktmerge.eval.items import GenerateItem, InstructionsItem, LetterItem
from ktmerge.eval.letters import read_letter
from ktmerge.eval.overlap import OVERLAP, overlap
from ktmerge.eval.scores import TaskScore
from ktmerge.eval.sets import TaskSet
from ktmerge.recipes.suites import GenerateTask, InstructionsTask

_SECONDS = 10


def mark(one: TaskSet, outputs: Sequence[str]) -> TaskScore:
    """Score what a model said to the items of a generate or letter task.

    Raises:
        UsageError: the metric's package is not installed.
    """
    if isinstance(one.task, GenerateTask):
        return _answers(one.task, [item for item in one.items if isinstance(item, GenerateItem)], outputs)
    if isinstance(one.task, InstructionsTask):
        return _followed(one.task, [item for item in one.items if isinstance(item, InstructionsItem)], outputs)
    return _letters([item for item in one.items if isinstance(item, LetterItem)], outputs)


def _letters(items: Sequence[LetterItem], outputs: Sequence[str]) -> TaskScore:
    read = [read_letter(said, item.choices) for said, item in zip(outputs, items, strict=True)]
    scores = [float(found == item.answer) for found, item in zip(read, items, strict=True)]
    details: dict[str, list[Any]] = {"outputs": list(outputs), "predicted": list(read)}
    return TaskScore(np.array(scores), details, {"unread": _percent([found is None for found in read])})


def _followed(task: InstructionsTask, items: Sequence[InstructionsItem], outputs: Sequence[str]) -> TaskScore:
    found = [followed(said, item.instructions) for said, item in zip(outputs, items, strict=True)]
    strict, loose = [own for own, _ in found], [own for _, own in found]
    scores = [float(all(own)) for own in (strict if task.metric == "prompt_strict" else loose)]
    other = {"prompt_loose": loose} if task.metric == "prompt_strict" else {"prompt_strict": strict}
    figures = {name: _percent([all(own) for own in marks]) for name, marks in other.items()}
    figures["instruction_strict"] = _percent([one for own in strict for one in own])
    figures["instruction_loose"] = _percent([one for own in loose for one in own])
    return TaskScore(np.array(scores), {"outputs": list(outputs), "strict": strict, "loose": loose}, figures)


def _answers(task: GenerateTask, items: Sequence[GenerateItem], outputs: Sequence[str]) -> TaskScore:
    details: dict[str, list[Any]] = {"outputs": list(outputs)}
    figures: dict[str, float] = {}
    answers = list(outputs)
    if task.extract is not None:
        found = [extracted(said, task.extract) for said in outputs]
        answers = [one or "" for one in found]
        details["answers"] = answers
        figures["unread"] = _percent([one is None for one in found])
    if task.metric in OVERLAP:
        whole = overlap(task.metric, answers, [item.answers for item in items])
        return TaskScore(np.array(whole.scores), details, figures | whole.figures, whole.signature)
    metric = ANSWER[task.metric]
    scores = [metric(said, item.answers, task.normalise) for said, item in zip(answers, items, strict=True)]
    return TaskScore(np.array(scores), details, figures)


def extracted(text: str, expression: str) -> str | None:
    """What the first group of ``expression`` (all of it, if it has none) matches last in ``text``; None: nothing.

    Raises:
        UsageError: it does not come to an end, as expressions do that repeat what is repeated.
    """
    try:
        matches = list(regex.finditer(expression, text, timeout=_SECONDS))
    except TimeoutError:
        raise UsageError(
            f"extract: {expression!r} looks at one answer for more than {_SECONDS} seconds; write it without repeats "
            "within repeats."
        ) from None
    if not matches:
        return None
    last = matches[-1]
    found: str | None = last[1] if last.re.groups else last[0]
    return found


def _percent(marks: Sequence[bool]) -> float:
    return 100 * sum(marks) / len(marks)
