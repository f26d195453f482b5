"""The numbers that decide: E, F, O, H, retention, worst upstream set; each with its formula and a paired interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ktmerge.eval.statistics import harmonic_mean, interval, normal_means, resampled_means, without_dust
from ktmerge.recipes.suites import Side

if TYPE_CHECKING:
    from numpy.typing import NDArray

# d, u: a model's mean score over downstream and upstream sets, 0-100; d0, u0: the base's. After arXiv 2503.04543, whose
# page gives O = E + F; that E and F are means of differences, tuned minus base, is our reading.
FORMULAS: dict[str, str] = {
    "E": "E = mean over downstream sets of (score - base score)",
    "F": "F = mean over upstream sets of (score - base score); below 0: forgotten",
    "O": "O = E + F",
    "avg": "Avg = (d + u) / 2",
    "H": "H = 2 d u / (d + u)",
    "retention": "kept = 100 u / u of the base",
    "gain_share": "gain share = 100 (d - d of the base) / (d of the reference - d of the base)",
    "worst": "worst = smallest of (score - base score) over upstream sets",
    "means": "d, u: mean score over downstream, upstream sets",
}
COMPARED = ("E", "F", "O", "H")


@dataclass(frozen=True)
class Estimate:
    """A number on 0-100 (or a difference of such) and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Worst:
    """The upstream set that lost most. The interval is that set's own; it does not know that the set was picked."""

    task: str
    difference: Estimate


@dataclass(frozen=True)
class ModelSummary:
    """One model against the base. None: the suite lacks the side it needs, or the number is not defined.

    Attributes:
        differences: score minus base score of each task.
    """

    d: Estimate | None
    u: Estimate | None
    E: Estimate | None
    F: Estimate | None
    O: Estimate | None
    avg: Estimate | None
    H: Estimate | None
    retention: Estimate | None
    gain_share: Estimate | None
    worst: Worst | None
    differences: dict[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """A - B for two models: in E, F, O, H (those that the suite defines), and in the score of each task."""

    numbers: dict[str, Estimate]
    tasks: dict[str, Estimate]


@dataclass(frozen=True)
class Sequential:
    """What later tunings did to sets learned earlier; R[i, j]: score after stage i on the set of stage j.

    Attributes:
        bwt: backward transfer, mean over earlier sets of R[last, j] - R[j, j] (arXiv 1706.08840, eq. 3).
        forgetting: mean over earlier sets of the best score any stage before the last reached, minus R[last, j]
            (arXiv 1801.10112, section 3).
        scores: R, 0-100, rows are stages.
    """

    bwt: Estimate
    forgetting: Estimate
    scores: list[list[float]]
    stages: dict[str, str]

    def table(self) -> tuple[list[str], list[list[str]], str]:
        """Columns, rows and a title: the scores after each stage, then what they come to, formulas beside."""
        rows = [
            [model, *(f"{score:.1f}" for score in row)] for model, row in zip(self.stages, self.scores, strict=True)
        ]
        said = {"bwt": self.bwt, "forgetting": self.forgetting}
        lines = [
            f"{SEQUENCE_FORMULAS[key]}: {one.value:+.1f} [{one.low:+.1f}, {one.high:+.1f}]" for key, one in said.items()
        ]
        return ["after", *self.stages.values()], rows, "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "formulas": SEQUENCE_FORMULAS}


SEQUENCE_FORMULAS = {
    "bwt": "BWT = mean over earlier sets of (score after the last stage - score right after the set was learned)",
    "forgetting": "forgetting = mean over earlier sets of (best score at an earlier stage - score after the last)",
}

Samples = dict[str, "NDArray[np.float64]"]


class Summary:
    """The summaries of all models. ``samples`` hold, per model and quantity, the value and then its resamples."""

    def __init__(self, samples: dict[str, Samples], sides: Mapping[str, Side]) -> None:
        self._samples = samples
        self._sides = sides
        self.models = {name: self._of(one) for name, one in samples.items()}

    def difference(self, a: str, b: str) -> Comparison:
        """A - B, resampled together."""
        first, second = self._samples[a], self._samples[b]
        return Comparison(
            {key: _estimate(first[key] - second[key]) for key in COMPARED if key in first},
            {task: _estimate(first[f"task {task}"] - second[f"task {task}"]) for task in self._sides},
        )

    def ranked(self, names: Iterable[str]) -> list[str]:
        """Models by O, best first; where the suite has one side only, by E or F."""

        def overall(name: str) -> float:
            one = self.models[name]
            decisive = one.O or one.E or one.F
            return decisive.value if decisive else 0.0

        return sorted(names, key=overall, reverse=True)

    def sequence(self, stages: Mapping[str, str]) -> Sequential:
        """Backward transfer and forgetting of models tuned one after the other, each on the set named with it."""
        R = np.array([[self._samples[model][f"task {task}"] for task in stages.values()] for model in stages])
        last, earlier = len(R) - 1, range(len(R) - 1)
        bwt = np.mean([R[last, j] - R[j, j] for j in earlier], axis=0)
        forgetting = np.mean([R[:last, j].max(axis=0) - R[last, j] for j in earlier], axis=0)
        return Sequential(_estimate(bwt), _estimate(forgetting), R[:, :, 0].tolist(), dict(stages))

    def _of(self, samples: Samples) -> ModelSummary:
        differences = {name: _estimate(samples[f"gain {name}"]) for name in self._sides}
        upstream = [name for name, side in self._sides.items() if side == "upstream"]
        worst = min(upstream, key=lambda name: differences[name].value, default=None)
        estimates = {
            key: _estimate(samples[key]) if key in samples else None
            for key in ("d", "u", "E", "F", "O", "avg", "H", "retention", "gain_share")
        }
        return ModelSummary(
            **estimates,
            worst=None if worst is None else Worst(worst, differences[worst]),
            differences=differences,
        )


def summarise(
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]],
    sides: Mapping[str, Side],
    *,
    totals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    base: str = "base",
    reference: str | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Summary:
    """Summarise item scores.

    Args:
        scores: per model and task, the item scores [items] in [0, 1]; the same items for all models.
        sides: of each task.
        totals: of tasks without item scores, every model's score and standard error on 0-100; drawn from normals, each
            model by itself, since nothing tells what models share.
        groups: of tasks whose items are not independent, what each item is drawn with, such as the text a chunk is of.
        base: the untuned model.
        reference: the model whose gain is the whole of the gain share, usually the full fine-tune.
        bootstrap: resamples behind each interval.
        seed: of the resamples.
    """
    names = list(scores)
    whole = totals or {}
    stacked = {task: np.stack([scores[name][task] for name in names]) for task in sides if task not in whole}
    resampled = resampled_means(stacked, bootstrap, seed, groups)
    means = {
        task: np.concatenate([100 * stacked[task].mean(axis=1, keepdims=True), resampled[task]], axis=1)
        for task in stacked
    } | normal_means(whole, bootstrap, seed)  # per task [models, 1 + resamples]; what is measured stands first
    by_model = {name: {task: means[task][i] for task in sides} for i, name in enumerate(names)}
    target = by_model.get(reference) if reference is not None else None
    return Summary({name: _quantities(by_model[name], by_model[base], target, sides) for name in names}, sides)


def _quantities(own: Samples, base: Samples, reference: Samples | None, sides: Mapping[str, Side]) -> Samples:
    """All quantities of one model, elementwise over the value and its resamples."""
    found: Samples = {f"task {task}": own[task] for task in sides}
    found |= {f"gain {task}": own[task] - base[task] for task in sides}
    d, u = _mean(own, sides, "downstream"), _mean(own, sides, "upstream")
    d0, u0 = _mean(base, sides, "downstream"), _mean(base, sides, "upstream")
    if d is not None and d0 is not None:
        found |= {"d": d, "E": d - d0}
        full = None if reference is None else _mean(reference, sides, "downstream")
        if full is not None and full[0] > d0[0]:
            found["gain_share"] = 100 * _ratio(d - d0, full - d0)
    if u is not None and u0 is not None:
        found |= {"u": u, "F": u - u0}
        if u0[0] > 0:
            found["retention"] = 100 * _ratio(u, u0)
    if d is not None and u is not None:
        found |= {"O": found["E"] + found["F"], "avg": (d + u) / 2, "H": harmonic_mean(d, u)}
    return found


def _mean(means: Samples, sides: Mapping[str, Side], side: Side) -> NDArray[np.float64] | None:
    chosen = [means[task] for task, where in sides.items() if where == side]
    return np.mean(chosen, axis=0) if chosen else None


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Elementwise; where a resample's denominator is 0 the measured one stands in, so that no interval is undefined."""
    return numerator / np.where(denominator == 0, denominator[0], denominator)


def _estimate(samples: NDArray[np.float64]) -> Estimate:
    low, high = interval(samples[1:])
    return Estimate(without_dust(samples[0]), low, high)
