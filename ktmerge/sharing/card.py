"""``README.md`` of a bundle, as the hub and people read it: what the recipe blends, and the commands to do it again."""

from __future__ import annotations

from typing import Any

import yaml

from ktmerge import __version__
from ktmerge.markdown import block, line, table
from ktmerge.recipes.schema import Recipe
from ktmerge.sharing import contents
from ktmerge.sharing.command import apply_command, blend_command
from ktmerge.sharing.manifest import Input

_SHOWN_DIGITS = 12


def card(recipe: Recipe, text: str, inputs: dict[str, Input], licences: dict[str, str], *, delta: bool) -> str:
    """The model card of a recipe that is handed over.

    Args:
        recipe: as it was read.
        text: as it is handed over.
        inputs: by ``base`` or expert.
        licences: that inputs state, likewise.
        delta: whether the bundle has the blended model as a delta.
    """
    rows = [
        (
            name, f"`{one.model}`", f"{one.size / 1e6:.1f} MB", f"`{one.digest[:_SHOWN_DIGITS]}`",
            licences.get(name, "not stated"),
        )
        for name, one in inputs.items()
    ]  # fmt: skip
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(inputs), sort_keys=False, allow_unicode=True)}---",
        f"# {recipe.name}",
        *([line(recipe.description)] if recipe.description else []),
        f"A recipe of ktmerge {__version__}: it says how these models are blended into one. It is data, has no weights "
        f"of its own, and `{contents.LOCK}` pins every file that goes in by its sha256.",
        table(("role", "model", "files", "digest", "licence"), rows),
        "## Use it",
        block("bash", blend_command(inputs, recipe, "") + "\n"),
        *([block("bash", apply_command("") + "\n")] if delta else []),
        "## Recipe",
        block("yaml", text),
    ]
    if recipe.finetune is not None:
        told = recipe.finetune.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for job in told["experts"].values():
            _tell_names(job)
        sections += ["## How the experts were tuned", block("yaml", yaml.safe_dump(told, sort_keys=False))]
    return "\n\n".join(sections) + "\n"


def _tell_names(job: dict[str, Any]) -> None:
    from ktmerge.merge.record import portable

    for key in ("data", "replay", "image_root", "eval_upstream", "eval_downstream", "fisher"):
        if isinstance(job.get(key), list):
            job[key] = [portable(one) for one in job[key]]
        elif isinstance(job.get(key), str):
            job[key] = portable(job[key])


def _front_matter(inputs: dict[str, Input]) -> dict[str, Any]:
    parts = [part for one in inputs.values() for part in one.model.split("+")]
    models = list(dict.fromkeys(part.partition("@")[0] for part in parts if not part.startswith("./")))
    stated = {"base_model": models, "base_model_relation": "merge"} if models else {}
    return {**stated, "tags": ["ktmerge", "merge", "recipe"]}
