"""An evaluation suite: which sets tell what a model kept (upstream) and what it learned (downstream)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Side = Literal["upstream", "downstream"]


class TaskBase(BaseModel):
    """What every task has. Data are rows of a JSONL, JSON or parquet file; templates are sandboxed Jinja over a row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="unique in the suite; stands in every table")
    data: str = Field(description="file, relative to the suite file")
    limit: int | None = Field(None, ge=1, description="score only this many rows, drawn with the seed")
    seed: int = Field(0, ge=0, description="draws the rows when limit is set")


class ChoiceTask(TaskBase):
    """Multiple choice by log-likelihood: argmax over choices of sum log p(choice | prompt)."""

    kind: Literal["choice"]
    prompt: str = Field(description="template of the context, without the space before the answer")
    choices: list[str] | str = Field(
        description="list of templates; or a column (or one {{ expression }}) that holds a list"
    )
    answer: str = Field(description="template giving the right choice: a number is its index, a text the choice")
    separator: str = Field(
        " ", description="between prompt and choice; unless written, none in chat or if the choices start with a space"
    )
    metric: Literal["acc", "acc_norm"] = "acc"
    chat: bool = Field(False, description="wrap the prompt as a user turn of the model's chat template")


class GenerateTask(TaskBase):
    """Greedy generation, compared with the reference after a named normalisation."""

    kind: Literal["generate"]
    prompt: str
    answer: str = Field(description="template of the reference answer")
    max_new_tokens: int = Field(16, ge=1, le=4096)
    stop: list[str] = Field(default_factory=lambda: ["\n"], description="the answer ends before the first of these")
    normalise: Literal["none", "strip", "lower"] = "strip"
    metric: Literal["exact_match"] = "exact_match"
    chat: bool = False


class TextTask(TaskBase):
    """Plain text, cut into chunks: next-token accuracy (0-100), with perplexity per byte shown beside."""

    kind: Literal["text"]
    text: str = Field("{{ text }}", description="template of the text of one row")
    chunk_tokens: int = Field(128, ge=8, le=32768, description="context length; every chunk is one scored item")
    metric: Literal["next_token_accuracy"] = "next_token_accuracy"


Task = Annotated[ChoiceTask | GenerateTask | TextTask, Field(discriminator="kind")]


class Suite(BaseModel):
    """Upstream and downstream tasks that are always scored together, with the same code, for every model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ktmerge_suite: Literal[1] = Field(1, description="schema version")
    name: str = "suite"
    upstream: list[Task] = Field(default_factory=list)
    downstream: list[Task] = Field(default_factory=list)
    folder: Path = Field(Path("."), exclude=True, description="where relative data paths start; set by the loader")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Suite:
        names = [task.name for task in self.tasks()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks are called '{name}'")
        if not names:
            raise ValueError("a suite needs at least one task under upstream or downstream")
        return self

    def tasks(self) -> list[ChoiceTask | GenerateTask | TextTask]:
        """All tasks, upstream first."""
        return [*self.upstream, *self.downstream]

    def side(self, task_name: str) -> Side:
        """Whether the named task is upstream or downstream."""
        return "upstream" if any(task.name == task_name for task in self.upstream) else "downstream"
