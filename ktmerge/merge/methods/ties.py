"""TIES-Merging: trim, elect, merge what agrees."""

from __future__ import annotations

from ktmerge.merge.registry import method
from ktmerge.merge.stage import Promises, Stages

method(
    name="ties",
    summary="Several experts: keep each one's largest changes, drop what they disagree on, average the rest.",
    formula="elect(trim tau_t): mean of the largest density n whose sign is sign(sum_t w_t tau_t)",
    source="Yadav et al., NeurIPS 2023, arXiv:2306.01708",
    stages=Stages(transform=(("trim", {}),), combine=("elect", {})),
    promises=Promises(neutral={"density": 1.0}, identical="mean"),
    semantics=2,
)
