"""The verbs of ktmerge as functions: what the command line calls, and what ``import ktmerge`` offers."""

from __future__ import annotations

from typing import Any

from ktmerge.api.blending import blend, blend_into, extract_lora, plan, refuse_without_out, require_apart
from ktmerge.api.checking import Checked, check
from ktmerge.api.deltas import apply_delta, export_delta
from ktmerge.api.gallery import Listed, explain, import_recipe, list_recipes, new_recipe, schema_text, show_recipe
from ktmerge.api.looking import inspect, recommend
from ktmerge.api.measuring import measure, measure_all, measurements
from ktmerge.api.proving import check_lock, diff, lock, lock_path, verify
from ktmerge.api.running import run
from ktmerge.api.scoring import backward_transfer, compare, evaluate, import_scores, report
from ktmerge.api.screening import screen
from ktmerge.api.sharing import default_folder, look, pack, push, unpack
from ktmerge.api.suites import ListedSuite, list_suites, show_suite
from ktmerge.api.sweeping import compare_with_trial, sweep, sweep_files, trial_recipe, trial_to_blend
from ktmerge.api.tuning import estimate, finetune, finetune_all, finetune_jobs, preview
from ktmerge.recipes import load_recipe

__all__ = [
    "Checked",
    "Listed",
    "ListedSuite",
    "Pristine",
    "apply_delta",
    "backward_transfer",
    "blend",
    "blend_into",
    "check",
    "check_lock",
    "compare",
    "compare_with_trial",
    "default_folder",
    "diff",
    "estimate",
    "evaluate",
    "explain",
    "export_delta",
    "extract_lora",
    "finetune",
    "finetune_all",
    "finetune_jobs",
    "import_recipe",
    "import_scores",
    "inspect",
    "list_recipes",
    "list_suites",
    "load_recipe",
    "lock",
    "lock_path",
    "look",
    "measure",
    "measure_all",
    "measurements",
    "new_recipe",
    "pack",
    "plan",
    "preview",
    "push",
    "recommend",
    "refuse_without_out",
    "report",
    "require_apart",
    "run",
    "schema_text",
    "screen",
    "show_recipe",
    "show_suite",
    "sweep",
    "sweep_files",
    "trial_recipe",
    "trial_to_blend",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name != "Pristine":
        raise AttributeError(f"module 'ktmerge.api' has no attribute '{name}'")
    from ktmerge.merge.pristine import Pristine

    return Pristine
