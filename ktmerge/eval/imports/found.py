"""What a harness's files say of one model on one set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Items:
    """Item scores of one metric, in the files' order.

    Attributes:
        keys: what tells an item from others in all models' files.
        scores: in [0, 1].
        prompts, references, outputs: where the files have them, one an item, or empty.
    """

    keys: list[str]
    scores: list[float]
    prompts: list[str] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Total:
    """A score of the whole set as the file has it; ``stderr`` None: there is none; ``items`` None: nor their number.

    Attributes:
        scale: what makes points on 0-100 of it; None: nothing says whether it is a fraction or percent.
    """

    score: float
    stderr: float | None = None
    items: int | None = None
    scale: int | None = None


@dataclass(frozen=True)
class FoundSet:
    """A model's results on one set, by metric; where a metric has items, they count, and not the total.

    Attributes:
        harness: which wrote it, with its version where it says so.
        asked: settings that must be the same for all models, such as the number of worked examples.
        parts: of a group, its tasks.
    """

    name: str
    harness: str
    items: dict[str, Items] = field(default_factory=dict)
    totals: dict[str, Total] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)

    def metrics(self) -> list[str]:
        """All metrics, those with items first."""
        return list(dict.fromkeys([*self.items, *self.totals]))
