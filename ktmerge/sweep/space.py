"""What a sweep turns: ranges over keys of a recipe, and methods; and the recipe at each point. Loads no torch."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktmerge.errors import KtmergeError, UsageError, did_you_mean
from ktmerge.merge.planning import plan_blend
from ktmerge.merge.settings import blend_setting, parameter_names
from ktmerge.recipes.document import parse_yaml
from ktmerge.recipes.load import FIXED_BLEND_KEYS, parse_recipe
from ktmerge.recipes.overrides import key_of, set_key, steps_of
from ktmerge.recipes.schema import Blend, Recipe

METHOD, MEMBER = "blend.method", "member."
"""Keys of a point that are not of the recipe: the method; before an expert's name, whether it is in."""
_KINDS = ("log", "int")

Value = float | int | str | bool
Point = dict[str, Value]
"""A value for every knob, by key."""


@dataclass(frozen=True)
class Range:
    """A key of the recipe and the values it may have: from ``low`` to ``high``, or one of ``choices``."""

    key: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    choices: tuple[Value, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read ``key=low:high``, ``key=low:high:log``, ``key=low:high:int`` or ``key=a|b|c``.

        A key that does not begin with ``blend`` or ``experts`` is one of the blend section.

        Raises:
            UsageError: written otherwise, or an empty range.
        """
        key, equals, values = text.partition("=")
        steps = steps_of(key)
        if not equals or not steps:
            raise UsageError(f"--range {text}: write key=low:high, e.g. --range blend.lambda=0:1.2, or key=a|b|c.")
        key = key_of(*(steps if steps[0] in ("blend", "experts") else ["blend", *steps]))
        if "|" in values:
            choices = tuple(parse_yaml(one, f"--range {text}") for one in values.split("|"))
            if not all(isinstance(one, float | int | str | None) for one in choices):
                raise UsageError(f"--range {text}: choices are numbers, words, true, false or null.")
            return cls(key, choices=tuple(dict.fromkeys(choices)))
        low, *rest = values.split(":")
        try:
            ends = float(low), float(rest[0])
        except (ValueError, IndexError):
            raise UsageError(f"--range {text}: write two numbers, low:high, or choices, a|b|c.") from None
        wrong = [kind for kind in rest[1:] if kind not in _KINDS]
        if wrong:
            raise UsageError(f"--range {text}: '{wrong[0]}' is no kind of range.{did_you_mean(wrong[0], _KINDS)}")
        if not (math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
            raise UsageError(f"--range {text}: the first number must be below the second, and both finite.")
        if "log" in rest and ends[0] <= 0:
            raise UsageError(f"--range {text}: a range in equal factors must begin above 0.")
        if "int" in rest and not (ends[0].is_integer() and ends[1].is_integer()):
            raise UsageError(f"--range {text}: the ends of whole numbers must be whole.")
        return cls(key, *ends, log="log" in rest, integer="int" in rest)

    def ends(self) -> tuple[Value, ...]:
        """The outermost values, or all choices."""
        return self.choices or (self.value(self.low), self.value(self.high))

    def value(self, number: float) -> Value:
        """As it stands in a recipe."""
        return round(number) if self.integer else float(number)

    def at(self, share: float) -> Value:
        """The value at a share of the way from low to high, in [0, 1]."""
        if self.choices:
            return self.choices[min(len(self.choices) - 1, int(share * len(self.choices)))]
        if self.log:
            number = self.low * (self.high / self.low) ** share
        else:
            number = self.low + share * (self.high - self.low)
        return self.value(min(max(number, self.low), self.high))  # not beyond it by rounding

    def evenly(self, count: int) -> list[Value]:
        """``count`` values in equal steps (factors), ends included; all choices if there are choices."""
        if self.choices:
            return list(self.choices)
        values = [self.at(i / (count - 1)) for i in range(count)] if count > 1 else [self.at(0.5)]
        return list(dict.fromkeys(values))


class Space:
    """All points of a sweep.

    Args:
        recipe: what is not turned.
        ranges: what is.
        methods: tried each; empty: the recipe's.

    Raises:
        UsageError: everything that is wrong, one per line; inputs are opened, too.
    """

    def __init__(self, recipe: Recipe, ranges: Sequence[Range], methods: Sequence[str] = ()) -> None:
        self.recipe, self.ranges, self.methods = recipe, tuple(ranges), tuple(methods)
        self._document = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
        self._document["ktmerge"] = recipe.ktmerge
        if recipe.blend is None:
            raise UsageError(f"the recipe '{recipe.name}' has no blend section; there is nothing to sweep.")
        if not ranges and len(self.methods) < 2:
            raise UsageError("nothing to sweep: give --range, e.g. --range blend.lambda=0:1.2, or several --method.")
        keys = [one.key for one in ranges]
        twice = [key for key in keys if keys.count(key) > 1 or key == METHOD]
        if twice:
            hint = "use --method" if twice[0] == METHOD else "give one range for it"
            raise UsageError(f"--range {twice[0]}: {hint}.")
        self._known = {method: _parameters(self._blend(method)) for method in self._names()}
        self._require_used()
        self._require_valid()

    @property
    def knob(self) -> Range | None:
        """The range, if it is all there is to turn and its values are numbers in between."""
        only = len(self.ranges) == 1 and len(self.methods) < 2
        return self.ranges[0] if only and not self.ranges[0].choices else None

    def used(self, point: Mapping[str, Value]) -> Point:
        """A point without the values that its method does not know."""
        method = str(point.get(METHOD, self._names()[0]))
        idle = {one.key for one in self.ranges if not self._applies(one, method)}
        return {key: value for key, value in point.items() if key not in idle}

    def recipe_at(self, point: Mapping[str, Value]) -> Recipe:
        """The recipe with the point's values; values the point's method does not know are left out.

        Raises:
            UsageError: a value is not valid.
        """
        method = str(point.get(METHOD, self._names()[0]))
        document = self._written(method)
        for one in self.ranges:
            if self._applies(one, method):
                set_key(document, one.key, point[one.key], f"--range {one.key}")
        return parse_recipe(document, f"{self.recipe.name}, {told(point)}", self.recipe.folder)

    def grid(self, most: int) -> list[Point]:
        """The finest grid of at most ``most`` different recipes, ends included; at least two values a range.

        Raises:
            UsageError: there is none so small.
        """
        found: list[Point] = []
        for count in itertools.count(2):
            axes = {one.key: one.evenly(count) for one in self.ranges}
            grids = [self._axes(method, axes) for method in self._names()]
            size = sum(math.prod(map(len, grid)) for grid in grids)
            if size > most or size <= len(found):
                break
            found = [dict(values) for grid in grids for values in itertools.product(*grid)]
        if not found:
            raise UsageError(
                f"--trials {most}: the coarsest grid of these ranges has {size} recipes; allow as many, give fewer "
                "ranges, or choose another --sampler."
            )
        return found

    def _axes(self, method: str, axes: Mapping[str, Sequence[Value]]) -> list[list[tuple[str, Value]]]:
        """Every key with its values, of ranges that a method does not know one alone; the method, if that is turned."""
        own: list[list[tuple[str, Value]]] = [[(METHOD, method)]] if len(self.methods) > 1 else []
        for one in self.ranges:
            values = axes[one.key] if self._applies(one, method) else axes[one.key][:1]
            own.append([(one.key, value) for value in values])
        return own

    def _names(self) -> Sequence[str]:
        return self.methods or (str(self._document["blend"].get("method", "stages")),)

    def _written(self, method: str) -> dict[str, Any]:
        """The recipe's document, to be changed, with a method."""
        document: dict[str, Any] = json.loads(json.dumps(self._document))
        document["blend"] = json.loads(json.dumps(self._blend(method)))
        return document

    def _blend(self, method: str) -> dict[str, Any]:
        """The blend section with another method: without the parameters that are not its own, nor the old lambda."""
        own: dict[str, Any] = self._document["blend"]
        if not self.methods or method == own.get("method"):
            return dict(own)
        known = _parameters({"method": method})
        kept = {key: value for key, value in own.items() if key in known or key == "where"}
        return {"method": method, **kept}

    def _applies(self, one: Range, method: str) -> bool:
        steps = steps_of(one.key)
        own = len(steps) == 2 and steps[0] == "blend" and steps[1] not in FIXED_BLEND_KEYS
        return not own or steps[1] in self._known[method]

    def _require_used(self) -> None:
        for one in self.ranges:
            steps = steps_of(one.key)
            if steps[0] == "experts" and steps[-1] != "weight":
                raise UsageError(
                    f"--range {one.key}: of experts only weights are turned, experts.NAME.weight; what they are is the "
                    "recipe's."
                )
            if steps[0] == "experts" and len(steps) == 3 and steps[1] not in self.recipe.experts:
                name = str(steps[1])
                raise UsageError(
                    f"--range {one.key}: there is no expert '{name}'.{did_you_mean(name, self.recipe.experts)}"
                )
            if not any(self._applies(one, method) for method in self._names()):
                name = str(steps[-1])
                known = {*FIXED_BLEND_KEYS, *(key for keys in self._known.values() for key in keys)}
                methods = ", ".join(self._names())
                raise UsageError(f"--range {one.key}: {methods} has no such parameter.{did_you_mean(name, known)}")

    def _require_valid(self) -> None:
        """Plan the blends at the outermost points, with every method."""
        problems: dict[str, None] = {}
        for method in self._names():
            for point in self._outermost(method):
                try:
                    plan_blend(self.recipe_at(point))
                except KtmergeError as error:
                    problems |= dict.fromkeys(str(error).splitlines())
        if problems:
            raise UsageError("\n".join(problems))

    def _outermost(self, method: str) -> list[Point]:
        """Both ends of every range, other values being in the middle."""
        middle: Point = {one.key: one.at(0.5) for one in self.ranges}
        if len(self.methods) > 1:
            middle[METHOD] = method
        return [{**middle, one.key: end} for one in self.ranges for end in one.ends()] or [middle]


def members_of(point: Mapping[str, Value]) -> frozenset[str]:
    """The experts that a point of a greedy sweep has in."""
    return frozenset(key.removeprefix(MEMBER) for key, value in point.items() if key.startswith(MEMBER) and value)


def told(point: Mapping[str, Value]) -> str:
    """A point in a few words, such as ``lambda 0.6, density 0.2``, or ``anna + bert`` for experts."""
    members = members_of(point)
    if members:
        return " + ".join(key.removeprefix(MEMBER) for key in point if key.removeprefix(MEMBER) in members)
    words = [
        f"{key.removeprefix('blend.')} {value:.4g}" if isinstance(value, float) else f"{key.split('.')[-1]} {value}"
        for key, value in point.items()
    ]
    return ", ".join(words) or "as written"


def _parameters(blend: Mapping[str, Any]) -> set[str]:
    setting = blend_setting(Blend.model_validate(blend))
    return {name for pipeline in setting.pipelines.values() for name in parameter_names(pipeline)}
