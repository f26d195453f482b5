"""ExPO: go on beyond the tuned model in the direction it came from the base."""

from __future__ import annotations

from ktmerge.merge.registry import method
from ktmerge.merge.stage import Promises, Stages

method(
    name="expo",
    summary="One aligned expert that did not go far enough: go on beyond it; 1.1 to 1.5 is worth a sweep.",
    source="Zheng et al., 2024, arXiv:2404.16792",
    stages=Stages(combine=("mean", {})),
    lambda_=1.2,
    formula="lambda tau, lambda above 1",
    cost="oi",
    promises=Promises(identical="mean"),
)
