"""In what two recipes differ, in words, and whether that changes what is written. Loads no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ktmerge.merge.plan import Plan
from ktmerge.merge.record import origin
from ktmerge.merge.settings import FLOAT_CLASSES, Setting, blend_setting, rule_setting
from ktmerge.recipes.schema import Recipe, WhereRule

Effect = Literal["yes", "perhaps", "no"]

_MISSING = object()
_CARD = "it stands in the model card only"
_ELSEWHERE = {
    "finetune": "the blend takes experts as they are; made anew, they may be others",
    "eval": "it decides what is scored, not what is blended",
    "statistics": "the blend takes statistics as they are; made anew, they may be others",
}


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: as it was given.
        recipe: as understood.
        lock: of a lock or a blend: all that decided its bytes.
        plan: of a recipe whose models are there.
    """

    name: str
    recipe: Recipe
    lock: Mapping[str, Any] | None
    plan: Plan | None

    @property
    def origin(self) -> Mapping[str, Any] | None:
        """What the bytes come from, if that can be told."""
        return self.lock if self.lock is not None else None if self.plan is None else origin(self.plan)


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        what: a key of the recipe, or what else decides.
        first: its value on the first side, in words.
        second: on the second.
        changes: whether the weights that are written come out otherwise.
        why: that is so.
    """

    what: str
    first: str
    second: str
    changes: Effect
    why: str


def differences(one: Side, other: Side) -> Iterator[Difference]:
    """Everything in which two sides differ."""
    yield from _plain(one, other)
    yield from _inputs(one, other)
    alike = _treat_alike(one, other)
    for found in _blend(one, other):
        yield replace(found, changes="no", why="every tensor is treated alike") if alike else found
    yield from _output(one, other)
    yield from _recorded(one, other)


def _plain(one: Side, other: Side) -> Iterator[Difference]:
    yield from _differing("name", one.recipe.name, other.recipe.name, "no", _CARD)
    yield from _differing("description", one.recipe.description, other.recipe.description, "no", _CARD)
    for key in ("finetune", "eval"):
        before, after = (_document(getattr(side.recipe, key)) for side in (one, other))
        if one.lock is not None or other.lock is not None:
            continue  # a lock has neither section
        for path, left, right in _leaves(before, after, key):
            yield from _differing(path, left, right, "no", _ELSEWHERE[key])


def _inputs(one: Side, other: Side) -> Iterator[Difference]:
    names = list(dict.fromkeys(["base", *one.recipe.experts, *other.recipe.experts]))
    for name in names:
        before, after = (_model(side.recipe, name) for side in (one, other))
        if before is None or after is None:
            if (before is None) != (after is None):
                effect: Effect = "yes" if name != "base" else "perhaps"
                why = "an expert more or less" if name != "base" else "one side does not say which base"
                yield _difference(f"experts.{name}" if name != "base" else "base", before, after, effect, why)
            continue
        yield from _same_model(name, before, after, one, other)
        if name != "base":
            weights = [side.recipe.experts[name].weight for side in (one, other)]
            yield from _differing(f"experts.{name}.weight", weights[0], weights[1], *_weight_effect(one, other))
        jobs = [_document(side.recipe.statistics_of(name)) for side in (one, other)]
        key = "statistics" if name == "base" else f"experts.{name}.statistics"
        for path, left, right in _leaves(jobs[0], jobs[1], key):
            yield from _differing(path, left, right, "perhaps", _ELSEWHERE["statistics"])


def _weight_effect(one: Side, other: Side) -> tuple[Effect, str]:
    if len(one.recipe.experts) == 1 and len(other.recipe.experts) == 1:
        return "perhaps", "means that divide by the sum of the weights do not see it with one expert"
    return "yes", "the share of an expert"


def _same_model(name: str, before: str, after: str, one: Side, other: Side) -> Iterator[Difference]:
    what = "base" if name == "base" else f"experts.{name}.model"
    left, right = (None if side.lock is None else side.lock["inputs"].get(name) for side in (one, other))
    if left is not None and right is not None:
        weights = [
            {file: found["sha256"] for file, found in given["files"].items() if file.endswith(".safetensors")}
            for given in (left, right)
        ]
        if weights[0] != weights[1]:
            if sorted(weights[0].values()) == sorted(weights[1].values()):
                yield _difference(what, before, after, "no", "the same files under other names")
            else:
                yield _difference(what, _files(weights[0]), _files(weights[1]), "yes", "other weights went in")
        elif before != after:
            yield _difference(what, before, after, "no", "the same files by another name")
        return
    told = [side.origin["inputs"].get(name, {}).get("headers") if side.origin else None for side in (one, other)]
    here, there = _places(one, name), _places(other, name)
    if None not in told and told[0] != told[1]:
        yield _difference(what, before, after, "yes", "its tensors, types or shapes are others")
    elif here is not None and here == there:
        yield from _differing(what, before, after, "no", "the same folder")
    elif before != after:
        yield _difference(what, before, after, "perhaps", "only their locks can tell whether they are the same")
    elif here is not None and there is not None:
        yield _difference(
            what, here, there, "perhaps", "another folder; only their locks can tell whether it is the same"
        )


def _places(side: Side, name: str) -> str | None:
    """Where a model lies, if that is known."""
    if side.plan is None:
        return None
    checkpoint = side.plan.base if name == "base" else side.plan.expert(name).checkpoint
    return ", ".join(os.path.realpath(root) for root in checkpoint.roots)


def _treat_alike(one: Side, other: Side) -> bool:
    """Whether the same happens to every tensor, whatever it is called in the recipes."""
    left, right = one.origin, other.origin
    keys = ("coefficients", "methods")
    return left is not None and right is not None and all(left[key] == right[key] for key in keys)


def _blend(one: Side, other: Side) -> Iterator[Difference]:
    first, second = one.recipe.blend, other.recipe.blend
    if first is None or second is None:
        if (first is None) != (second is None):
            yield _difference(
                "blend", first and "a section", second and "a section", "yes", "one of them blends nothing"
            )
        return
    settings = blend_setting(first), blend_setting(second)
    yield from _settings("blend", *settings)
    rules = [[_rule(rule, side, setting) for rule in section.where] for section, side, setting in
             ((first, one, settings[0]), (second, other, settings[1]))]  # fmt: skip
    for index in range(max(len(rules[0]), len(rules[1]))):
        left, right = (rule[index] if index < len(rule) else None for rule in rules)
        if left != right:
            yield _difference(f"blend.where[{index}]", left, right, "yes", "the first rule that matches decides")


def _settings(where: str, first: Setting, second: Setting) -> Iterator[Difference]:
    same = {kind: first.pipelines[kind].spec() == second.pipelines[kind].spec() for kind in FLOAT_CLASSES}
    equal = all(same.values()) and all(first.lambda_of(kind) == second.lambda_of(kind) for kind in FLOAT_CLASSES)
    renamed = first.method.name != second.method.name
    if renamed:
        why = "another name for the same stages" if equal else "other stages"
        yield _difference(f"{where}.method", first.method.name, second.method.name, "no" if equal else "yes", why)
    if first.lambda_ != second.lambda_:
        yield _difference(f"{where}.lambda", first.lambda_, second.lambda_, "yes", "scale of the merged change")
    told: set[str] = set()
    for kind in FLOAT_CLASSES:
        left, right = first.pipelines[kind].parameters(), second.pipelines[kind].parameters()
        for key in dict.fromkeys([*left, *right]):
            before, after = left.get(key, _MISSING), right.get(key, _MISSING)
            if before == after or key in told or (renamed and _MISSING in (before, after)):
                continue
            told.add(key)
            yield _difference(f"{where}.{key}", before, after, "yes", _meaning(key, first, second))


def _meaning(key: str, *settings: Setting) -> str:
    """What a parameter is, as its stage describes it."""
    for setting in settings:
        for pipeline in setting.pipelines.values():
            for use in pipeline.uses:
                field = type(use.parameters).model_fields.get(key)
                if field is not None and field.description:
                    return field.description
    return "a parameter of the method"


def _rule(rule: WhereRule, side: Side, outer: Setting) -> str:
    """A rule in words, with all that it comes to."""
    given = {"part": rule.part, "match": rule.match, "class": rule.tensor_class}
    where = ", ".join(f"{key} {value}" for key, value in given.items() if value is not None)
    blend = side.recipe.blend
    if rule.keep is not None or blend is None:
        return f"{where}: keep {rule.keep}"
    setting = rule_setting(rule, "blend.where", blend, outer)
    parameters = setting.pipelines["matrix"].knobs()
    listed = ", ".join(f"{key} {value}" for key, value in {**parameters, "lambda": setting.lambda_}.items())
    return f"{where}: {setting.method.name} ({listed})"


def _output(one: Side, other: Side) -> Iterator[Difference]:
    reasons = {
        "dtype": "the type of what is written",
        "rounding": "how values are rounded",
        "vocabulary": "which tokens have rows",
        "not_finite": "matters only where an input is not finite",
    }
    for key, why in reasons.items():
        values = [getattr(side.recipe.output, key) for side in (one, other)]
        effect: Effect = "perhaps" if key in ("not_finite", "vocabulary") else "yes"
        yield from _differing(f"output.{key}", values[0], values[1], effect, why)
    yield from _differing(
        "dequantise", one.recipe.dequantise, other.recipe.dequantise, "perhaps", "matters for quantised inputs"
    )
    stochastic = "stochastic" in (one.recipe.output.rounding, other.recipe.output.rounding)
    why = "rounding is drawn" if stochastic else "matters where something is drawn: drops, ties among equal magnitudes"
    yield from _differing("seed", one.recipe.seed, other.recipe.seed, "yes" if stochastic else "perhaps", why)


def _recorded(one: Side, other: Side) -> Iterator[Difference]:
    """What a recipe does not say: what methods meant, what computed, and what came out."""
    left, right = one.origin, other.origin
    if left is None or right is None:
        return
    kinds: tuple[tuple[str, str, Effect, str], ...] = (
        ("methods", "meaning of methods", "yes", "the same words gave other bytes in another version"),
        ("versions", "versions", "perhaps", "libraries may round otherwise; 'recipe verify --rebuild' tells"),
    )
    for key, what, effect, why in kinds:
        for name in dict.fromkeys([*left[key], *right[key]]):
            if key == "methods" and not (name in left[key] and name in right[key]):
                continue  # another method: said already
            yield from _differing(f"{what}: {name}", left[key].get(name), right[key].get(name), effect, why)
    outputs = [side.lock.get("output", {}).get("sha256", {}) if side.lock else {} for side in (one, other)]
    if all(outputs) and sorted(outputs[0].values()) != sorted(outputs[1].values()):
        yield _difference("output", _files(outputs[0]), _files(outputs[1]), "yes", "what came out differs")


def _model(recipe: Recipe, name: str) -> str | None:
    return recipe.base if name == "base" else recipe.experts[name].model if name in recipe.experts else None


def _document(section: Any) -> Any:
    return None if section is None else section.model_dump(mode="json", by_alias=True, exclude_none=True)


def _leaves(before: Any, after: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two documents differ, as deep as both have keys."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from _leaves(before.get(key, _MISSING), after.get(key, _MISSING), f"{path}.{key}")
    elif before != after:
        yield path, before, after


def _differing(what: str, first: Any, second: Any, changes: Effect, why: str) -> Iterable[Difference]:
    return [] if first == second else [_difference(what, first, second, changes, why)]


def _difference(what: str, first: Any, second: Any, changes: Any, why: str) -> Difference:
    return Difference(what, _words(first), _words(second), changes, why)


def _words(value: Any) -> str:
    if value is None or value is _MISSING:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _files(digests: Mapping[str, str]) -> str:
    return ", ".join(f"{file} {digest[:12]}" for file, digest in sorted(digests.items()))
