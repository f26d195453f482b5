"""Choosing each blend's coefficient on the selection split: one loaded model, blended in place, scored, blended anew.

What is chosen here is reported on other items.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.files import write_whole
from ktmerge.errors import KtmergeError
from ktmerge.eval.results import PathPoint
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.schema import Recipe
from ktmerge.recipes.suites import Suite

if TYPE_CHECKING:
    from ktmerge.eval import TaskScore
    from ktmerge.eval.sets import TaskSet


@dataclass(frozen=True)
class Selection:
    """The way of one recipe's coefficient over the selection split, the base (0) included."""

    points: list[PathPoint]

    @property
    def best(self) -> float:
        """The coefficient with the largest O = E + F; of equals the smallest, which is nearest to the base."""
        return max(sorted(self.points, key=lambda p: p.coefficient), key=lambda p: p.E + p.F).coefficient

    @property
    def shown(self) -> float:
        """The best one; where the base itself was best, the smallest tried, so that there is a blend to look at."""
        return self.best or min(p.coefficient for p in self.points if p.coefficient)


def select(
    recipes: Mapping[str, Recipe],
    coefficients: Mapping[str, Sequence[float]],
    suite: Suite,
    base: Path,
    record: Path,
    progress: Progress = SILENT,
) -> dict[str, Selection]:
    """Score every coefficient of every recipe on ``suite``.

    Args:
        recipes: by name; all with the same base.
        coefficients: the values of ``blend.lambda`` to try, by recipe name.
        suite: the selection split.
        base: the base checkpoint, which the recipes name too.
        record: JSON file that keeps the points; if it was made of the same inputs, nothing is scored.
        progress: where to report to.

    Raises:
        UsageError: a recipe or the suite is wrong.
        KtmergeError: a blend or a score failed.
    """
    from ktmerge.eval import read_sets

    sets = read_sets(suite)
    digest = _digest(recipes, coefficients, sets, base, progress)
    if (kept := _read(record, digest)) is not None:
        progress.note(f"{record.name}: the coefficients are already chosen on these models; kept")
        return kept
    found = _score_all(recipes, coefficients, sets, base, progress)
    document = {"inputs": digest, "paths": {name: [asdict(p) for p in one.points] for name, one in found.items()}}
    write_whole(record, json.dumps(document, indent=2) + "\n")
    return found


def at(recipe: Recipe, coefficient: float) -> Recipe:
    """The recipe with another ``blend.lambda``."""
    if recipe.blend is None:
        raise KtmergeError(f"the recipe '{recipe.name}' has no blend section.")
    return recipe.model_copy(update={"blend": recipe.blend.model_copy(update={"lambda_": coefficient})})


def rewrite(text: str, coefficient: float) -> str:
    """A recipe's YAML text with another ``blend.lambda``, everything else, comments too, as it stands."""
    changed, count = re.subn(r"(?m)^(  lambda: )\S+", rf"\g<1>{coefficient:g}", text)
    if count != 1:
        raise KtmergeError(f"a recipe of the demo has {count} lines 'lambda:' under blend; one is needed.")
    return changed


def _score_all(
    recipes: Mapping[str, Recipe],
    coefficients: Mapping[str, Sequence[float]],
    sets: Sequence[TaskSet],
    base: Path,
    progress: Progress,
) -> dict[str, Selection]:
    import torch

    from ktmerge.checkpoints.checkpoint import Checkpoint
    from ktmerge.checkpoints.limits import context_length
    from ktmerge.eval import encode_sets, score_model
    from ktmerge.eval.loading import choose_device, choose_dtype, load_model, load_tokenizer
    from ktmerge.merge import blend_into
    from ktmerge.merge.pristine import Pristine

    device = choose_device("auto")
    model, tokenizer = load_model(base, device, choose_dtype(device)), load_tokenizer(base)
    encoded = encode_sets(sets, tokenizer, context_length(Checkpoint.open(base).config))

    def score(label: str) -> dict[str, TaskScore]:
        return score_model(model, tokenizer, sets, encoded=encoded, progress=progress, label=label)

    untuned = score("base")
    found: dict[str, Selection] = {}
    sources = Pristine()
    with torch.inference_mode(False):
        for name, recipe in recipes.items():
            points = [PathPoint(0.0, 0.0, 0.0)]
            for coefficient in coefficients[name]:
                blend_into(model, at(recipe, coefficient), sources, progress=progress)
                gain, change = _gains(score(f"{name}, lambda {coefficient:g}"), untuned, sets)
                points.append(PathPoint(coefficient, gain, change))
                progress.note(
                    f"  {name}, lambda {coefficient:g}: E {gain:+.1f}, F {change:+.1f}, O {gain + change:+.1f}"
                )
            found[name] = Selection(points)
    return found


def _gains(
    scores: Mapping[str, TaskScore], untuned: Mapping[str, TaskScore], sets: Sequence[TaskSet]
) -> tuple[float, float]:
    """E and F: mean difference from the base over the downstream and over the upstream sets."""

    def mean(side: str) -> float:
        names = [one.task.name for one in sets if one.side == side]
        return sum(scores[name].mean - untuned[name].mean for name in names) / len(names)

    return mean("downstream"), mean("upstream")


def _digest(
    recipes: Mapping[str, Recipe],
    coefficients: Mapping[str, Sequence[float]],
    sets: Sequence[TaskSet],
    base: Path,
    progress: Progress,
) -> str:
    """sha256 over everything the points depend on: weights, recipes, coefficients, items."""
    from ktmerge.checkpoints.checkpoint import Checkpoint
    from ktmerge.checkpoints.hub import resolve

    folders = {resolve(expert.model, one.folder) for one in recipes.values() for expert in one.experts.values()}
    inputs: list[Any] = [
        [Checkpoint.open(folder).content_digest(progress) for folder in [base, *sorted(folders)]],
        {name: one.model_dump(mode="json", by_alias=True) for name, one in recipes.items()},
        {name: list(values) for name, values in coefficients.items()},
        [one.digest for one in sets],
    ]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _read(record: Path, digest: str) -> dict[str, Selection] | None:
    try:
        document = json.loads(record.read_text(encoding="utf-8"))
        if document["inputs"] != digest:
            return None
        return {name: Selection([PathPoint(**p) for p in points]) for name, points in document["paths"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
