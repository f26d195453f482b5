"""What was measured: every item's score for every model, with all that is needed to trust it; JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.checkpoints.files import write_whole
from ktmerge.errors import UsageError, did_you_mean
from ktmerge.eval import statistics
from ktmerge.eval.metrics import bits_per_byte, perplexity_per_byte, perplexity_per_token, perplexity_per_word
from ktmerge.eval.partition import FORMULAS as PARTITION_FORMULAS
from ktmerge.eval.partition import Partition, Triple, partition
from ktmerge.eval.significance import McNemar, mcnemar
from ktmerge.eval.summary import FORMULAS, Comparison, Sequential, Summary, summarise
from ktmerge.recipes.suites import Side

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ktmerge.eval.table import DifferencesTable, ScoreTable

SCHEMA_VERSION = 1
RIGHT_OR_WRONG = ("acc", "acc_norm", "exact_match", "relaxed_accuracy")  # metrics with nothing between
LARGEST = {"cider": 10.0}  # item score of metrics that go beyond 1


@dataclass(frozen=True)
class TaskInfo:
    """One set of the suite, as it was scored.

    Attributes:
        rows: the data file's row (from 0) of each item; a row of text may give several.
        prompts: of each item, as written in the suite (not for text tasks).
        references: index of the right choice, or the reference answer (not for text tasks).
        truncated: items whose prompt was cut to fit the model; skipped: rows too short to score.
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
    truncated: int = 0
    skipped: int = 0


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
        details: columns by name, one entry an item. choice: ``logprobs``; classify: ``predicted``, too; generate:
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

    @property
    def stderr(self) -> float | None:
        """On 0-100; None for a single item."""
        if self.total is not None:
            return self.total[1]
        return statistics.standard_error(self.scores)

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
            "score": self.mean, "stderr": self.stderr, **self.extras(), "signature": self.signature,
            "figures": self.figures, "scores": self.scores.tolist(), "details": self.details,
            **({} if self.total is None else {"total": list(self.total)}),
        }  # fmt: skip

    @classmethod
    def from_json(cls, one: dict[str, Any]) -> TaskScore:
        return cls(
            np.array(one["scores"], dtype=float), dict(one["details"]),
            dict(one.get("figures", {})), str(one.get("signature", "")), _total(one.get("total")),
        )  # fmt: skip


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
            base=self.base, reference=self.reference, bootstrap=self.bootstrap, seed=self.seed,
        )  # fmt: skip

    def sides(self, side: Side) -> list[TaskInfo]:
        """The tasks of one side, in suite order."""
        return [task for task in self.tasks if task.side == side]

    def paired(self, side: Side | None = None) -> list[TaskInfo]:
        """The tasks whose items were scored; not those of which only totals were imported."""
        return [task for task in self.tasks if task.rows and side in (None, task.side)]

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
        counted = [one.name for one in self.paired() if one.metric.split(",")[0] in RIGHT_OR_WRONG]
        return {name: mcnemar(self.scores[a][name].scores, self.scores[b][name].scores) for name in counted}

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
            "differences": [
                {
                    "a": a, "b": b, **{key: asdict(one) for key, one in self.difference(a, b).numbers.items()},
                    "tasks": {task: asdict(one) for task, one in self.difference(a, b).tasks.items()},
                    "mcnemar": {task: asdict(one) for task, one in self.mcnemar(a, b).items()},
                }
                for a, b in self.pairs()
            ],
            "cautions": self.cautions,
            "versions": self.versions,
            "warnings": self.warnings,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the JSON file, whole or not at all.

        Raises:
            KtmergeError: it cannot be written.
        """
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False)
        write_whole(Path(path), text + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a score file.

        Raises:
            UsageError: it is missing, or not what :meth:`save` wrote.
        """
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}.") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{path}: not a score file of 'ktmerge eval' (not JSON).") from None
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
            results = cls(**_parse(document), source=where)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{where}: a damaged score file: {type(error).__name__}: {error}.") from None
        results._check(where)
        return results

    def _model_json(self, name: str) -> dict[str, Any]:
        tasks = {task: score.to_json() for task, score in self.scores[name].items()}
        summary = self.summary.models[name].to_json()
        shares = self.partition(name)
        if shares is not None:
            summary["partition"] = asdict(shares)
        return {**asdict(self.models[name]), "summary": summary, "tasks": tasks}

    def _known(self, name: str) -> None:
        if name not in self.models:
            raise UsageError(f"no model called '{name}' was scored.{did_you_mean(name, self.models)}")

    def _check(self, where: str) -> None:
        names = [task.name for task in self.tasks]
        if self.base not in self.models or not names:
            raise UsageError(f"{where}: a damaged score file: no base, or no tasks.")
        for model, tasks in self.scores.items():
            if list(tasks) != names:
                raise UsageError(f"{where}: a damaged score file: the tasks of '{model}' are not the suite's.")
            for task in self.tasks:
                scores = tasks[task.name].scores
                within = bool(((scores >= 0) & (scores <= LARGEST.get(task.metric, 1.0))).all())
                whole = tasks[task.name].total is not None
                good = scores.shape == (len(task.rows),) and within and whole != bool(len(scores))
                if not good:
                    raise UsageError(f"{where}: a damaged score file: scores of '{model}' on '{task.name}'.")


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


def _parse(document: dict[str, Any]) -> dict[str, Any]:
    models = document["models"]
    return {
        "suite": str(document["suite"]["name"]),
        "suite_digest": str(document["suite"]["digest"]),
        "tasks": [TaskInfo(**task) for task in document["suite"]["tasks"]],
        "models": {name: ModelInfo(**{key: one[key] for key in _keys(ModelInfo)}) for name, one in models.items()},
        "scores": {name: _scores(one["tasks"]) for name, one in models.items()},
        "created": str(document["created"]),
        "versions": dict(document["versions"]),
        "warnings": list(document["warnings"]),
        **{key: document["settings"][key] for key in ("base", "reference", "bootstrap", "seed")},
        "part": str(document["settings"].get("part", "all")),
    }


def _total(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))


def _scores(tasks: dict[str, Any]) -> dict[str, TaskScore]:
    return {name: TaskScore.from_json(one) for name, one in tasks.items()}


def _keys(model: type[ModelInfo]) -> Sequence[str]:
    return [one.name for one in fields(model)]
