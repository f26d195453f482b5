"""The ``where`` rules of a recipe: which tensors each matches, and what it says for them. Loads no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktmerge.checkpoints.expressions import PartExpression
from ktmerge.errors import collected, located, refuse
from ktmerge.merge.settings import FLOAT_CLASSES, Setting, parameter_names, rule_setting, weights_of
from ktmerge.recipes.schema import Recipe, WhereRule

if TYPE_CHECKING:
    from ktmerge.checkpoints.classes import TensorClass
    from ktmerge.checkpoints.parts import Parts


@dataclass(frozen=True)
class Rule:
    """One rule, ready to be asked.

    Attributes:
        keep: ``base`` or an expert, if the rule copies.
        setting: how to blend, if it doesn't.
    """

    index: int
    rule: WhereRule
    keep: str | None
    setting: Setting | None
    part_matches: Callable[[str], bool] | None

    def matches(self, name: str, tensor_class: TensorClass) -> bool:
        """Whether everything the rule asks for holds for a tensor."""
        rule = self.rule
        if rule.tensor_class is not None and rule.tensor_class != tensor_class:
            return False
        if rule.match is not None and not fnmatch.fnmatchcase(name, rule.match):
            return False
        return self.part_matches is None or self.part_matches(name)

    def unused(self, classes: Collection[TensorClass]) -> list[str]:
        """What is wrong if the rule came to decide about tensors of just these classes."""
        where = f"blend.where[{self.index}]"
        if not classes:
            return [f"{where}: matches no tensor that an earlier rule has not taken ({self._condition()})."]
        if self.setting is None:
            return []
        floats = [one for one in FLOAT_CLASSES if one in classes]
        used = {name for one in floats for name in parameter_names(self.setting.pipelines[one])}
        idle = [key for key in self.rule.parameters if key not in used]
        return [
            f"{where}.{key}: does nothing here: '{self.setting.method.name}' does not use it for tensors of class "
            f"{' or '.join(floats) or 'buffer'}."
            for key in idle
        ]

    def _condition(self) -> str:
        given = {"part": self.rule.part, "match": self.rule.match, "class": self.rule.tensor_class}
        return ", ".join(f"{key}: {value}" for key, value in given.items() if value is not None)


def resolve_rules(recipe: Recipe, setting: Setting, parts: Parts | None) -> tuple[Rule, ...]:
    """The rules of a recipe; without ``parts``, only what can be checked without a checkpoint is checked.

    Raises:
        UsageError: everything that is wrong with them, one per line.
    """
    problems: list[str] = []
    found: list[Rule] = []
    weights = weights_of(recipe)
    blend = recipe.blend
    for index, rule in enumerate(blend.where if blend is not None else ()):
        where = f"blend.where[{index}]"
        own: Setting | None = None
        matcher: Callable[[str], bool] | None = None
        if rule.keep is None and blend is not None:
            with collected(problems):
                own = rule_setting(rule, where, blend, setting)
                problems += [f"{where}: {one}" for one in own.objections(weights)] if weights else []
        with collected(problems), located(where):
            matcher = _matcher(rule, parts)
        found.append(Rule(index, rule, rule.keep, own, matcher))
    refuse(problems)
    return tuple(found)


def _matcher(rule: WhereRule, parts: Parts | None) -> Callable[[str], bool] | None:
    if rule.part is None:
        return None
    if parts is not None:
        return parts.matcher(rule.part)
    PartExpression.parse(rule.part)
    return lambda name: True
