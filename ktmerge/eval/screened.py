"""What was measured of models without labels, with intervals; JSON. Knows no models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.checkpoints.files import write_whole
from ktmerge.eval.statistics import drawn_in_words, interval, resampled_means
from ktmerge.eval.summary import Estimate
from ktmerge.recipes.suites import Side

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.eval.screened_table import ScreenedTable

SCHEMA_VERSION = 1
NEIGHBOURS = "neighbours"
FORMULAS = {
    "to_base": "to base = mean over upstream sets of KL(base || model) on their prompts, nats per token",
    "to_experts": "to experts = mean over downstream sets and their experts of KL(expert || model) on the experts' own "
    "answers, nats per token",
    "J": "J = a (to experts) + (1 - a) (to base); lower is better",
    "disagreement": "disagreement = mean over sets of the percent of items that neighbours on the line "
    "answer otherwise",
}


@dataclass(frozen=True)
class ScreenedSet:
    """One set, measured against one teacher.

    Attributes:
        teacher: ``base``, an expert's name, or ``neighbours``.
        values: [models, items]; KL in nats per token, or the share of neighbours that answer otherwise.
        groups: of each item, what it is drawn with; every set of a task has the same.
    """

    task: str
    side: Side
    teacher: str
    values: NDArray[np.float64]
    groups: list[int]

    def means(self, resamples: int, seed: int) -> NDArray[np.float64]:
        """Of every model its mean, then that of each resample [models, 1 + resamples].

        Sets of one task draw the same items, whoever the teacher is.
        """
        drawn = resampled_means({self.task: self.values}, resamples, seed, {self.task: self.groups})[self.task]
        return np.concatenate([self.values.mean(axis=1)[:, None], drawn / 100], axis=1)


@dataclass(frozen=True)
class Numbers:
    """One model's; None where nothing was there to measure it on.

    Attributes:
        behind: J minus the smallest J of all; its interval includes 0 where the two cannot be told apart.
    """

    to_base: Estimate | None
    to_experts: Estimate | None
    J: Estimate | None
    behind: Estimate | None
    disagreement: Estimate | None


@dataclass(frozen=True)
class Screened:
    """All models of a run, in its order; on a line that is the coefficient's."""

    suite: str
    suite_digest: str
    models: list[str]
    base: str
    experts: dict[str, str]
    paths: dict[str, str]
    sets: list[ScreenedSet]
    weight: float = 0.5
    bootstrap: int = 2000
    seed: int = 0
    formulas: dict[str, str] = field(default_factory=lambda: dict(FORMULAS))

    @cached_property
    def numbers(self) -> dict[str, Numbers]:
        """By model; intervals are of a bootstrap that draws the same items for all models."""
        whole = [one.means(self.bootstrap, self.seed) for one in self.sets]

        def mean(chosen: Sequence[int]) -> NDArray[np.float64] | None:
            """Over sets, each with the mean of its teachers [models, 1 + resamples]: the value itself comes first."""
            tasks = {self.sets[i].task: [j for j in chosen if self.sets[j].task == self.sets[i].task] for i in chosen}
            own = [np.mean([whole[j] for j in places], axis=0) for places in tasks.values()]
            return np.mean(own, axis=0) if own else None

        beside = [i for i, one in enumerate(self.sets) if one.teacher == NEIGHBOURS]
        up = mean([i for i, one in enumerate(self.sets) if one.side == "upstream" and i not in beside])
        down = mean([i for i, one in enumerate(self.sets) if one.side == "downstream" and i not in beside])
        apart = mean(beside)
        both = None if up is None or down is None else self.weight * down + (1 - self.weight) * up
        behind = None if both is None else both - both[int(both[:, 0].argmin())]
        percent = None if apart is None else 100 * apart
        return {
            name: Numbers(*(_estimate(one, i) for one in (up, down, both, behind, percent)))
            for i, name in enumerate(self.models)
        }

    @property
    def best(self) -> str | None:
        """The model with the smallest J; without experts or upstream sets None."""
        judged = {name: one.J.value for name, one in self.numbers.items() if one.J is not None}
        return min(judged, key=lambda name: judged[name]) if judged else None

    @property
    def calmest(self) -> str | None:
        """The model whose neighbours disagree with it least, the first of equal ones; None without a line."""
        found = {name: one.disagreement.value for name, one in self.numbers.items() if one.disagreement is not None}
        return min(found, key=lambda name: found[name]) if found else None

    def to_json(self) -> dict[str, Any]:
        """Plain data: every item's value, and the numbers made of them."""
        return {
            "ktmerge_screen": SCHEMA_VERSION,
            "suite": {"name": self.suite, "digest": self.suite_digest},
            "settings": {"weight": self.weight, "bootstrap": self.bootstrap, "seed": self.seed},
            "base": self.base, "experts": self.experts, "formulas": self.formulas,
            "models": {
                name: {"path": self.paths[name], **asdict(self.numbers[name])} for name in self.models
            },
            "best": self.best, "least_disagreeing": self.calmest,
            "sets": [
                {"task": one.task, "side": one.side, "teacher": one.teacher,
                 "values": {name: own.tolist() for name, own in zip(self.models, one.values, strict=True)}}
                for one in self.sets
            ],
        }  # fmt: skip

    def save(self, path: Path, *, overwrite: bool = True) -> None:
        """Write the JSON file, whole or not at all.

        Raises:
            UsageError: it is there, and not to be overwritten.
            KtmergeError: it cannot be written.
        """
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False)
        write_whole(Path(path), text + "\n", replace=overwrite)

    def table(self) -> ScreenedTable:
        """The numbers for a terminal; fits itself to the width."""
        from ktmerge.eval.screened_table import ScreenedTable

        return ScreenedTable(self)

    def notes(self) -> list[str]:
        """What the table says in words, and how its numbers are made."""
        said = []
        if self.best is not None:
            near = [
                name for name, one in self.numbers.items()
                if name != self.best and one.behind is not None and one.behind.low <= 0
            ]  # fmt: skip
            rest = f"; not to be told from it: {', '.join(near)}" if near else ""
            said.append(f"smallest J: {self.best}{rest}")
        if self.calmest is not None:
            said.append(f"neighbours disagree least at: {self.calmest}")
        measured = {"to_base", "to_experts", "J", "disagreement"}
        there = {key for one in self.numbers.values() for key in measured if getattr(one, key) is not None}
        said += [text.replace("a (", f"{self.weight:g} (").replace("(1 - a)", f"{1 - self.weight:g}")
                 for key, text in self.formulas.items() if key in there]  # fmt: skip
        what = drawn_in_words(one.groups for one in self.sets)
        said.append(
            f"[95 % interval]: paired bootstrap over {what}, {self.bootstrap} resamples, seed {self.seed}. "
            "These numbers rank candidates; confirm the choice with 'ktmerge eval' on rows with answers."
        )
        return said


def _estimate(drawn: NDArray[np.float64] | None, model: int) -> Estimate | None:
    if drawn is None:
        return None
    return Estimate(float(drawn[model, 0]), *interval(drawn[model, 1:]))
