"""Null-space guard: take out of the merged delta what upstream inputs would feel."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, Need, Parameters, Promises, Stages, Tensor


class NullspaceParameters(Parameters):
    mode: Literal["soft", "hard"] = Field(
        "soft", description="damp every direction by what it carries, or cut some out"
    )
    kappa: Amount = Field(1.0, description="soft: strength; 0 changes nothing, 100 leaves little of what is felt")
    energy: float = Field(
        0.95, ge=0, le=1, description="hard: share of the inputs' energy whose directions are cut out"
    )


@stage("nullspace", "guard", NullspaceParameters, reach="tensor", needs=lambda _: [Need("inputs", "base")])
def nullspace(merged: Tensor, deltas: list[Tensor], parameters: NullspaceParameters, context: Context) -> Tensor:
    """Shrink the delta on upstream inputs (after AlphaEdit, arXiv:2410.02355; soft: the ridge form of the projection).

    ``soft``: M (I + kappa C_u / mean eigenvalue)^-1, which minimises ||M' - M||^2 + kappa ||M' C_u^(1/2)||^2 / mean.
    ``hard``: M (I - Q Q^T), Q the fewest eigenvectors of C_u that hold ``energy`` of its trace. C_u = X^T X / R of the
    inputs that the base sees on upstream data.
    """
    from ktmerge.merge.matrices import by_map
    from ktmerge.merge.regression import leading
    from ktmerge.merge.sampled import Sampled

    if (parameters.kappa if parameters.mode == "soft" else parameters.energy) == 0:
        return merged
    sampled = Sampled(context)

    def guard(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        upstream = sampled.covariance("", number, base.shape[1])
        trace = upstream.trace()
        if not trace > 0:
            return maps[0]
        values = maps[0].double()
        if parameters.mode == "soft":
            return upstream.scaled(parameters.kappa * upstream.inputs / trace).ridged(1.0).solve(values).float()
        frame = upstream.frame()
        felt = frame.onto(values)
        felt[:, leading(frame.eigenvalues, "energy", parameters.energy, upstream.inputs) :] = 0
        return (values - frame.back(felt)).float()

    return by_map([merged], context, guard, fused=False)


method(
    name="nullspace",
    summary="Some upstream data: keep of the change only what upstream inputs hardly feel.",
    source="Fang et al., ICLR 2025, arXiv:2410.02355, on the delta; the soft form is ktmerge's",
    stages=Stages(combine=("mean", {}), guard=(("nullspace", {}),)),
    otherwise=MEANS,
    formula="M (I + kappa C_u / mean eigenvalue)^-1",
    cost="min(R, i)^3 / 3 + R oi",
    promises=Promises(neutral={"kappa": 0.0}, identical="mean", elements=False, tolerance=1e-5),
    semantics=2,
)
