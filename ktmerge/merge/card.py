"""``README.md`` of an output, as the Hugging Face hub reads it: what it is made from, how, and how far it moved.

Has no paths of this machine, and no date: the same blend gives the same text.
"""

from __future__ import annotations

from typing import Any

import yaml

from ktmerge import __version__
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.hub import hub_name
from ktmerge.markdown import block, line, table
from ktmerge.merge.plan import Plan
from ktmerge.merge.record import FILE as RECORD
from ktmerge.merge.record import portable_recipe
from ktmerge.merge.report import BlendReport
from ktmerge.recipes.document import yaml_text

FILE = "README.md"
_TEXT = "tag:yaml.org,2002:str"
BASE_FILE = "BASE_README.md"
_LICENCE = ("license", "license_name", "license_link")
_FENCE = "---"


def card(plan: Plan, report: BlendReport) -> str:
    """The model card of what ``plan`` made."""
    recipe = plan.recipe
    told = portable_recipe(plan)
    text = yaml_text(told)
    sections = [
        f"{_FENCE}\n{yaml_text(_front_matter(plan, told))}{_FENCE}",
        f"# {recipe.name}",
        *([line(recipe.description)] if recipe.description else []),
        f"{_origin(plan)} It has the base's architecture, tensor names and inference cost.",
        table(["role", "model", "weight"], _inputs(told)),
        "## Recipe",
        block("yaml", text),
        f"Saved as `recipe.yaml` beside these models, it gives the same bytes again with ktmerge {__version__} "
        f"(`{RECORD}` has the versions, and the digests to compare with):",
        block("bash", f"ktmerge blend --recipe recipe.yaml --out {recipe.name}\n"),
        "## How far it moved",
        table(*report.table()[:2]),
        "*moved by*: norm of the merged change over the norm of the base. *stored*: share of that change that the "
        "stored values show after rounding. *changed*: share of the elements that differ from the base.",
    ]
    if report.notes:
        sections += ["## Notes", "\n".join(f"* {line(note)}" for note in report.notes)]
    return "\n\n".join(sections) + "\n"


def base_card(base: Checkpoint) -> str | None:
    """The base's own model card, to be kept under another name; None if it has none, or none that is text."""
    try:
        return (base.root / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def licence(checkpoint: Checkpoint) -> str | None:
    """The licence that a model's own card states, if it states one."""
    return _stated(base_card(checkpoint) or "").get("license")


def _front_matter(plan: Plan, told: dict[str, Any]) -> dict[str, Any]:
    references = [told["base"], *(expert["model"] for expert in told["experts"].values())]
    hub_names = [hub_name(part, plan.recipe.folder) for whole in references for part in whole.split("+")]
    models = list(dict.fromkeys(filter(None, hub_names))) or references[:1]
    stated = _stated(base_card(plan.base) or "")
    return {
        "base_model": models,
        "base_model_relation": "merge",
        "library_name": "transformers",
        **{key: stated[key] for key in _LICENCE if key in stated},
        "tags": ["ktmerge", "merge"],
    }


def _stated(text: str) -> dict[str, str]:
    """The texts at the top of a card's front matter; empty if there is none that can be read. Aliases stay closed."""
    head, *rest = text.lstrip("\ufeff").split(f"\n{_FENCE}", 1)
    if not rest or not head.startswith(_FENCE):
        return {}
    try:
        found = yaml.compose(head.removeprefix(_FENCE), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(found, yaml.MappingNode):
        return {}
    return {key.value: one.value for key, one in found.value if key.tag == one.tag == _TEXT}


def _origin(plan: Plan) -> str:
    methods = dict.fromkeys(tensor.pipeline.method for tensor in plan.tensors if tensor.pipeline is not None)
    experts = len(plan.experts)
    fine_tunes = "one fine-tune" if experts == 1 else f"{experts} fine-tunes"
    how = f" by {', '.join(f'`{line(method)}`' for method in methods)}" if methods else ""
    return f"{fine_tunes.capitalize()} of a base model, blended with it{how} by ktmerge {__version__}."


def _inputs(told: dict[str, Any]) -> list[list[str]]:
    rows = [["base", f"`{line(told['base'])}`", ""]]
    experts = told["experts"].items()
    return rows + [[name, f"`{line(expert['model'])}`", f"{expert['weight']:g}"] for name, expert in experts]
