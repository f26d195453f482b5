"""What was measured of one model on one set: every item's score, and what it was made from; JSON and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ktmerge.eval import statistics
from ktmerge.eval.metrics import bits_per_byte, perplexity_per_byte, perplexity_per_token, perplexity_per_word
from ktmerge.recipes.suites import Side

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TaskInfo:
    """One set of the suite, as it was scored.

    Attributes:
        rows: the data file's row (from 0) of each item; a row of text may give several.
        prompts: of each item, as written in the suite (not for text tasks).
        references: index of the right choice, or the reference answer (not for text tasks).
        choices: of each item, where there are such.
        truncated: items whose prompt was cut to fit the model; skipped: rows too short to score.
        clusters: of each item the first row with the same images, or that it was taken from; empty where no two share.
    """

    name: str
    side: Side
    kind: str
    metric: str
    digest: str
    data_digest: str
    rows: list[int]
    prompts: list[str] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    choices: list[list[str]] = field(default_factory=list)
    truncated: int = 0
    skipped: int = 0
    clusters: list[int] = field(default_factory=list)

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # of files that are read

    @property
    def groups(self) -> list[int]:
        """Of each item what it is drawn with, see :func:`statistics.groups_of`."""
        return statistics.groups_of(self.clusters or self.rows)


@dataclass(frozen=True)
class ModelInfo:
    """One scored model; ``digest`` is that of its weights, None when it was scored from memory."""

    path: str
    digest: str | None
    tokenizer: str
    device: str
    dtype: str
    seconds: float


@dataclass(frozen=True)
class TaskScore:
    """A model's scores on a task: per item in [0, 1], and what they were made from.

    Attributes:
        scores: of each item, in [0, 1]; CIDEr's go to 10.
        details: columns by name, one entry an item. choice, classify: ``logprobs``, ``predicted``; generate:
            ``outputs``, ``answers`` (where one was extracted); letter: ``outputs``, ``predicted`` (None: unread);
            text: ``correct``, ``tokens``, ``nll`` (nats), ``bytes``, ``words``.
        figures: numbers of the whole set shown beside the score, such as ``unread`` (percent) or ``bleu``.
        signature: of the package and settings that scored it, if any.
        total: of an imported set without item scores, its score and standard error on 0-100; ``scores`` is empty.
    """

    scores: NDArray[np.float64]
    details: dict[str, list[Any]]
    figures: dict[str, float] = field(default_factory=dict)
    signature: str = ""
    total: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """On 0-100."""
        if self.total is not None:
            return self.total[0]
        return statistics.mean(self.scores)

    def extras(self) -> dict[str, float]:
        """Figures shown beside the score; of a text task perplexity per token, word and byte, and bits per byte."""
        if "nll" not in self.details:
            return self.figures
        nll = sum(self.details["nll"])
        size, tokens, words = (sum(self.details.get(unit, ())) for unit in ("bytes", "tokens", "words"))
        found = {"perplexity_per_token": perplexity_per_token(nll, tokens)} if tokens else {}
        if words:
            found["perplexity_per_word"] = perplexity_per_word(nll, words)
        if size:
            found |= {"perplexity_per_byte": perplexity_per_byte(nll, size), "bits_per_byte": bits_per_byte(nll, size)}
        return {**self.figures, **{name: value for name, value in found.items() if isfinite(value)}}

    def to_json(self) -> dict[str, Any]:
        return {
            "score": self.mean, **self.extras(), "signature": self.signature,
            "figures": self.figures, "scores": self.scores.tolist(), "details": self.details,
            **({} if self.total is None else {"total": list(self.total)}),
        }  # fmt: skip

    @classmethod
    def from_json(cls, one: dict[str, Any]) -> TaskScore:
        figures = {name: float(value) for name, value in one.get("figures", {}).items()}
        return cls(
            np.array(one["scores"], dtype=float), dict(one["details"]), figures, str(one.get("signature", "")),
            _total(one.get("total")),
        )  # fmt: skip


def _total(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))
