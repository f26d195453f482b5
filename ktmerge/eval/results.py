"""What was measured: every item's score for every model, with all that is needed to trust it; JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.checkpoints.files import write_whole
from ktmerge.checkpoints.regular import once
from ktmerge.errors import UsageError, did_you_mean, first_line
from ktmerge.eval.partition import FORMULAS as PARTITION_FORMULAS
from ktmerge.eval.partition import Partition, Triple, partition
from ktmerge.eval.score_files import parse
from ktmerge.eval.scores import ModelInfo, TaskInfo, TaskScore
from ktmerge.eval.significance import McNemar, mcnemar
from ktmerge.eval.soundness import check, damaged
from ktmerge.eval.statistics import drawn_in_words, standard_error
from ktmerge.eval.summary import FORMULAS, Comparison, Sequential, Summary, summarise
from ktmerge.recipes.suites import Side

if TYPE_CHECKING:
    from ktmerge.eval.table import DifferencesTable, ScoreTable

SCHEMA_VERSION = 1
RIGHT_OR_WRONG = ("acc", "acc_norm", "exact_match", "relaxed_accuracy", "prompt_strict", "prompt_loose")
"""Metrics with nothing between; some harnesses give parts of a point under the same names, which are left out."""


@dataclass(frozen=True)
class Results:
    """Scores of a base and other models on the same items."""

    suite: str
    suite_digest: str
    tasks: list[TaskInfo]
    models: dict[str, ModelInfo]
    scores: dict[str, dict[str, TaskScore]]
    base: str = "base"
    reference: str | None = None
    bootstrap: int = 2000
    seed: int = 0
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    part: str = "all"
    source: str | None = field(default=None, compare=False)

    @cached_property
    def summary(self) -> Summary:
        """E, F, O, H and the rest with intervals; computed from the item scores."""
        return summarise(
            {name: {task: score.scores for task, score in tasks.items()} for name, tasks in self.scores.items()},
            {task.name: task.side for task in self.tasks}, totals=self._totals(),
            groups={task.name: task.groups for task in self.tasks},
            base=self.base, reference=self.reference, bootstrap=self.bootstrap, seed=self.seed,
        )  # fmt: skip

    def sides(self, side: Side) -> list[TaskInfo]:
        """The tasks of one side, in suite order."""
        return [task for task in self.tasks if task.side == side]

    def paired(self, side: Side | None = None) -> list[TaskInfo]:
        """The tasks whose items were scored; not those of which only totals were imported."""
        return [task for task in self.tasks if task.rows and side in (None, task.side)]

    def stderr(self, model: str, task: TaskInfo) -> float | None:
        """Of a model's score on a set, on 0-100; None for a single item."""
        score = self.scores[model][task.name]
        return standard_error(score.scores, task.groups) if score.total is None else score.total[1]

    @property
    def drawn(self) -> str:
        """What the bootstrap draws, in words."""
        return drawn_in_words(task.groups for task in self.tasks)

    def _totals(self) -> dict[str, list[tuple[float, float]]]:
        """Per imported set without item scores, every model's score and standard error."""
        found = {task.name: [tasks[task.name].total for tasks in self.scores.values()] for task in self.tasks}
        return {name: [one for one in own if one] for name, own in found.items() if any(own)}

    def difference(self, a: str, b: str) -> Comparison:
        """A - B in E, F, O, H, and in each task, with paired intervals.

        Raises:
            UsageError: no such model.
        """
        for name in (a, b):
            self._known(name)
        return self.summary.difference(a, b)

    def mcnemar(self, a: str, b: str) -> dict[str, McNemar]:
        """McNemar's test of A against B on every set whose items are right or wrong.

        Raises:
            UsageError: no such model.
        """
        for name in (a, b):
            self._known(name)
        return {
            name: mcnemar(self.scores[a][name].scores, self.scores[b][name].scores) for name in self._right_or_wrong
        }

    @cached_property
    def _right_or_wrong(self) -> list[str]:
        tasks = [task for task in self.paired() if task.metric.split(",")[0] in RIGHT_OR_WRONG]
        names = [task.name for task in tasks if len(set(task.groups)) == len(task.rows)]  # McNemar's: independent items
        return [name for name in names if all(np.isin(own[name].scores, (0, 1)).all() for own in self.scores.values())]

    def partition(self, model: str) -> Partition | None:
        """What became of the items that the reference fine-tune changed; None without a reference.

        Raises:
            UsageError: no such model.
        """
        self._known(model)
        if self.reference is None:
            return None
        names = (self.base, self.reference, model)

        def triples(side: Side) -> list[Triple]:
            base, tuned, own = ([self.scores[name][task.name].scores for task in self.paired(side)] for name in names)
            return list(zip(base, tuned, own, strict=True))

        return partition(triples("upstream"), triples("downstream"))

    def sequence(self, stages: Mapping[str, str]) -> Sequential:
        """Backward transfer along a sequence of tunings: each stage's model and the set it learned, in order.

        Raises:
            UsageError: no such model or set, or fewer than two stages.
        """
        known = [task.name for task in self.tasks]
        for name, task in stages.items():
            self._known(name)
            if task not in known:
                raise UsageError(f"no set called '{task}' was scored.{did_you_mean(task, known)}")
        if len(stages) < 2:
            raise UsageError("a sequence needs at least two stages, as in --sequence first=sums,second=dates.")
        return self.summary.sequence(stages)

    @cached_property
    def cautions(self) -> list[str]:
        """What to keep in mind when reading the scores."""
        from ktmerge.eval.cautions import cautions

        return cautions(self)

    def pairs(self) -> list[tuple[str, str]]:
        """Every two models that are not the base, in table order."""
        return list(combinations([name for name in self.models if name != self.base], 2))

    def path(self, models: Mapping[float, str]) -> list[PathPoint]:
        """The way of the blend coefficient through E and F: one point for each coefficient's model.

        Raises:
            UsageError: no such model, or the suite has only one side.
        """
        points = []
        for coefficient, name in sorted(models.items()):
            self._known(name)
            numbers = self.summary.models[name]
            if numbers.E is None or numbers.F is None:
                raise UsageError("a path needs a suite with upstream and downstream tasks.")
            points.append(PathPoint(coefficient, numbers.E.value, numbers.F.value))
        return points

    def table(self) -> ScoreTable:
        """The scores for a terminal; fits itself to the width."""
        from ktmerge.eval.table import ScoreTable

        return ScoreTable(self)

    def differences_table(self) -> DifferencesTable:
        """Every model against every other, for a terminal."""
        from ktmerge.eval.table import DifferencesTable

        return DifferencesTable(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data: the measurements, and the summary for scripts."""
        return {
            "ktmerge_eval": SCHEMA_VERSION,
            "created": self.created,
            "suite": {"name": self.suite, "digest": self.suite_digest, "tasks": [asdict(t) for t in self.tasks]},
            "settings": {
                "base": self.base, "reference": self.reference, "bootstrap": self.bootstrap, "seed": self.seed,
                "part": self.part,
            },
            "formulas": FORMULAS | (PARTITION_FORMULAS if self.reference is not None else {}),
            "models": {name: self._model_json(name) for name in self.models},
            "differences": [self._pair_json(a, b) for a, b in self.pairs()],
            "cautions": self.cautions,
            "versions": self.versions,
            "warnings": self.warnings,
        }  # fmt: skip

    def save(self, path: Path, *, overwrite: bool = True) -> None:
        """Write the JSON file, whole or not at all.

        Raises:
            UsageError: it is there, and not to be overwritten.
            KtmergeError: it cannot be written.
        """
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False)
        write_whole(Path(path), text + "\n", replace=overwrite)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a score file.

        Raises:
            UsageError: it is missing, or not what :meth:`save` wrote.
        """
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{path}: not a score file of 'ktmerge eval', or cut off: {first_line(error).rstrip('.')}."
            ) from None
        return cls.from_json(document, str(path))

    @classmethod
    def from_json(cls, document: Any, where: str) -> Results:
        """Read what :meth:`to_json` gives; ``where`` names it in messages.

        Raises:
            UsageError: it is something else.
        """
        if not isinstance(document, dict) or "ktmerge_eval" not in document:
            raise UsageError(f"{where}: not a score file of 'ktmerge eval'.")
        version = document["ktmerge_eval"]
        if version != SCHEMA_VERSION:
            raise UsageError(f"{where}: score file version {version!r}; this ktmerge reads {SCHEMA_VERSION}.")
        try:
            results = cls(**parse(document), source=where)
            means = {model: {name: own["score"] for name, own in one["tasks"].items()}
                     for model, one in document["models"].items()}  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise damaged(where, f"{type(error).__name__}: {error}") from None
        check(results, means, where)
        try:
            json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise damaged(where, f"it holds what no JSON has ({first_line(error)})") from None
        return results

    def _model_json(self, name: str) -> dict[str, Any]:
        own = self.scores[name]
        tasks = {task.name: {**own[task.name].to_json(), "stderr": self.stderr(name, task)} for task in self.tasks}
        summary = self.summary.models[name].to_json()
        shares = self.partition(name)
        if shares is not None:
            summary["partition"] = asdict(shares)
        return {**asdict(self.models[name]), "summary": summary, "tasks": tasks}

    def _pair_json(self, a: str, b: str) -> dict[str, Any]:
        found = self.difference(a, b)
        return {
            "a": a, "b": b, **{key: asdict(one) for key, one in found.numbers.items()},
            "tasks": {task: asdict(one) for task, one in found.tasks.items()},
            "mcnemar": {task: asdict(one) for task, one in self.mcnemar(a, b).items()},
        }  # fmt: skip

    def _known(self, name: str) -> None:
        if name not in self.models:
            raise UsageError(f"no model called '{name}' was scored.{did_you_mean(name, self.models)}")


@dataclass(frozen=True)
class PathPoint:
    """Where a blend with this coefficient comes to lie, in points on 0-100."""

    coefficient: float
    E: float
    F: float


@dataclass(frozen=True)
class Generation:
    """What each model answers to one prompt, greedily."""

    prompt: str
    outputs: dict[str, str]
    note: str = ""
