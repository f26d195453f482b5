"""What is scored: the eval section of a recipe."""

from __future__ import annotations

from pydantic import Field, model_validator

from ktmerge.recipes.section import Section
from ktmerge.recipes.suites import Task


class Evaluation(Section):
    """What is scored: a suite file, or tasks written here."""

    suite: str | None = None
    upstream: list[Task] = Field([])
    downstream: list[Task] = Field([])
    batch_size: int | None = Field(None, ge=1, description="sequences in a forward pass; by default what fits")
    bootstrap: int = Field(2000, ge=100, le=1_000_000, description="resamples behind each interval")
    seed: int = Field(0, ge=0, description="of the bootstrap")

    @model_validator(mode="after")
    def _suite_or_tasks(self) -> Evaluation:
        if (self.suite is None) == (not self.upstream and not self.downstream):
            raise ValueError("write either suite or tasks under upstream and downstream")
        return self
