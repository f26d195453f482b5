"""``ktmerge.json``: what an output was made from and how, so that anyone can check it. Has no paths of this machine."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ktmerge import __version__
from ktmerge.merge.kernels.keys import SCHEME
from ktmerge.merge.plan import Plan
from ktmerge.merge.registry import methods
from ktmerge.merge.report import BlendReport

FILE = "ktmerge.json"


def record(plan: Plan, report: BlendReport) -> str:
    """The record as JSON; the same blend gives the same text."""
    document = {
        "ktmerge": 1,
        "kind": "blend",
        "recipe": _recipe(plan),
        "versions": versions(),
        "methods": _semantics(plan),
        "random": {"seed": plan.recipe.seed, "scheme": SCHEME},
        "inputs": {
            "base": {"headers": plan.base.header_digest()},
            **{expert.name: {"headers": expert.checkpoint.header_digest()} for expert in plan.experts},
        },
        "coefficients": coefficients_digest(plan),
        "output": {"sha256": report.out},
        "parts": report.parts(),
        "notes": report.notes,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def versions() -> dict[str, str]:
    """What computed it; torch is asked without being loaded."""
    return {"ktmerge": __version__, "torch": version("torch"), "python": platform.python_version()}


def coefficients_digest(plan: Plan) -> str:
    """sha256 over what decides every tensor's values: action, stages, parameters, lambda, weights, type."""
    weights = {expert.name: expert.weight for expert in plan.experts}
    rows: list[Any] = [weights, *(tensor.coefficients() for tensor in plan.tensors)]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _recipe(plan: Plan) -> dict[str, Any]:
    """The recipe as understood; of absolute paths only the last name remains."""
    document = plan.recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"finetune", "eval"})
    document["base"] = _portable(document.get("base"))
    for expert in document["experts"].values():
        expert["model"] = _portable(expert["model"])
    return document


def _portable(reference: Any) -> Any:
    if not isinstance(reference, str):
        return reference
    path = Path(reference).expanduser()
    return path.name if path.is_absolute() else reference


def _semantics(plan: Plan) -> dict[str, int]:
    known = methods()
    used = {tensor.pipeline.method for tensor in plan.tensors if tensor.pipeline is not None}
    return {name: known[name].semantics if name in known else 1 for name in sorted(used)}
