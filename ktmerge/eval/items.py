"""Items of a task: the texts to score, made from rows by templates. Knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ktmerge.errors import UsageError
from ktmerge.eval.examples import Examples, introduced, worked_rows
from ktmerge.eval.instructions import Instruction, instruction
from ktmerge.eval.letters import LETTERS, lettered
from ktmerge.eval.templates import Template, is_template, missing_column
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


class Shot(NamedTuple):
    """A worked example: its prompt, what followed it (with the separator between), and its images."""

    prompt: str
    answer: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class ChoiceItem:
    """A context, the texts that may follow it, and which is right; ``separator`` stands between the two."""

    row: int
    prompt: str
    choices: tuple[str, ...]
    answer: int
    separator: str
    shots: tuple[Shot, ...] = ()
    images: tuple[Image, ...] = ()

    def continuations(self) -> list[str]:
        return [self.separator + choice for choice in self.choices]

    @property
    def worked(self) -> Shot:
        return Shot(self.prompt, self.separator + self.choices[self.answer], self.images)


@dataclass(frozen=True)
class LetterItem:
    """A prompt that shows lettered choices, and which is right."""

    row: int
    prompt: str
    choices: tuple[str, ...]
    answer: int
    shots: tuple[Shot, ...] = ()
    images: tuple[Image, ...] = ()

    @property
    def worked(self) -> Shot:
        return Shot(self.prompt, f" {LETTERS[self.answer]}", self.images)


@dataclass(frozen=True)
class GenerateItem:
    """A prompt and the answers that are right."""

    row: int
    prompt: str
    answers: tuple[str, ...]
    shots: tuple[Shot, ...] = ()
    images: tuple[Image, ...] = ()

    @property
    def worked(self) -> Shot:
        return Shot(self.prompt, f" {self.answers[0]}", self.images)


@dataclass(frozen=True)
class InstructionsItem:
    """A prompt, and the instructions in it that a program can check."""

    row: int
    prompt: str
    instructions: tuple[Instruction, ...]
    shots: tuple[Shot, ...] = ()
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class TextItem:
    """A text whose tokens are predicted one by one."""

    row: int
    text: str
    images: tuple[Image, ...] = ()


ShownItem = ChoiceItem | LetterItem | GenerateItem
"""Those of which worked examples can be made."""
SaidItem = GenerateItem | LetterItem | InstructionsItem
"""Those that a model answers in its own words."""
AskedItem = ShownItem | InstructionsItem
Item = AskedItem | TextItem


def make_items(
    task: AnyTask, rows: list[Row], pool: list[Row] | None = None, images: Mapping[str, tuple[Image, ...]] | None = None
) -> list[Item]:
    """Render the templates of ``task`` over its rows.

    Args:
        task: the task.
        rows: what to ask.
        pool: where its worked examples come from, if it wants any; a row is never an example for itself, which is told
            by its place in the file.
        images: those of rows, by where the rows are.

    Raises:
        UsageError: a column is missing, a template fails, choices or answer don't fit, the pool is too small; the row
            is named.
    """
    seen = images or {}
    if isinstance(task, TextTask):
        text = Template(task.text, _where(task, "text"))
        return [TextItem(row.number, text.text(row), seen.get(row.where, ())) for row in rows]
    if isinstance(task, InstructionsTask):
        ask = Template(task.prompt, _where(task, "prompt"))
        return [
            InstructionsItem(row.number, ask.text(row), _instructions(task, row), images=seen.get(row.where, ()))
            for row in rows
        ]
    bare = _maker(task)

    def make(row: Row) -> ShownItem:
        return replace(bare(row), images=seen.get(row.where, ()))

    intro = Template(task.intro, _where(task, "intro")) if task.intro else None
    examples = Examples(task, worked_rows(task, pool or []), make)
    return [introduced(replace(make(row), shots=examples.of(row)), intro.text(row) if intro else "") for row in rows]


def whole_prompt(item: AskedItem) -> str:
    """All an item shows before the answer, worked examples included, as plain text."""
    return "\n\n".join([*(shot.prompt + shot.answer for shot in item.shots), item.prompt])


def _where(task: TaskBase, key: str) -> str:
    return f"task '{task.name}', {key}"


def _maker(task: ChoiceTask | ClassifyTask | LetterTask | GenerateTask) -> Callable[[Row], ShownItem]:
    if isinstance(task, GenerateTask):
        prompt, answer = Template(task.prompt, _where(task, "prompt")), Template(task.answer, _where(task, "answer"))
        return lambda row: GenerateItem(row.number, prompt.text(row), _answers(task, answer, row))
    return _ChoiceMaker(task).item


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
        return tuple(instruction(str(kind), own or {}) for kind, own in zip(kinds, arguments, strict=True))
    except UsageError as error:
        raise UsageError(f"{_where(task, 'instructions')}: {row.where}: {error}") from None


def _answers(task: GenerateTask, template: Template, row: Row) -> tuple[str, ...]:
    value = template.value(row)
    texts = isinstance(value, list | tuple)
    odd = [one for one in value if one is None or isinstance(one, dict | list | tuple | bytes)] if texts else []
    if odd:
        raise UsageError(f"{_where(task, 'answer')}: {row.where} has {odd[0]!r} among its answers; texts are needed.")
    found = tuple(map(str, value)) if texts else (template.text(row),)
    if not found:
        raise UsageError(f"{_where(task, 'answer')}: {row.where} gives an empty list; at least one answer is needed.")
    return found


class _ChoiceMaker:
    def __init__(self, task: ChoiceTask | ClassifyTask | LetterTask) -> None:
        self._task = task
        self._key = "labels" if isinstance(task, ClassifyTask) else "choices"
        self._prompt = Template(task.prompt, _where(task, "prompt"))
        self._answer = Template(task.answer, _where(task, "answer"))
        self._choices: list[Template] | tuple[str, ...] | Template | str
        if isinstance(task, ClassifyTask):
            self._choices = tuple(task.labels)
        elif isinstance(task.choices, list):
            self._choices = [Template(choice, _where(task, "choices")) for choice in task.choices]
        elif is_template(task.choices):
            self._choices = Template(task.choices, _where(task, "choices"))
        else:
            self._choices = task.choices

    def item(self, row: Row) -> ChoiceItem | LetterItem:
        values = self._choice_values(row)
        choices = tuple(str(value) for value in values)
        where = _where(self._task, self._key)
        for choice in choices:
            if not choice:
                raise UsageError(f"{where}: {row.where} has an empty choice.")
        if len(choices) < 2:
            raise UsageError(f"{where}: {row.where} has {len(choices)}, at least 2 are needed.")
        answer = self._answer_index(row, values, choices)
        if isinstance(self._task, LetterTask):
            if len(choices) > len(LETTERS):
                raise UsageError(f"{where}: {row.where} has {len(choices)} choices, there are {len(LETTERS)} letters.")
            shown = Row(row.number, row.where, row.values | {"lettered": lettered(choices)})
            return LetterItem(row.number, self._prompt.text(shown), choices, answer)
        return ChoiceItem(row.number, self._prompt.text(row), choices, answer, self._separator(self._task, choices))

    def _choice_values(self, row: Row) -> list[Any]:
        where = _where(self._task, "choices")
        if isinstance(self._choices, tuple):
            return list(self._choices)
        if isinstance(self._choices, list):
            return [template.text(row) for template in self._choices]
        if isinstance(self._choices, Template):
            values = self._choices.value(row)
        elif self._choices in row.values:
            values = row.values[self._choices]
        else:
            raise missing_column(where, row, [self._choices])
        if not isinstance(values, list | tuple):
            raise UsageError(f"{where}: {row.where} gives {values!r}, a list of texts is needed.")
        for value in values:
            if not isinstance(value, str | int | float) or isinstance(value, bool):
                raise UsageError(f"{where}: {row.where} has the choice {value!r}, which is not a text.")
        return list(values)

    def _answer_index(self, row: Row, values: list[Any], choices: tuple[str, ...]) -> int:
        """A number is an index, a text is looked up among the choices, and read as an index if it isn't there."""
        where = _where(self._task, "answer")
        answer = self._answer.value(row)
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        if isinstance(answer, int) and not all(isinstance(value, str) for value in values):
            raise UsageError(
                f"{where}: {row.where} gives a number and the choices are numbers too; write "
                "'{{ ... | string }}' if it is one of the choices, not its index."
            )
        index = int(answer) if isinstance(answer, int) else _look_up(str(answer), choices)
        if index is None:
            raise UsageError(f"{where}: {row.where} gives {answer!r}, which is none of its choices {list(choices)}.")
        if not 0 <= index < len(choices):
            raise UsageError(f"{where}: {row.where} gives index {index}; its {len(choices)} choices count from 0.")
        return index

    @staticmethod
    def _separator(task: ChoiceTask | ClassifyTask, choices: tuple[str, ...]) -> str:
        """The separator as written; the default one stays out of chat turns and before a choice with its own space."""
        written = "separator" in task.model_fields_set
        if not written and (task.chat or all(choice[:1].isspace() for choice in choices)):
            return ""
        return task.separator


def _look_up(answer: str, choices: tuple[str, ...]) -> int | None:
    if answer in choices:
        return choices.index(answer)
    stripped = [choice.strip() for choice in choices]
    if stripped.count(answer.strip()) == 1:
        return stripped.index(answer.strip())
    try:
        return int(answer)
    except ValueError:
        return None
