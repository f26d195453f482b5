"""An evaluation suite: which sets tell what a model kept (upstream) and what it learned (downstream)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from ktmerge.recipes.harness import HarnessTask, named
from ktmerge.recipes.section import Strict, as_list

Side = Literal["upstream", "downstream"]
Texts = Annotated[list[str], BeforeValidator(as_list)]
"""One, or a list of them."""


class Join(Strict):
    """Other data that have something of every row: its image or its answer, under a common name."""

    data: str = Field(description="file, folder or dataset, as a task's data")
    subset: str | None = None
    split: str | None = None
    by: str = Field(description="column (or one {{ expression }}) of the row that names what belongs to it")
    key: str = Field(description="column there with that name; all columns there that the row lacks are added to it")


class TaskBase(Strict):
    """What every task has. Data are rows of JSONL, JSON, CSV or parquet; templates are sandboxed Jinja over a row."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="unique in the suite; stands in every table")
    data: str = Field(
        description="file or folder of files, relative to the suite file; or hf:owner/name, a Hugging Face dataset"
    )
    subset: str | None = Field(None, description="configuration of the dataset; of a folder, the folder inside it")
    split: str | None = Field(None, description="of a dataset or folder: the files whose names begin so")
    each: dict[str, str] = Field(
        {},
        description="name: column of lists; a row becomes one for each place in these lists, named so there",
    )
    join: Join | None = Field(None, description="other data with columns of the same rows, such as their images")
    where: str | None = Field(
        None, description="{{ expression }} over a row's own columns; only rows for which it is true"
    )
    limit: int | None = Field(None, ge=1, description="score only this many rows, drawn with the seed")
    seed: int = Field(0, ge=0, description="draws the rows when limit is set, and the worked examples")
    image: list[str] | str | None = Field(
        None, description="column (or one {{ expression }}) with a row's image or images; or a list of such"
    )
    images: str | None = Field(
        None, description="folder, relative to the suite file, where named images lie; by default where the data are"
    )

    @model_validator(mode="after")
    def _images_are_named(self) -> TaskBase:
        if self.images is not None and self.image is None and getattr(self, "choice_images", None) is None:
            raise ValueError("images is the folder of images; say with 'image' which column names them")
        return self


class PromptTask(TaskBase):
    """A task whose items are asked by a prompt, alone or after worked examples."""

    prompt: str = Field(description="template of the question, without the space before the answer")
    answer: str = Field(description="template giving the right answer")
    chat: bool = Field(False, description="wrap the prompt as a user turn of the model's chat template")
    shots: int = Field(0, ge=0, le=64, description="worked examples before each prompt; never the row itself")
    shots_from: str | None = Field(None, description="file of the worked examples; by default the data themselves")
    shots_split: str | None = Field(None, description="split of the worked examples; by default the data's")
    shots_by: str | None = Field(
        None, description="column; worked examples are those with the row's value in it, in the order of their file"
    )
    shot: str | None = Field(None, description="template of a worked example's answer; by default the right answer")
    intro: str | None = Field(None, description="template over the row, before all worked examples and the prompt")

    @model_validator(mode="after")
    def _shots_are_asked_for(self) -> PromptTask:
        if not self.shots and (self.shots_from or self.shots_split or self.shots_by or self.shot):
            raise ValueError("keys about worked examples (shots_from, shots_by, shot) need shots, how many there are")
        return self


class ChosenTask(PromptTask):
    """A task whose items have choices of their own: texts, or images that the prompt shows behind letters."""

    choices: list[str] | str | None = Field(
        None, description="list of templates; or a column (or one {{ expression }}) that holds a list"
    )
    choice_images: list[str] | str | None = Field(
        None,
        description="column (or one {{ expression }}) with a list of images, or a list of such, one each: "
        "the choices; {{ lettered }} shows them, and the answer is a letter; 'choices' may name them",
    )

    @model_validator(mode="after")
    def _has_choices(self) -> ChosenTask:
        if self.choices is None and self.choice_images is None:
            raise ValueError("there are no choices: give 'choices' (texts), or 'choice_images' (images)")
        return self


class ChoiceTask(ChosenTask):
    """Multiple choice by log-likelihood: argmax over choices of sum log p(choice | prompt).

    ``answer`` gives the right choice: a number is its index, a text the choice. Of images the letters are compared.
    """

    kind: Literal["choice"]
    separator: str = Field(
        " ", description="between prompt and choice; unless written, none in chat or if the choices start with a space"
    )
    metric: Literal["acc", "acc_norm"] = "acc"

    @model_validator(mode="after")
    def _images_are_shown(self) -> ChoiceTask:
        if self.choice_images is not None and "lettered" not in self.prompt:
            raise ValueError("the prompt must show the images to choose from: put {{ lettered }} into it")
        return self


class ClassifyTask(PromptTask):
    """One of a few labels, the same for all rows, by log-likelihood; macro F1 and balanced accuracy shown beside."""

    kind: Literal["classify"]
    labels: list[str] = Field(min_length=2, description="what may follow the prompt; answer gives one, or its index")
    separator: str = Field(" ", description="between prompt and label; unless written, none in chat")
    metric: Literal["acc"] = "acc"

    @field_validator("labels")
    @classmethod
    def _are_different(cls, value: list[str]) -> list[str]:
        twice = [label for label in value if value.count(label) > 1]
        if twice:
            raise ValueError(f"the label '{twice[0]}' stands twice")
        return value


class LetterTask(ChosenTask):
    """Multiple choice by the letter the model writes; what cannot be read is wrong; its share is shown beside."""

    kind: Literal["letter"]
    prompt: str = Field(description="template of the question; {{ lettered }} is the choices, one a line: 'A. first'")
    max_new_tokens: int = Field(16, ge=1, le=4096)
    stop: Texts = Field([], description="the answer ends before the first of these")
    metric: Literal["acc"] = "acc"

    @model_validator(mode="after")
    def _choices_are_shown(self) -> LetterTask:
        if "lettered" not in self.prompt:
            raise ValueError("the prompt must show the choices: put {{ lettered }} into it")
        return self


AnswerMetric = Literal[
    "exact_match", "f1", "vqa", "vqa_simple", "relaxed_accuracy", "anls", "sentence_bleu", "sentence_chrf", "rouge1",
    "rouge2", "rougeL", "rougeLsum", "cider",
]  # fmt: skip


class GenerateTask(PromptTask):
    """Greedy generation, compared with one reference or the best of several; ``answer`` gives a text or a list."""

    kind: Literal["generate"]
    max_new_tokens: int = Field(16, ge=1, le=4096)
    stop: Texts = Field(["\n"], description="the answer ends before the first of these")
    extract: str | None = Field(
        None, description="regular expression; what its first group matches last is the answer (else: no answer)"
    )
    normalise: Literal["none", "strip", "lower", "squad", "vqa", "number"] = Field(
        "strip", description="of answer and reference, for exact_match and f1; other metrics bring their own"
    )
    metric: AnswerMetric = "exact_match"

    @field_validator("extract")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value


class InstructionsTask(TaskBase):
    """Instructions whose following a program can check, as IFEval has them: shares of prompts and of instructions."""

    kind: Literal["instructions"]
    prompt: str = Field("{{ prompt }}", description="template of what is asked")
    chat: bool = Field(True, description="wrap the prompt as a user turn of the model's chat template")
    instructions: str = Field("instruction_id_list", description="column with the list of kinds of instructions")
    arguments: str = Field("kwargs", description="column with the arguments of each; those that are null do not count")
    max_new_tokens: int = Field(1280, ge=1, le=4096)
    stop: Texts = Field([], description="the answer ends before the first of these")
    metric: Literal["prompt_strict", "prompt_loose"] = "prompt_strict"


class TextTask(TaskBase):
    """Plain text, cut into chunks: next-token accuracy (0-100), with perplexity per token, word and byte beside."""

    kind: Literal["text"]
    text: str = Field("{{ text }}", description="template of the text of one row")
    chunk_tokens: int = Field(128, ge=8, le=32768, description="context length; every chunk is one scored item")
    metric: Literal["next_token_accuracy"] = "next_token_accuracy"


SaidTask = GenerateTask | LetterTask | InstructionsTask
"""Those that a model answers in its own words."""
AnyTask = ChoiceTask | ClassifyTask | LetterTask | GenerateTask | InstructionsTask | TextTask
Task = Annotated[AnyTask | HarnessTask, Field(discriminator="kind"), BeforeValidator(named)]


SUITE_VERSION = 1


class Suite(Strict):
    """Upstream and downstream tasks that are always scored together, with the same code, for every model."""

    ktmerge_suite: Literal[1] = Field(1, description="schema version")
    name: str = "suite"
    upstream: list[Task] = Field([])
    downstream: list[Task] = Field([])
    selection: float = Field(
        0.0, ge=0, lt=1, description="share of every set's rows kept for choosing recipes and never reported on"
    )
    folder: SkipJsonSchema[Path] = Field(
        Path("."), exclude=True, description="where relative data paths start; set by the loader"
    )
    places: SkipJsonSchema[dict[str, str]] = Field(
        {}, exclude=True, description="file and line of each task; set by the loader"
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Suite:
        names = [task.name for task in self.tasks()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks are called '{name}'")
        if not names:
            raise ValueError("a suite needs at least one task under upstream or downstream")
        return self

    def tasks(self) -> list[AnyTask | HarnessTask]:
        """All tasks, upstream first."""
        return [*self.upstream, *self.downstream]

    def side(self, task_name: str) -> Side:
        """Whether the named task is upstream or downstream."""
        return "upstream" if any(task.name == task_name for task in self.upstream) else "downstream"
