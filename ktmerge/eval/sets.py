"""The sets of a suite made ready: rows read, items rendered, digests taken, then encoded for a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktmerge.eval.encode import Encoded, Encoder
from ktmerge.eval.items import Item, make_items
from ktmerge.eval.rows import read_rows
from ktmerge.recipes.suites import ChoiceTask, GenerateTask, Side, Suite, TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORING_VERSION = 1  # raise when the same task on the same data would score differently


@dataclass(frozen=True)
class TaskSet:
    """One task with its items.

    Attributes:
        digest: sha256 over all of the task that changes its scores: its settings, its data, how ktmerge scores. Where
            the data lie does not count.
    """

    task: ChoiceTask | GenerateTask | TextTask
    side: Side
    items: list[Item]
    data_digest: str
    digest: str


def read_sets(suite: Suite) -> list[TaskSet]:
    """Read the data of every task and render its templates; upstream sets first.

    Raises:
        UsageError: whatever is wrong with data or templates; task, file and row are named.
    """
    sets = []
    for task in suite.tasks():
        side = suite.side(task.name)
        rows = read_rows(task, suite.folder)
        settings = task.model_dump(mode="json", exclude={"data"})
        written = [SCORING_VERSION, side, settings, "separator" in task.model_fields_set, rows.digest]
        digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
        sets.append(TaskSet(task, side, make_items(task, rows.rows), rows.digest, digest))
    return sets


def suite_digest(digests: Sequence[str]) -> str:
    """sha256 over the task digests, in order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def encode_sets(
    sets: Sequence[TaskSet], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Encoded]:
    """Encode every set, by task name, for models with this tokenizer and a context of ``max_length`` tokens.

    Raises:
        UsageError: something doesn't fit the tokenizer or the context.
    """
    encoder = Encoder(tokenizer, max_length)
    return {one.task.name: encoder.task(one.task, one.items) for one in sets}
