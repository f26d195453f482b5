"""Every mistake of a recipe that shows before anything is run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError, collected, refuse
from ktmerge.recipes import load_recipe
from ktmerge.recipes.load import suite_of
from ktmerge.recipes.schema import Recipe

if TYPE_CHECKING:
    from ktmerge.merge.plan import Plan
    from ktmerge.recipes.suites import Suite


@dataclass(frozen=True)
class Checked:
    """What `check` found to be in order."""

    recipe: Recipe
    plan: Plan | None
    suite: Suite | None

    def pairs(self) -> dict[str, str]:
        found = {"recipe": f"{self.recipe.name} is valid"}
        blend_section = self.recipe.blend
        if self.plan is not None:
            found["blend"] = (
                f"{len(self.plan.tensors)} tensors, {', '.join(e.name for e in self.plan.experts)} into base"
            )
        elif blend_section is not None:
            found["blend"] = (
                f"{blend_section.method or 'stages'}; tensors not checked, as not all of its inputs are there yet"
            )
        if self.recipe.finetune is not None:
            found["finetune"] = ", ".join(self.recipe.finetune.experts)
        if self.suite is not None:
            found["eval"] = f"{len(self.suite.upstream)} upstream, {len(self.suite.downstream)} downstream sets"
        return found

    def to_json(self) -> dict[str, Any]:
        return {"valid": True, **self.pairs()}


def check(
    reference: str, *, overrides: Iterable[str] = (), base: str | None = None, experts: Iterable[str] = ()
) -> Checked:
    """Find every mistake of a recipe that shows without reading weights or data.

    Tensors are checked when base and experts are named and there; an expert that the recipe itself makes need not be.

    Raises:
        UsageError: everything that is wrong, one per line.
    """
    recipe = load_recipe(reference, overrides=overrides, base=base, experts=experts)
    suite, problems = _read(recipe)
    planned: Plan | None = None
    with collected(problems):
        if recipe.blend is not None and recipe.base is not None and recipe.experts and not _to_be_made(recipe):
            from ktmerge.merge.planning import plan_blend

            planned = plan_blend(recipe)
    refuse(problems)
    return Checked(recipe, planned, suite)


def require_ready(recipe: Recipe) -> None:
    """Find what would stop a recipe's whole way after its experts are made, though it shows now.

    Raises:
        UsageError: everything that is wrong, one per line.
    """
    refuse(_read(recipe)[1])


def _read(recipe: Recipe) -> tuple[Suite | None, list[str]]:
    """The suite, and what is wrong with sections, data and fine-tunes whatever experts are there."""
    from ktmerge.merge.sections import check_recipe

    problems: list[str] = []
    suite: Suite | None = None
    with collected(problems):
        check_recipe(recipe)
    with collected(problems):
        suite = suite_of(recipe) if recipe.eval is not None else None
    return suite, [*problems, *_missing_data(recipe, suite), *_not_trainable(recipe)]


def _to_be_made(recipe: Recipe) -> bool:
    """Whether an expert or statistics are missing because the recipe says how to make them and has yet to."""
    jobs = recipe.finetune.experts if recipe.finetune is not None else {}
    if any(not os.path.exists(recipe.folder / recipe.experts[name].model) for name in jobs):
        return True
    sections = {name: recipe.statistics_of(name) for name in ("base", *recipe.experts)}
    made = [recipe.statistics_folder(name) for name, section in sections.items() if section and section.is_job]
    return any(folder is not None and not os.path.exists(folder) for folder in made)


def _not_trainable(recipe: Recipe) -> list[str]:
    """What the fine-tunes name of a base that is there and does not have it."""
    if recipe.finetune is None or recipe.base is None or not os.path.isdir(recipe.folder / recipe.base):
        return []
    from ktmerge.checkpoints.checkpoint import Checkpoint
    from ktmerge.tuners.trained import require_trainable

    problems = []
    for name, job in recipe.finetune.experts.items():
        try:
            require_trainable(Checkpoint.open(recipe.folder / recipe.base), job)
        except UsageError as error:
            problems.append(f"finetune.experts.{name}: {error}")
    return problems


def _missing_data(recipe: Recipe, suite: Suite | None) -> list[str]:
    wanted: list[tuple[str, Path]] = []
    for name, job in recipe.finetune.experts.items() if recipe.finetune is not None else ():
        kept = job.adapter.data if job.adapter is not None else ()
        files = [*job.data, *job.replay, *kept, job.eval_upstream, job.eval_downstream]
        wanted += [(f"finetune.experts.{name}", recipe.folder / file) for file in files if file is not None]
    for name in ("base", *recipe.experts):
        section = recipe.statistics_of(name)
        where = "statistics" if name == "base" else f"experts.{name}.statistics"
        wanted += [(where, recipe.folder / file) for file in (section.data if section is not None else ())]
    if suite is not None:
        for task in suite.tasks():
            if task.kind != "lm_eval" and not task.data.startswith("hf:"):
                wanted.append((f"eval, task {task.name}", suite.folder / task.data))
    return [
        f"{where}: {path}: no such file."
        for where, path in wanted
        if not os.path.exists(path) or (os.path.isdir(path) and where[:4] != "eval")
    ]
