"""Base and single experts as recipes: what candidates are held against."""

from __future__ import annotations

from ktmerge.recipes.schema import Blend, Recipe


def base_alone(recipe: Recipe) -> Recipe:
    """The base, as a blend that keeps nothing of an expert."""
    return _alone(recipe, next(iter(recipe.experts)), 0.0)


def expert_alone(recipe: Recipe, name: str) -> Recipe:
    """One expert as it is."""
    return _alone(recipe, name, 1.0)


def _alone(recipe: Recipe, name: str, lambda_: float) -> Recipe:
    expert = recipe.experts[name].model_copy(update={"weight": 1.0})
    blend = Blend.model_validate({"method": "linear", "lambda": lambda_})
    return recipe.model_copy(update={"experts": {name: expert}, "blend": blend, "finetune": None})
