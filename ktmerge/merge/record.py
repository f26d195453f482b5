"""``ktmerge.json``: what an output was made from and how, so that anyone can check it. Has no paths of this machine."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ktmerge import __version__
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.hub import cached_as
from ktmerge.merge.decompositions import place
from ktmerge.merge.kernels.keys import SCHEME
from ktmerge.merge.plan import Plan
from ktmerge.merge.report import BlendReport
from ktmerge.recipes.schema import Recipe

FILE = "ktmerge.json"


def record(plan: Plan, report: BlendReport) -> str:
    """The record as JSON; the same blend gives the same text."""
    document = {
        "ktmerge": 1,
        "kind": "blend",
        **origin(plan),
        "output": {"sha256": report.out, "beside": report.beside},
        "parts": report.parts(),
        "notes": report.notes,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def origin(plan: Plan) -> dict[str, Any]:
    """What an output comes from, as it can be told anywhere: recipe, versions, inputs, coefficients."""
    statistics = {name: one.digest for name, one in plan.statistics.items()}
    return {
        "recipe": portable_recipe(plan),
        "versions": versions(plan),
        "methods": _semantics(plan),
        "random": {"seed": plan.recipe.seed, "scheme": SCHEME},
        "inputs": {name: {"headers": checkpoint.header_digest()} for name, checkpoint in inputs_of(plan).items()},
        "coefficients": coefficients_digest(plan),
        **({"statistics": statistics} if statistics else {}),
    }


def inputs_of(plan: Plan) -> dict[str, Checkpoint]:
    """The base, and the experts by name."""
    return {"base": plan.base, **{expert.name: expert.checkpoint for expert in plan.experts}}


def said_of_inputs(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a recipe says that decides how inputs are read: of each expert, but not which model; and of the output."""
    experts = {name: one.model_dump(mode="json", exclude={"weight", "model"}) for name, one in recipe.experts.items()}
    return experts, recipe.output.model_dump(mode="json", exclude={"dtype", "rounding", "not_finite"})


def versions(plan: Plan) -> dict[str, str]:
    """What computed it; libraries are asked without being loaded."""
    found = {"ktmerge": __version__, "torch": _installed("torch"), "python": platform.python_version()}
    if (there := place()) != "cpu":
        found["decompositions"] = f"on {there}"
    if any(method.startswith("mergekit:") for method in _semantics(plan)):
        found["mergekit"] = _installed("mergekit")
    return found


@cache
def _installed(package: str) -> str:
    """A package's version, for which its metadata are parsed."""
    return version(package)


def coefficients_digest(plan: Plan) -> str:
    """sha256 over what decides every tensor's values: action, stages, parameters, lambda, weights, type, rounding."""
    weights = {expert.name: expert.weight for expert in plan.experts}
    rows: list[Any] = [weights, plan.recipe.output.rounding, *(tensor.coefficients() for tensor in plan.tensors)]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def portable_recipe(plan: Plan) -> dict[str, Any]:
    """What was blended and how, as understood, with no more of a path than means something elsewhere."""
    alone = plan.recipe.without_tuning()
    document = alone.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"finetune", "eval"})
    document["base"] = _told(document["base"], plan.base)
    for expert in plan.experts:
        model = document["experts"][expert.name]
        model["model"] = _told(model["model"], expert.checkpoint)
    for section in (document, *document["experts"].values()):
        if isinstance(section.get("statistics"), str):
            section["statistics"] = portable(section["statistics"])
        elif "statistics" in section:
            _tell_job(section["statistics"])
    return document


def _tell_job(job: dict[str, Any]) -> None:
    for key in ("folder", "images"):
        if key in job:
            job[key] = portable(job[key])
    job["data"] = [portable(file) for file in job["data"]]


def _told(reference: str, checkpoint: Checkpoint) -> str:
    """A reference as it can be told; one to the hub with the commit that was there."""
    return (cached_as(checkpoint.root) if "+" not in reference else None) or portable(reference)


def portable(reference: str) -> str:
    """A hub id or a path below the recipe as it is; of any other path the last name, or what follows the last ``..``.

    A base with an adapter, ``base+adapter``, is two references.
    """
    return "+".join(_below(Path(part)) if part else part for part in reference.split("+"))


def _below(path: Path) -> str:
    if path.expanduser().is_absolute():
        return path.expanduser().name
    parts = list(path.parts)
    while ".." in parts:
        del parts[: parts.index("..") + 1]
    return "/".join(parts) or path.absolute().resolve().name


def _semantics(plan: Plan) -> dict[str, int]:
    used = {tensor.pipeline.method: tensor.pipeline.semantics for tensor in plan.tensors if tensor.pipeline is not None}
    return dict(sorted(used.items()))
