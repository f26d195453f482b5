"""What a greedy sweep turns: which of the recipe's experts are in. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ktmerge.errors import UsageError
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Recipe
from ktmerge.sweep.greedy import Members
from ktmerge.sweep.space import MEMBER, Point, Range, Space, Value, members_of, told


class Soups(Space):
    """All soups of a recipe's experts; a point says of each whether it is in.

    Args:
        recipe: with two experts or more.
        methods: one to blend with instead of the recipe's, or none.

    Raises:
        UsageError: there is nothing to choose from, or a soup of one or of all cannot be blended.
    """

    def __init__(self, recipe: Recipe, methods: Sequence[str] = ()) -> None:
        if len(recipe.experts) < 2:
            raise UsageError(
                f"the recipe '{recipe.name}' has one expert: a greedy soup chooses among two or more; add --expert."
            )
        if len(methods) > 1:
            raise UsageError("--sampler greedy: a greedy soup is of one method; run a sweep for each.")
        super().__init__(recipe, [Range(f"{MEMBER}{name}", choices=(True, False)) for name in recipe.experts], methods)

    def point_of(self, members: Members) -> Point:
        """The point with these experts in."""
        return {f"{MEMBER}{name}": name in members for name in self.recipe.experts}

    def recipe_at(self, point: Mapping[str, Value]) -> Recipe:
        """The recipe with the experts that are in, and no others."""
        document = self._written(self._names()[0])
        members = members_of(point)
        document["experts"] = {name: one for name, one in document["experts"].items() if name in members}
        document.pop("finetune", None)
        return parse_recipe(document, f"{self.recipe.name}, {told(point)}", self.recipe.folder)

    def _outermost(self, method: str) -> list[Point]:
        """Every expert alone, and all together."""
        names = list(self.recipe.experts)
        return [self.point_of(frozenset(members)) for members in (*([name] for name in names), names)]
