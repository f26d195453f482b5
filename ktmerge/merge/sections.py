"""Mistakes of a recipe's blend section that show without its checkpoints. Loads no torch, and none of their code."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from ktmerge.errors import attempt, refuse
from ktmerge.merge.needs import without_statistics
from ktmerge.merge.rules import Rule, resolve_rules
from ktmerge.merge.settings import Setting, blend_setting, weights_of
from ktmerge.recipes.schema import Recipe


def check_recipe(recipe: Recipe) -> None:
    """Find every mistake in a recipe's blend section that shows without its checkpoints.

    Raises:
        UsageError: everything found, one per line.
    """
    problems: list[str] = []
    if recipe.blend is None:
        return
    setting = attempt(problems, partial(blend_setting, recipe.blend))
    if setting is not None:
        if recipe.experts:
            problems += [f"blend: {objection}" for objection in setting.objections(weights_of(recipe))]
        rules = attempt(problems, lambda: resolve_rules(recipe, setting, None)) or ()
        if recipe.base is not None:
            problems += without_statistics(recipe, settings_of(setting, rules))
    refuse(problems)


def settings_of(setting: Setting, rules: Iterable[Rule]) -> list[Setting]:
    """All settings that some tensors are blended by."""
    return [setting, *(rule.setting for rule in rules if rule.setting is not None)]
