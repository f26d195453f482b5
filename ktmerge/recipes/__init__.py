"""What people write and share: the recipe, its overrides, the gallery, evaluation suites. Data, never code."""

from ktmerge.recipes.load import load_recipe, load_suite
from ktmerge.recipes.schema import Recipe
from ktmerge.recipes.suites import Suite, Task

__all__ = ["Recipe", "Suite", "Task", "load_recipe", "load_suite"]
