"""WARP after training: SLERP of all runs' deltas, then back towards the base."""

from __future__ import annotations

from ktmerge.merge.registry import method
from ktmerge.merge.stage import Promises, Stages

method(
    name="warp",
    summary="Several runs of one task (RL above all): SLERP of their changes, and lambda of the way from the base.",
    source="Ramé et al., 2024, arXiv:2406.16768, stages 2 (SLERP) and 3 (LITI, which is lambda)",
    stages=Stages(combine=("slerp", {})),
    lambda_=0.4,
    formula="lambda slerp(... slerp(slerp(tau_1, tau_2, 1/2), tau_3, 1/3) ...)",
    cost="N^2 oi",
    promises=Promises(identical="mean", experts=False, tolerance=1e-6),
)
