"""What a sweep found: the candidates, the finalists, the chosen recipe, and how far it can be trusted."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ktmerge.eval.cautions import few
from ktmerge.eval.significance import luck
from ktmerge.eval.statistics import drawn_in_words
from ktmerge.eval.summary import Estimate, ModelSummary, summarise
from ktmerge.recipes.suites import Side
from ktmerge.sweep.candidates import Candidate, Final
from ktmerge.sweep.curve import Curve
from ktmerge.sweep.pareto import Array
from ktmerge.sweep.rounds import ItemScores, Sets
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.space import told
from ktmerge.sweep.standing import Difference, paired

_TUNED, SHOWN = "experts", "the chosen"
"""Not names of experts, which have no spaces: what the best of all experts are called, and the chosen candidate."""


@dataclass(frozen=True)
class Outcome:
    """The end of a sweep.

    Attributes:
        sampler: that drew the candidates.
        study: name of the study in the storage.
        failed: why trials could not be blended or scored, by number.
        base: the base's scores on the selection items.
        sets: of selection items.
        chosen: the finalist with the largest gain of those that keep enough; None if none does.
        nearest: the finalist that keeps most.
        held_out: scores of base, experts and the chosen (or nearest) candidate (`SHOWN`) on items that chose nothing.
        held_out_sets: of these items.
    """

    settings: SweepSettings
    sampler: str
    study: str
    candidates: list[Candidate]
    failed: dict[int, str]
    finals: list[Final]
    base: ItemScores
    sets: Sets
    chosen: Candidate | None
    nearest: Candidate
    held_out: dict[str, ItemScores]
    held_out_sets: Sets

    @property
    def shown(self) -> Candidate:
        """The candidate that the held-out scores are about."""
        return self.chosen or self.nearest

    @cached_property
    def confirmed(self) -> ModelSummary:
        """The shown candidate on the held-out items, with intervals; the gain share is of the experts' gain, each set's
        best expert's."""
        experts = [scores for name, scores in self.held_out.items() if name not in ("base", SHOWN)]
        best = {name: max((one[name] for one in experts), key=np.mean) for name in self.held_out_sets}
        models = {"base": self.held_out["base"], _TUNED: best, SHOWN: self.held_out[SHOWN]}
        return self._summary(models, self.held_out_sets, _TUNED)[SHOWN]

    @cached_property
    def standings(self) -> dict[int, ModelSummary]:
        """The finalists on the selection items, by number, with intervals that do not know of the choice."""
        models = {"base": self.base, **{str(one.candidate.number): one.scores for one in self.finals}}
        found = self._summary(models, self.sets)
        return {one.candidate.number: found[str(one.candidate.number)] for one in self.finals}

    @property
    def knob(self) -> str | None:
        """The key that was turned, if it was a single number."""
        ranges = self.settings.ranges
        alone = len(ranges) == 1 and len(self.settings.methods) < 2 and not ranges[0].choices
        return ranges[0].key if alone and self.settings.screen != "divergence" else None

    @cached_property
    def curves(self) -> Array | None:
        """Of a single knob its whole way ``[101, 3]``: the knob, retention and gain, from the few points measured.

        Where a candidate was scored on all items, that counts; monotone, see `Curve`.
        """
        if self.knob is None:
            return None
        finals = {one.candidate.number: (one.retention, one.gain) for one in self.finals}
        knobs = [float(one.point[self.knob]) for one in self.candidates]
        values = [finals.get(one.number, (one.first, one.second)) for one in self.candidates]
        kept, gained = (Curve(knobs, [pair[i] for pair in values]) for i in range(2))
        grid = kept.grid(100)
        return np.array([[knob, kept.at(knob), gained.at(knob)] for knob in grid])

    def rule(self) -> str:
        """How the recipe was chosen."""
        return f"max downstream subject to upstream >= {self.settings.limit:g} % of base"

    def statement(self) -> list[str]:
        """The outcome in sentences."""
        counts = _counted(self.sets, "selection")
        if self.chosen is not None:
            said = [
                f"Trial {self.chosen.number} ({told(self.chosen.point)}) of {len(self.candidates)}: {self.rule()}, "
                f"on {counts}."
            ]
        else:
            said = [
                f"No recipe found: none of the {len(self.finals)} finalists of {len(self.candidates)} candidates keeps "
                f"{self.settings.limit:g} % of the base's upstream score on {counts}. Trial "
                f"{self.nearest.number} ({told(self.nearest.point)}) keeps most. Blends nearer to the base, "
                "other methods or a lower --keep-upstream may find one."
            ]
        own = self.confirmed
        said.append(
            f"Trial {self.shown.number} keeps {told_estimate(own.retention)} % of the base's upstream score and has "
            f"{told_estimate(own.gain_share)} % of the experts' downstream gain on "
            f"{_counted(self.held_out_sets, 'held-out')}: {self.verdict()}."
        )
        return said

    def verdict(self) -> str:
        """Whether the held-out items bear the goal out."""
        own, goals = self.confirmed, []
        for what, estimate, wanted in (
            (f"upstream >= {self.settings.limit:g} %", own.retention, self.settings.limit),
            (f"gain >= {self.settings.wanted_gain:g} %", own.gain_share, self.settings.wanted_gain),
        ):
            if wanted == -math.inf:
                continue
            if estimate is None:
                goals.append(f"{what} cannot be told")
            else:
                reached = "reached" if estimate.value >= wanted else "missed"
                open_ = estimate.low < wanted <= estimate.high
                goals.append(f"{what} {reached}" + (", though the interval allows either" if open_ else ""))
        return "; ".join(goals)

    @property
    def reached(self) -> bool:
        """Whether the chosen recipe reaches both goals on the held-out items, by its estimates."""
        own = self.confirmed
        if self.chosen is None or own.retention is None or own.gain_share is None:
            return False
        return own.retention.value >= self.settings.limit and own.gain_share.value >= self.settings.wanted_gain

    def cautions(self) -> list[str]:
        """What to keep in mind."""
        found = []
        what, standing = self.uncertain()
        if len(self.finals) > 1:
            error = float(np.mean([one.error for one in standing]))
            found.append(
                f"The best of {len(self.finals)} equally good finalists would look about "
                f"{luck(len(self.finals), error):.1f} points better {what} on the selection items than it is. The "
                "held-out items chose nothing: their numbers are free of that, and one recipe is tested on them, not "
                "several."
            )
        found += few({name: one.groups for name, one in self.held_out_sets.items()})
        if self.settings.seeds > 1:
            found.append(
                f"Candidates were compared by the mean of {self.settings.seeds} draws of their random choices; what is "
                "reported on the held-out items, and written, is the draw of the recipe's own seed."
            )
        if self.failed:
            number, reason = next(iter(self.failed.items()))
            found.append(f"{len(self.failed)} trials could not be blended or scored, such as {number}: {reason}")
        return found

    def uncertain(self) -> tuple[str, list[Difference]]:
        """What was maximised, and each finalist's in it with its standard error."""
        return "downstream", [paired(one.scores, self.base, self.sets, "downstream") for one in self.finals]

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """The finalists: columns, rows and a title."""
        rows = []
        for one in sorted(self.finals, key=lambda one: -one.retention):
            number = one.candidate.number
            own = self.standings[number]
            mark = " chosen" if self.chosen is not None and number == self.chosen.number else ""
            rows.append(
                [f"{number}{mark}", told(one.candidate.point), told_estimate(own.retention), told_estimate(own.E, "+")]
            )
        title = f"Finalists on the selection items ({self.rule()})"
        return ["trial", "recipe", "upstream kept, %", "E, points"], rows, title

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        own = self.confirmed
        return {
            "ktmerge_sweep": 1,
            "study": self.study,
            "rule": self.rule(),
            "sampler": self.sampler,
            "chosen": None if self.chosen is None else self.chosen.number,
            "nearest": self.nearest.number,
            "reached": self.reached,
            "statement": self.statement(),
            "cautions": self.cautions(),
            "held out": {
                key: None if estimate is None else asdict(estimate)
                for key, estimate in (
                    ("retention", own.retention), ("gain_share", own.gain_share), ("E", own.E), ("F", own.F),
                )
            },
            "finalists": [
                {
                    "trial": one.candidate.number, "point": one.candidate.point, "retention": one.retention,
                    "gain": one.gain, "digest": one.digest, "left_out": list(one.left_out),
                }
                for one in self.finals
            ],
            "candidates": [
                {"trial": one.number, "point": one.point, "recipe": one.recipe, "stopped": one.stopped,
                 "values": [one.first, one.second]}
                for one in self.candidates
            ],
            "failed": self.failed,
        }  # fmt: skip

    def _summary(
        self, models: dict[str, ItemScores], sets: Sets, reference: str | None = None
    ) -> dict[str, ModelSummary]:
        arrays = {name: {task: np.asarray(own) for task, own in scores.items()} for name, scores in models.items()}
        sides = {name: one.side for name, one in sets.items()}
        groups = {name: one.groups for name, one in sets.items()}
        return summarise(
            arrays, sides, groups=groups, reference=reference, bootstrap=self.settings.bootstrap,
            seed=self.settings.bootstrap_seed,
        ).models  # fmt: skip


def _counted(sets: Sets, which: str) -> str:
    """How many items sets have, and how they are drawn."""
    counts: Counter[Side] = Counter()
    for one in sets.values():
        counts[one.side] += len(one.groups)
    drawn = drawn_in_words(one.groups for one in sets.values())
    return f"{counts['upstream']} upstream and {counts['downstream']} downstream {which} {drawn}"


def told_estimate(estimate: Estimate | None, sign: str = "") -> str:
    """A number with its interval."""
    if estimate is None:
        return "–"
    value, low, high = (round(number, 1) + 0.0 for number in (estimate.value, estimate.low, estimate.high))  # no -0.0
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
