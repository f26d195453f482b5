"""Items of a task: the texts and images to score. Knows neither templates nor tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ktmerge.eval.instructions import Instruction
from ktmerge.eval.letters import LETTERS
from ktmerge.recipes.images import Image


class Shot(NamedTuple):
    """A worked example: its prompt, what followed it (with the separator between), and its images."""

    prompt: str
    answer: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class ChoiceItem:
    """A context, the texts that may follow it, and which is right; ``separator`` stands between the two.

    ``others`` are right, too; worked examples show ``answer``.
    """

    row: int
    prompt: str
    choices: tuple[str, ...]
    answer: int
    separator: str
    shots: tuple[Shot, ...] = ()
    images: tuple[Image, ...] = ()
    others: tuple[int, ...] = ()

    @property
    def right(self) -> tuple[int, ...]:
        return (self.answer, *self.others)

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


def whole_prompt(item: AskedItem) -> str:
    """All an item shows before the answer, worked examples included, as plain text."""
    return "\n\n".join([*(shot.prompt + shot.answer for shot in item.shots), item.prompt])
