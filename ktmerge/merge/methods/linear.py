"""Linear interpolation with the base (WiSE-FT) and averaging."""

from __future__ import annotations

from ktmerge.merge.registry import method
from ktmerge.merge.stage import Promises, Stages

method(
    name="linear",
    summary="Go back towards the base by one number (WiSE-FT), or average several experts; the first thing to try.",
    formula="sum_t w_t tau_t / sum_t w_t",
    source="Wortsman et al., CVPR 2022, arXiv:2109.01903; Model soups, ICML 2022, arXiv:2203.05482",
    stages=Stages(combine=("mean", {})),
    promises=Promises(identical="mean"),
)
