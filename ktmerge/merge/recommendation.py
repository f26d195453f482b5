"""Which three recipes to try on a base and its fine-tunes, and why: rules over what `ktmerge inspect` measures.

Names recipes of the gallery. Loads no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ktmerge.merge.catalogue import NO_DATA, data_of_recipe
from ktmerge.merge.diagnostics.signs import Signs
from ktmerge.merge.diagnostics.table import Table
from ktmerge.recipes import load_recipe
from ktmerge.recipes.overrides import key_of

if TYPE_CHECKING:
    from ktmerge.merge.diagnostics.inspection import Inspection


@dataclass(frozen=True)
class Advice:
    """A recipe of the gallery to try.

    Attributes:
        recipe: its name.
        why: this one, here.
        settings: keys to set, beside what the recipe says.
        sweep: the key to turn, and the values to look at.
    """

    recipe: str
    why: str
    sweep: tuple[str, Sequence[float]]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recommendation:
    """Three recipes and what they were chosen by.

    Attributes:
        prepare: commands that measure what the recipes need, in order; empty if none is needed.
        commands: of each advice, by recipe.
        warnings: of the inspection.
    """

    signs: Signs
    advice: Sequence[Advice]
    prepare: Sequence[str]
    commands: Mapping[str, str]
    warnings: Sequence[str]

    def tables(self) -> Iterator[Table]:
        """What people read: columns, rows and title of each table."""
        yield ["sign", "value", "reading"], [list(row) for row in self.signs.readings()], "what was measured"
        rows = [[one.recipe, one.why, _swept(one)] for one in self.advice]
        yield ["recipe", "why", "turn"], rows, "try these three"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "signs": vars(self.signs),
            "recipes": [
                {
                    "recipe": one.recipe,
                    "why": one.why,
                    "settings": dict(one.settings),
                    "sweep": {"key": one.sweep[0], "values": list(one.sweep[1])},
                    "command": self.commands[one.recipe],
                }
                for one in self.advice
            ],
            "prepare": list(self.prepare),
            "warnings": list(self.warnings),
        }


def recommend(
    found: Inspection, base: str, tuned: Mapping[str, str], *, statistics: bool, rank: float | None = None
) -> Recommendation:
    """Choose three recipes.

    Args:
        found: what `ktmerge inspect` found of these models.
        base: as it is to stand in commands.
        tuned: models by name, likewise.
        statistics: whether data of both sides are at hand.
        rank: share of the directions that hold 90 % of a change, if measured.
    """
    signs = Signs.of(found, statistics, rank)
    advice = [_fit(one, signs) for one in choose(signs)]
    needs = {one.recipe: _need(one.recipe) for one in advice}
    needing = [recipe for recipe, need in needs.items() if need != NO_DATA]
    names = ["base", *tuned] if needing else []
    fisher = any("Fisher" in need for need in needs.values())
    return Recommendation(
        signs,
        advice,
        [_measuring(name, {"base": base, **tuned}[name], fisher) for name in names],
        {one.recipe: _command(one, base, tuned, one.recipe in needing) for one in advice},
        list(found.warnings),
    )


_LAMBDA = "blend.lambda"
_SHARES = (0.3, 0.5, 0.7, 0.9)
_STRENGTHS = (0.3, 1.0, 3.0, 10.0)
_MERGED = (0.6, 0.8, 1.0, 1.2)

LINE = Advice("wise-ft", "one number from base to expert; the line to beat", (_LAMBDA, _SHARES))
RAMP = Advice(
    "lines", "early layers, which hold general skills, go back further than late ones", ("blend.alpha", _SHARES)
)
LARGEST = Advice("trim", "keeps the largest changes alone", ("blend.density", (0.05, 0.1, 0.2, 0.4)))
CLEAN = Advice("dg-hard", "full rank: drop the directions that look like noise", ("blend.scale", (0.5, 0.75, 1.0)))

BACK = Advice("regmean-back", "gives upstream inputs the base's answers back", ("blend.a", _SHARES))
WEIGH = Advice("fisher-back", "holds each weight as firmly as upstream data need it", ("blend.a", _SHARES))

MEAN = Advice("linear", "the experts learned the same: their mean is better than each", (_LAMBDA, (0.6, 0.8, 1.0)))
STOCK = Advice("model-stock", "goes back to the base by how far the experts are apart", (_LAMBDA, (0.8, 0.9, 1.0)))
SPHERE = Advice("karcher", "a mean that keeps the length of the changes", (_LAMBDA, (0.6, 0.8, 1.0)))

FIT = Advice("regmean", "least squares of all outputs at once, the base's too", ("blend.base_weight", _STRENGTHS))

SOLVE = Advice("swudi-a", "no data needed: sums what uses other inputs, averages what shares them", (_LAMBDA, _MERGED))
COMMON = Advice("cts", "something in common: average that, add what each has alone", (_LAMBDA, _MERGED))
SPLIT = Advice("tsv-m", "unrelated changes: each expert gets its own directions in every matrix", (_LAMBDA, _MERGED))
VOTE = Advice("ties", "signs clash less than by chance: what experts agree on can be elected", (_LAMBDA, _MERGED))
SUM = Advice("task-arithmetic", "the plain sum; the line to beat", (_LAMBDA, (0.2, 0.3, 0.5)))


def choose(signs: Signs) -> tuple[Advice, Advice, Advice]:
    """Three recipes, the first to try first."""
    if signs.experts == 1:
        if signs.statistics:
            return BACK, WEIGH, LINE
        return (LINE, RAMP, LARGEST) if signs.low_rank or signs.sparse else (LINE, CLEAN, RAMP)
    if signs.alike:
        return MEAN, STOCK, SPHERE
    if signs.statistics:
        return BACK, FIT, SOLVE
    return SOLVE, COMMON if signs.related else SPLIT, SUM if signs.contrary else VOTE


def _fit(one: Advice, signs: Signs) -> Advice:
    """The advice with the settings that the signs ask for, and weaker values where a model moved far."""
    settings = dict(one.settings)
    if signs.fine:
        settings["output.rounding"] = "stochastic"
    key, values = one.sweep
    if signs.far and key == _LAMBDA:
        values = [round(value / 2, 3) for value in values]
    return Advice(one.recipe, one.why, (key, values), settings)


def _need(recipe: str) -> str:
    blend = load_recipe(recipe).blend
    return NO_DATA if blend is None else data_of_recipe(blend)


def _measuring(name: str, model: str, fisher: bool) -> str:
    data = "UPSTREAM.jsonl" if name == "base" else f"{name.upper()}.jsonl"
    words = ["ktmerge", "stats", model, "--data", data, "--out", f"stats/{name}"]
    return shlex.join([*words, "--fisher", "empirical"] if fisher else words)


def _command(one: Advice, base: str, tuned: Mapping[str, str], measured: bool) -> str:
    key, values = one.sweep
    middle = values[len(values) // 2]
    words = ["ktmerge", "blend", "--recipe", one.recipe, "--base", base]
    for name, model in tuned.items():
        words += ["--expert", f"{name}={model}"]
    if measured:
        words += ["--set", "statistics=stats/base"]
        for name in tuned:
            words += ["--set", f"{key_of('experts', name, 'statistics')}=stats/{name}"]
    for setting, value in {**one.settings, key: middle}.items():
        words += ["--set", f"{setting}={value:g}" if isinstance(value, float) else f"{setting}={value}"]
    return shlex.join([*words, "--out", f"blended-{one.recipe}"])


def _swept(one: Advice) -> str:
    key, values = one.sweep
    return f"{key} {', '.join(f'{value:g}' for value in values)}"
