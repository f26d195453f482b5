"""Items with choices, of text or of images, made from rows. Knows nothing of tokens."""

from __future__ import annotations

from typing import Any

from ktmerge.errors import UsageError
from ktmerge.eval.images import RowImages
from ktmerge.eval.items import ChoiceItem, LetterItem
from ktmerge.eval.letters import LETTERS, lettered
from ktmerge.eval.templates import Column, Template
from ktmerge.recipes.images import MARK
from ktmerge.recipes.rows import Row
from ktmerge.recipes.suites import ChoiceTask, ClassifyTask, LetterTask, TaskBase


class ChoiceMaker:
    """Makes items of the rows of a task with choices.

    Args:
        task: the task.
        images: those of its rows, and those that are choices.
    """

    def __init__(self, task: ChoiceTask | ClassifyTask | LetterTask, images: RowImages) -> None:
        self._task = task
        self._images = images
        self._key = "labels" if isinstance(task, ClassifyTask) else "choices"
        self._prompt = Template(task.prompt, _where(task, "prompt"))
        self._answer = Template(task.answer, _where(task, "answer"))
        self._choices: list[Template] | tuple[str, ...] | Column | None
        if isinstance(task, ClassifyTask):
            self._choices = tuple(task.labels)
        elif isinstance(task.choices, list):
            self._choices = [Template(choice, _where(task, "choices")) for choice in task.choices]
        else:
            self._choices = None if task.choices is None else Column(task.choices, _where(task, "choices"))

    def item(self, row: Row) -> ChoiceItem | LetterItem:
        """The item of ``row``.

        Raises:
            UsageError: choices or answer don't fit; the row is named.
        """
        if getattr(self._task, "choice_images", None) is not None:
            return self._item_of_images(row)
        values = self._choice_values(row)
        choices = self._checked(row, values)
        answer, *others = self._right(row, values, choices)
        own = self._images.of.get(row.where, ())
        if isinstance(self._task, LetterTask):
            return LetterItem(row.number, self._shown(row, choices), choices, answer, images=own)
        separator = self._separator(self._task, choices)
        return ChoiceItem(
            row.number, self._prompt.text(row), choices, answer, separator, images=own, others=tuple(others)
        )

    def _item_of_images(self, row: Row) -> ChoiceItem | LetterItem:
        """Every choice an image in the prompt behind its letter; the answer is a letter."""
        own, pictures = self._images.of.get(row.where, ()), self._images.choices.get(row.where, ())
        where = _where(self._task, "choice_images")
        if len(pictures) < 2:
            raise UsageError(f"{where}: {row.where} has {len(pictures)}, at least 2 are needed.")
        names: list[Any] = [f"image {number}" for number in range(1, len(pictures) + 1)]
        if self._choices is not None:
            names = self._choice_values(row)
            if len(names) != len(pictures):
                raise UsageError(
                    f"{where}: {row.where} has {len(names)} choices, but {len(pictures)} images of choices."
                )
        choices = self._checked(row, names)
        prompt = self._shown(row, (MARK,) * len(pictures))
        if prompt.count(MARK) == len(pictures):  # the question's own stand before it, as without images of choices
            prompt = MARK * len(own) + prompt
        answer, *others = self._right(row, names, choices, letters=True)
        if isinstance(self._task, LetterTask):
            return LetterItem(row.number, prompt, choices, answer, images=own + pictures)
        letters = tuple(LETTERS[: len(pictures)])
        return ChoiceItem(
            row.number, prompt, letters, answer, self._separator(self._task, letters), images=own + pictures,
            others=tuple(others),
        )  # fmt: skip

    def _shown(self, row: Row, choices: tuple[str, ...]) -> str:
        """The prompt, with the choices behind letters where it asks for them."""
        if len(choices) > len(LETTERS):
            raise UsageError(
                f"{_where(self._task, self._key)}: {row.where} has {len(choices)} choices, "
                f"there are {len(LETTERS)} letters."
            )
        return self._prompt.text(Row(row.number, row.where, row.values | {"lettered": lettered(choices)}))

    def _checked(self, row: Row, values: list[Any]) -> tuple[str, ...]:
        choices = tuple(str(value) for value in values)
        where = _where(self._task, self._key)
        for choice in choices:
            if not choice:
                raise UsageError(f"{where}: {row.where} has an empty choice.")
        if len(choices) < 2:
            raise UsageError(f"{where}: {row.where} has {len(choices)}, at least 2 are needed.")
        return choices

    def _choice_values(self, row: Row) -> list[Any]:
        where = _where(self._task, "choices")
        if isinstance(self._choices, tuple):
            return list(self._choices)
        if isinstance(self._choices, list):
            return [template.text(row) for template in self._choices]
        values = self._choices.value(row) if self._choices is not None else None
        if not isinstance(values, list | tuple):
            raise UsageError(f"{where}: {row.where} gives {values!r}, a list of texts is needed.")
        for value in values:
            if not isinstance(value, str | int | float) or isinstance(value, bool) or value != value:
                raise UsageError(f"{where}: {row.where} has the choice {value!r}, which is not a text.")
        return list(values)

    def _right(self, row: Row, values: list[Any], choices: tuple[str, ...], letters: bool = False) -> list[int]:
        """Indices of the right choices: of a choice task there may be a list of several, none twice."""
        answer = self._answer.value(row)
        if not (isinstance(answer, list | tuple) and isinstance(self._task, ChoiceTask)):
            return [self._index(row, answer, values, choices, letters)]
        if not answer:
            raise UsageError(
                f"{_where(self._task, 'answer')}: {row.where} gives an empty list; at least one answer is needed."
            )
        return list(dict.fromkeys(self._index(row, one, values, choices, letters) for one in answer))

    def _index(self, row: Row, answer: Any, values: list[Any], choices: tuple[str, ...], letters: bool) -> int:
        """A number is an index, a text is looked up among the choices, and read as an index if it isn't there.

        With ``letters`` it may be a choice's letter, too.
        """
        where = _where(self._task, "answer")
        if answer is None:
            raise UsageError(f"{where}: {row.where} has null, no answer.")
        if isinstance(answer, bool):
            return self._true_or_false(row, answer, choices)
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        if isinstance(answer, int) and not all(isinstance(value, str) for value in values):
            raise UsageError(
                f"{where}: {row.where} gives a number and the choices are numbers too; write "
                "'{{ ... | string }}' if it is one of the choices, not its index."
            )
        index = int(answer) if isinstance(answer, int) else _look_up(str(answer), choices)
        if index is None and letters and str(answer).strip() in LETTERS[: len(choices)]:
            index = LETTERS.index(str(answer).strip())
        if index is None:
            hint = "; write '{{ ... | int }}' if it counts them" if str(answer).strip().isdecimal() else ""
            raise UsageError(
                f"{where}: {row.where} gives {answer!r}, which is none of its choices {list(choices)}{hint}."
            )
        if not 0 <= index < len(choices):
            raise UsageError(f"{where}: {row.where} gives index {index}; its {len(choices)} choices count from 0.")
        return index

    def _true_or_false(self, row: Row, answer: bool, choices: tuple[str, ...]) -> int:
        """The choice called so, or yes or no; of two others the second is meant by true."""
        called = [choice.strip().lower() for choice in choices]
        for names in (("false", "true"), ("no", "yes")):
            if called.count(names[answer]) == 1:
                return called.index(names[answer])
        if len(choices) == 2 and not set(called) & {"false", "true", "no", "yes"}:
            return int(answer)
        raise UsageError(
            f"{_where(self._task, 'answer')}: {row.where} gives {str(answer).lower()}, which is none of its choices "
            f"{list(choices)}; write '{{{{ ... | int }}}}' if it counts them."
        )

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
    if any(choice.lstrip("+-").isdecimal() for choice in stripped):  # then a number may as well be a choice left out
        return None
    try:
        return int(answer)
    except ValueError:
        return None


def _where(task: TaskBase, key: str) -> str:
    return f"task '{task.name}', {key}"
