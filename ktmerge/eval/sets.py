"""The sets of a suite made ready: rows read, items rendered, digests taken, then encoded for a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError
from ktmerge.eval.encode import Encoded, Encoder
from ktmerge.eval.examples import worked_rows
from ktmerge.eval.images import RowImages, row_images
from ktmerge.eval.items import Item
from ktmerge.eval.overlap import require
from ktmerge.eval.rendering import make_items
from ktmerge.eval.rows import Part, part_named, read_rows, whole
from ktmerge.recipes.harness import HarnessTask
from ktmerge.recipes.rows import Row
from ktmerge.recipes.suites import AnyTask, PromptTask, Side, Suite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ktmerge.eval.harness import HarnessSet
    from ktmerge.eval.sight import Sight

SCORING_VERSION = 5  # raise when the same task on the same data would score differently
_PLACES = ("data", "shots_from", "images")  # where data lie does not change a score
_OPTIONAL = ("image", "choice_images", "each", "join", "where", "shots_by", "shot", "intro")


@dataclass(frozen=True)
class TaskSet:
    """One task with its items.

    Attributes:
        digest: sha256 over all of the task that changes its scores: its settings, its data, how ktmerge scores. Where
            the data lie does not count.
        harness: its rows and prompts if it is lm_eval's, and then no items.
        places: file and line (or row) of each row, by its number.
        place: file and line of the task itself, if it is from a suite's file.
        clusters: of rows that show the same images, or were taken from one row, the number of the first.
    """

    task: AnyTask | HarnessTask
    side: Side
    items: list[Item]
    data_digest: str
    digest: str
    harness: HarnessSet | None = None
    places: Mapping[int, str] = field(default_factory=dict)
    place: str = ""
    clusters: Mapping[int, int] = field(default_factory=dict)

    def drawn_with(self, rows: Sequence[int]) -> list[int]:
        """Of each of these rows, by number, what it is drawn with."""
        return [self.clusters.get(row, row) for row in rows]


def read_sets(suite: Suite, part: str | None = None) -> list[TaskSet]:
    """Read the data of every task and render its templates; upstream sets first.

    Args:
        suite: the sets.
        part: which rows: those for the report unless said otherwise, where the suite keeps some for selection.

    Raises:
        UsageError: whatever is wrong with data or templates; task, file and row are named.
    """
    chosen = part_named(part, suite.selection)
    sets = []
    for task in suite.tasks():
        place = suite.places.get(task.name, "")
        with _told_with(place):
            sets.append(replace(_read(task, suite, chosen), place=place))
    return sets


@contextmanager
def _told_with(place: str) -> Iterator[None]:
    """Begin what is said of a task with the place of the task."""
    try:
        yield
    except UsageError as error:
        lines = str(error).splitlines()
        before = f"{place}: " if place else ""
        raise UsageError("\n".join(f"{before}{line}" if line.startswith("task ") else line for line in lines)) from None


def _read(task: AnyTask | HarnessTask, suite: Suite, part: Part) -> TaskSet:
    side = suite.side(task.name)
    if isinstance(task, HarnessTask):
        return _of_lm_eval(task, side, suite, part)
    require(task.metric)
    rows = read_rows(task, suite.folder, suite.selection, part)
    pool, pool_digest = _pool(task, suite.folder)
    images = row_images(task, [*rows.rows, *worked_rows(task, pool)], suite.folder)
    settings = _settings(task)
    kept = None if part == "all" else [part, suite.selection, *(["whole rows"] if task.each else [])]
    separator = "separator" in task.model_fields_set
    written = [SCORING_VERSION, side, settings, separator, rows.digest, pool_digest, kept]
    written += [images.digest] if images.digest else []
    digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
    items = make_items(task, rows.rows, pool, images)
    try:
        require(task.metric, len(items))
    except UsageError as error:
        raise UsageError(f"task '{task.name}': {error}") from None
    places = {row.number: row.where for row in rows.rows}
    return TaskSet(task, side, items, rows.digest, digest, places=places, clusters=_clusters(rows.rows, images))


def _clusters(rows: Sequence[Row], images: RowImages) -> dict[int, int]:
    """Rows that are not independent of each other, and the number of the first among them."""
    first: dict[Hashable, int] = {}
    found = {}
    for row in rows:
        shown = row.source if row.source is not None else images.of.get(row.where)
        if shown is not None and (number := first.setdefault(shown, row.number)) != row.number:
            found[row.number] = number
    return found


def _settings(task: AnyTask) -> dict[str, Any]:
    """What of a task's keys changes its scores, as plain data; a key that came later counts only where it is used."""
    found = task.model_dump(mode="json", exclude={"join": {"data"}})
    return {key: value for key, value in found.items() if key not in _PLACES and (value or key not in _OPTIONAL)}


def _of_lm_eval(task: HarnessTask, side: Side, suite: Suite, part: Part) -> TaskSet:
    from ktmerge.eval.harness import read_harness

    made = read_harness(task, suite.folder, suite.selection, part)
    written = [SCORING_VERSION, side, made.digest, None if part == "all" else [part, suite.selection]]
    digest = hashlib.sha256(json.dumps(written).encode()).hexdigest()
    return TaskSet(task, side, [], made.data_digest, digest, made)


def _pool(task: AnyTask, folder: Path) -> tuple[list[Row], str]:
    """Where a task's worked examples come from, and the digest of that."""
    if not isinstance(task, PromptTask) or not task.shots:
        return [], ""
    split = task.shots_split or (None if task.shots_from else task.split)
    subset = None if task.shots_from else task.subset
    found = whole(task, folder, task.shots_from or task.data, subset, split, "shots_from")
    return found.rows, found.digest


def suite_digest(digests: Sequence[str]) -> str:
    """sha256 over the task digests, in order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def encode_sets(
    sets: Sequence[TaskSet], tokenizer: PreTrainedTokenizerBase, max_length: int | None, sight: Sight | None = None
) -> dict[str, Encoded]:
    """Encode every set, by task name, for models with this tokenizer and a context of ``max_length`` tokens.

    ``sight`` prepares prompts with images; where there are none it is not needed.

    Raises:
        UsageError: something doesn't fit the tokenizer or the context.
    """
    encoder = Encoder(tokenizer, max_length, sight)
    found = {}
    for one in sets:
        with _told_with(one.place):
            found[one.task.name] = _encoded(encoder, one)
    return found


def _encoded(encoder: Encoder, one: TaskSet) -> Encoded:
    if isinstance(one.task, HarnessTask):  # lm_eval encodes its own
        return Encoded(list(range(len(one.harness.prompts if one.harness is not None else ()))))
    return encoder.task(one.task, one.items, one.places)
