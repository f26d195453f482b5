"""From the plan of one recipe to that of another of the same models: only what is to be done is decided anew."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ktmerge.checkpoints.header import FileStamp
from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError, refuse
from ktmerge.merge.needs import open_statistics, without_statistics
from ktmerge.merge.plan import ExpertPlan, Plan
from ktmerge.merge.planning import decide, plan_blend, require_complete
from ktmerge.merge.rules import resolve_rules
from ktmerge.merge.sections import settings_of
from ktmerge.merge.settings import blend_setting, weights_of
from ktmerge.recipes.schema import Recipe

Stamps = dict[str, FileStamp]


class Planner:
    """Plans recipes of the same models; headers are read once, and again when a file in their folders has changed."""

    def __init__(self) -> None:
        self._plans: dict[str, tuple[Plan, Stamps]] = {}

    def plan(self, recipe: Recipe) -> Plan:
        """As `plan_blend`.

        Raises:
            UsageError: everything that is wrong with the recipe or its inputs, one per line.
        """
        key = _models_of(recipe)
        like, stamps = self._plans.get(key, (None, {}))
        if like is not None and recipe.blend is not None and _stamps_of(like) == stamps:
            with suppress(UsageError):  # said in full below
                return _replan(recipe, like)
        plan = plan_blend(recipe)
        self._plans[key] = plan, _stamps_of(plan)
        return plan


def _models_of(recipe: Recipe) -> str:
    """All that decides which tensors are read, and as what."""
    experts = {name: one.model_dump(mode="json", exclude={"weight"}) for name, one in sorted(recipe.experts.items())}
    output = recipe.output.model_dump(mode="json")
    return json.dumps([str(recipe.folder), recipe.base, experts, output, recipe.dequantise])


def _stamps_of(plan: Plan) -> Stamps:
    """Of every file beside the weights of base and experts."""
    found: Stamps = {}
    for checkpoint in (plan.base, *(expert.checkpoint for expert in plan.experts)):
        folders = set(checkpoint.roots) | {(checkpoint.root / file).parent for file in checkpoint.stamps}
        for folder in folders:
            found |= _stamps_in(folder)
    return found


def _stamps_in(folder: Path) -> Iterable[tuple[str, FileStamp]]:
    try:
        entries = list(os.scandir(folder))
        return [(entry.path, FileStamp.of(entry.stat())) for entry in entries if entry.is_file()]
    except OSError:
        return [(str(folder), FileStamp(-1, -1, -1, -1))]


def _replan(recipe: Recipe, like: Plan) -> Plan:
    assert recipe.blend is not None
    problems: list[str] = []
    setting = blend_setting(recipe.blend)
    rules = resolve_rules(recipe, setting, Parts(like.base)) if recipe.blend.where else ()
    problems += [f"blend: {objection}" for objection in setting.objections(weights_of(recipe))]
    tensors = decide(like.base, like.tensors, setting, rules, problems)
    require_complete(like.experts, tensors, rules, problems)
    problems += without_statistics(recipe, settings_of(setting, rules))
    statistics = open_statistics(recipe, like.base, tensors, problems)
    refuse(problems)
    experts = tuple(
        ExpertPlan(one.name, recipe.experts[one.name].weight, one.checkpoint, one.alignment) for one in like.experts
    )
    return Plan(recipe, like.base, experts, tensors, like.layers, like.notes, like.texts, statistics)
