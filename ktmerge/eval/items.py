"""Items of a task: the texts to score, made from rows by templates. Knows nothing of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ktmerge.errors import UsageError
from ktmerge.eval.templates import Template, is_template, missing_column
from ktmerge.recipes.rows import Row
from ktmerge.recipes.suites import ChoiceTask, GenerateTask, TextTask


@dataclass(frozen=True)
class ChoiceItem:
    """A context, the texts that may follow it, and which is right; ``separator`` stands between the two."""

    row: int
    prompt: str
    choices: tuple[str, ...]
    answer: int
    separator: str

    def continuations(self) -> list[str]:
        return [self.separator + choice for choice in self.choices]


@dataclass(frozen=True)
class GenerateItem:
    """A prompt and the answer it should get."""

    row: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class TextItem:
    """A text whose tokens are predicted one by one."""

    row: int
    text: str


Item = ChoiceItem | GenerateItem | TextItem


def make_items(task: ChoiceTask | GenerateTask | TextTask, rows: list[Row]) -> list[Item]:
    """Render the templates of ``task`` over its rows.

    Raises:
        UsageError: a column is missing, a template fails, choices or answer don't fit; the row is named.
    """
    if isinstance(task, ChoiceTask):
        maker = _ChoiceMaker(task)
        return [maker.item(row) for row in rows]
    if isinstance(task, GenerateTask):
        prompt, answer = Template(task.prompt, _where(task, "prompt")), Template(task.answer, _where(task, "answer"))
        return [GenerateItem(row.number, prompt.text(row), answer.text(row)) for row in rows]
    text = Template(task.text, _where(task, "text"))
    return [TextItem(row.number, text.text(row)) for row in rows]


def _where(task: ChoiceTask | GenerateTask | TextTask, key: str) -> str:
    return f"task '{task.name}', {key}"


class _ChoiceMaker:
    def __init__(self, task: ChoiceTask) -> None:
        self._task = task
        self._prompt = Template(task.prompt, _where(task, "prompt"))
        self._answer = Template(task.answer, _where(task, "answer"))
        self._choices: list[Template] | Template | str
        if isinstance(task.choices, list):
            self._choices = [Template(choice, _where(task, "choices")) for choice in task.choices]
        elif is_template(task.choices):
            self._choices = Template(task.choices, _where(task, "choices"))
        else:
            self._choices = task.choices

    def item(self, row: Row) -> ChoiceItem:
        values = self._choice_values(row)
        choices = tuple(str(value) for value in values)
        for choice in choices:
            if not choice:
                raise UsageError(f"{_where(self._task, 'choices')}: {row.where} has an empty choice.")
        if len(choices) < 2:
            raise UsageError(f"{_where(self._task, 'choices')}: {row.where} has {len(choices)}, at least 2 are needed.")
        answer = self._answer_index(row, values, choices)
        return ChoiceItem(row.number, self._prompt.text(row), choices, answer, self._separator(choices))

    def _choice_values(self, row: Row) -> list[Any]:
        where = _where(self._task, "choices")
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

    def _separator(self, choices: tuple[str, ...]) -> str:
        """The separator as written; the default one stays out of chat turns and before a choice with its own space."""
        task = self._task
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
