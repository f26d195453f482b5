"""A task of lm_eval inside a suite."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ktmerge.recipes.section import Strict


class HarnessTask(Strict):
    """A task, group or tag of lm_eval by name, asked and marked by lm_eval itself; needs ``ktmerge[lm-eval]``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="unique in the suite; by default lm_eval's")
    kind: Literal["lm_eval"] = "lm_eval"
    lm_eval: str = Field(min_length=1, description="name of the task, group or tag; a group's items are taken together")
    num_fewshot: int | None = Field(None, ge=0, le=64, description="worked examples; by default as the task says")
    limit: int | None = Field(None, ge=1, description="the first so many rows of each task, as lm_eval counts")
    seed: int = Field(1234, ge=0, description="draws the worked examples")
    chat: bool = Field(False, description="ask as turns of the model's chat template")
    include_path: str | None = Field(None, description="folder of task files of your own, relative to the suite file")
    metric: str = Field(
        "", description="the score: a metric with a value for each item, 'acc_norm' or 'exact_match,strict-match' "
        "(metric, filter); by default the first that lm_eval averages over items"
    )  # fmt: skip


def named(task: Any) -> Any:
    """A task that only says ``lm_eval: name`` is of that kind, and called so."""
    if not isinstance(task, dict) or "lm_eval" not in task:
        return task
    return {"kind": "lm_eval", "name": task["lm_eval"], **task}
