"""Rows of a task rendered into items by its templates. Knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ktmerge.errors import UsageError
from ktmerge.eval.choices import ChoiceMaker
from ktmerge.eval.examples import Examples, introduced, worked_rows
from ktmerge.eval.images import RowImages
from ktmerge.eval.instructions import Instruction, instruction
from ktmerge.eval.items import GenerateItem, InstructionsItem, Item, ShownItem, TextItem
from ktmerge.eval.templates import Template, missing_column
from ktmerge.recipes.images import Image
from ktmerge.recipes.rows import Row
from ktmerge.recipes.suites import (
    AnyTask,
    ChoiceTask,
    ClassifyTask,
    GenerateTask,
    InstructionsTask,
    LetterTask,
    TaskBase,
    TextTask,
)

_NO_TEXTS = (dict, list, tuple, bytes)
_PEOPLE = {"vqa": 4, "vqa_simple": 3}  # answers that have to agree for a score of 1


def make_items(
    task: AnyTask, rows: list[Row], pool: list[Row] | None = None, images: RowImages | None = None
) -> list[Item]:
    """Render the templates of ``task`` over its rows.

    Args:
        task: the task.
        rows: what to ask.
        pool: where its worked examples come from, if it wants any; a row is never an example for itself, which is told
            by its place in the file.
        images: those of rows.

    Raises:
        UsageError: a column is missing, a template fails, choices or answer don't fit, the pool is too small; the row
            is named.
    """
    seen = images or RowImages()

    def own(row: Row) -> tuple[Image, ...]:
        return seen.of.get(row.where, ())

    if isinstance(task, TextTask):
        text = Template(task.text, _where(task, "text"))
        return [_whole(task, row, TextItem(row.number, text.text(row), own(row))) for row in rows]
    if isinstance(task, InstructionsTask):
        ask = Template(task.prompt, _where(task, "prompt"))
        return [
            _whole(task, row, InstructionsItem(row.number, ask.text(row), _instructions(task, row), images=own(row)))
            for row in rows
        ]
    maker = _maker(task, seen)

    def make(row: Row) -> ShownItem:
        return _whole(task, row, maker(row))

    intro = Template(task.intro, _where(task, "intro")) if task.intro else None
    examples = Examples(task, worked_rows(task, pool or []), make)
    return [introduced(replace(make(row), shots=examples.of(row)), intro.text(row) if intro else "") for row in rows]


def _where(task: TaskBase, key: str) -> str:
    return f"task '{task.name}', {key}"


AnyItem = TypeVar("AnyItem", bound=Item)


def _whole(task: TaskBase, row: Row, item: AnyItem) -> AnyItem:
    """The item, if all its texts are text: JSON can hold halves of characters, which no tokenizer takes."""
    given = vars(item)
    texts = [given.get("prompt", ""), given.get("text", ""), *given.get("choices", ()), *given.get("answers", ())]
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])[1:-1]
            raise UsageError(f"task '{task.name}': {row.where} has half a character ({half}) in a text.") from None
    return item


def _maker(task: ChoiceTask | ClassifyTask | LetterTask | GenerateTask, seen: RowImages) -> Callable[[Row], ShownItem]:
    if not isinstance(task, GenerateTask):
        return ChoiceMaker(task, seen).item
    prompt, answer = Template(task.prompt, _where(task, "prompt")), Template(task.answer, _where(task, "answer"))
    return lambda row: GenerateItem(
        row.number, prompt.text(row), _answers(task, answer, row), images=seen.of.get(row.where, ())
    )


def _instructions(task: InstructionsTask, row: Row) -> tuple[Instruction, ...]:
    for column in (task.instructions, task.arguments):
        if column not in row.values:
            raise missing_column(_where(task, "instructions"), row, [column])
    kinds, arguments = row.values[task.instructions], row.values[task.arguments]
    if not (isinstance(kinds, list) and isinstance(arguments, list) and len(kinds) == len(arguments) > 0):
        raise UsageError(
            f"{_where(task, 'instructions')}: {row.where} needs lists of the same length, not empty, "
            f"in '{task.instructions}' and '{task.arguments}'."
        )
    try:
        return tuple(
            instruction(str(kind), {} if own is None else own) for kind, own in zip(kinds, arguments, strict=True)
        )
    except UsageError as error:
        raise UsageError(f"{_where(task, 'instructions')}: {row.where}: {error}") from None


def _answers(task: GenerateTask, template: Template, row: Row) -> tuple[str, ...]:
    value = template.value(row)
    texts = isinstance(value, list | tuple)
    odd = [one for one in value if one != one or one is None or isinstance(one, _NO_TEXTS)] if texts else []
    if odd:
        raise UsageError(f"{_where(task, 'answer')}: {row.where} has {odd[0]!r} among its answers; texts are needed.")
    found = tuple(map(str, value)) if texts else (template.text(row),)
    if not found:
        raise UsageError(f"{_where(task, 'answer')}: {row.where} gives an empty list; at least one answer is needed.")
    people = _PEOPLE.get(task.metric, 1)
    if len(found) < people:
        raise UsageError(
            f"{_where(task, 'answer')}: {row.where} has too few answers ({len(found)}): '{task.metric}' counts people "
            f"who agree, and gives a right answer 1 from {people} on; take exact_match with normalise: vqa."
        )
    return found
