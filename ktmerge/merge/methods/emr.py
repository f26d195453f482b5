"""The unified vector of EMR-Merging, by itself."""

from __future__ import annotations

from ktmerge.merge.registry import method
from ktmerge.merge.stage import Promises, Stages

# Differs from the published code in that an element on whose sign the experts are exactly even is left alone; there it
# counts as negative. The masks and rescalers that would bring each expert back are more than one model's worth.
method(
    name="emr_unified",
    summary="Several experts: elect each sign by mass and keep the largest change that has it.",
    source="Huang et al., NeurIPS 2024, arXiv:2405.17461, the unified vector",
    stages=Stages(combine=("elect", {"elect": "mass", "aggregate": "max"})),
    lambda_=0.4,
    formula="s max_{t: sign tau_t = s} |tau_t|, s = sign(sum_t tau_t)",
    promises=Promises(identical="mean"),
)
