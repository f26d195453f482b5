"""Worked examples before a prompt: which rows they are made of, and what they show. Knows no tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError
from ktmerge.eval.rows import ranked
from ktmerge.eval.templates import Template, missing_column
from ktmerge.recipes.rows import Row
from ktmerge.recipes.suites import AnyTask, PromptTask

if TYPE_CHECKING:
    from ktmerge.eval.items import Shot, ShownItem


class Examples:
    """The worked examples of a task.

    Args:
        task: says how many, and which.
        rows: they may be made of, in the order to show them.
        make: makes an item of a row.
    """

    def __init__(self, task: PromptTask, rows: Sequence[Row], make: Callable[[Row], ShownItem]) -> None:
        self._task = task
        answer = Template(task.shot, f"task '{task.name}', shot") if task.shot else None
        self._by_group: dict[Any, list[tuple[str, Shot]]] = defaultdict(list)
        for row in rows:
            worked = make(row).worked
            if answer is not None:
                lead = worked.answer[: len(worked.answer) - len(worked.answer.lstrip())]
                worked = worked._replace(answer=lead + answer.text(row))
            self._by_group[_group(task, row)].append((row.where, worked))

    def of(self, row: Row) -> tuple[Shot, ...]:
        """The examples before ``row``, which is never one of them.

        Raises:
            UsageError: there are too few.
        """
        wanted = self._task.shots
        chosen = [shot for where, shot in self._by_group[_group(self._task, row)] if where != row.where][:wanted]
        if len(chosen) < wanted:
            group = f" with its '{self._task.shots_by}'" if self._task.shots_by else ""
            raise UsageError(
                f"task '{self._task.name}', shots: {wanted} wanted, there are {len(chosen)} besides {row.where}{group}."
            )
        return tuple(chosen)


def worked_rows(task: AnyTask, pool: list[Row]) -> list[Row]:
    """The rows of ``pool`` that may be shown: one more than are, for a row that is one of them; of each group apart.

    Raises:
        UsageError: the column that groups them is missing.
    """
    if not isinstance(task, PromptTask) or not task.shots:
        return []
    if task.shots_by is None:
        return ranked(pool, f"{task.seed}:shot")[: task.shots + 1]
    counts: Counter[Any] = Counter()
    found = []
    for row in pool:
        group = _group(task, row)
        if counts[group] <= task.shots:
            found.append(row)
        counts[group] += 1
    return found


def _group(task: PromptTask, row: Row) -> Any:
    if task.shots_by is None:
        return None
    if task.shots_by not in row.values:
        raise missing_column(f"task '{task.name}', shots_by", row, [task.shots_by])
    return str(row.values[task.shots_by])


def introduced(item: ShownItem, intro: str) -> ShownItem:
    """The item with ``intro`` before all that it shows."""
    if item.shots:
        first = item.shots[0]
        return replace(item, shots=(first._replace(prompt=intro + first.prompt), *item.shots[1:]))
    return replace(item, prompt=intro + item.prompt)
