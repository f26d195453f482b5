"""What people write and share: the recipe, its overrides, the gallery, evaluation suites. Data, never code."""

from ktmerge.recipes.load import load_recipe, load_suite
from ktmerge.recipes.schema import Recipe

__all__ = ["Recipe", "load_recipe", "load_suite"]
