"""Coefficients of experts from norms alone: MetaGPT and NAN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.program import Energies, Measured
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.merge.summed import Summed
from ktmerge.merge.weights import positive


class NormShareParameters(Parameters):
    rule: Literal["metagpt", "nan"] = Field(
        "metagpt", description="shares go with the squared norm of the delta, or with one over the norm of the weights"
    )
    scope: Literal["tensor", "global"] = Field(
        "global", description="norms of each tensor, or of the whole model: one share per expert"
    )


def _shares(rule: str, moved: Sequence[Fraction], norms: Sequence[Fraction]) -> list[float]:
    """Each expert's, from the squared norms of the deltas, and of the experts for the rule ``nan``."""
    if rule == "metagpt":
        total = sum(moved, Fraction(0))
        return [float(one / total) if total else 0.0 for one in moved]
    # relative to the largest, so that neither root nor quotient leaves the range of a float
    largest = max(norms, default=Fraction(0))
    return [float(largest / own) ** 0.5 if delta and own else 0.0 for delta, own in zip(moved, norms, strict=True)]


def _statistics(parameters: NormShareParameters) -> tuple[Statistic, ...]:
    rule = parameters.rule

    def parts(deltas: list[Tensor], context: Context) -> Sequence[Tensor]:
        return [*deltas, *(context.base + delta for delta in deltas if rule == "nan")]

    def shares(weights: Sequence[float], *norms: Fraction) -> list[float]:
        return _shares(rule, norms[: len(weights)], norms[len(weights) :])

    return (Statistic("shares", parameters.scope, lambda elements: Summed(2, parts, shares, [])),)


def _compiled(parameters: NormShareParameters, weights: Mapping[str, float]) -> Measured:
    def shared(found: Energies) -> list[float]:
        shares = _normalised(_shares(parameters.rule, found.deltas, found.experts), list(weights.values()))
        return shares or [0.0] * len(weights)

    return Measured("experts" if parameters.rule == "nan" else "deltas", parameters.scope, shared)


@stage(
    "norm_share", "combine", NormShareParameters, objection=positive, compiled=_compiled,
    statistics=_statistics,
)  # fmt: skip
def norm_share(deltas: list[Tensor], parameters: NormShareParameters, context: Context) -> Tensor:
    """Mean of the deltas by shares from norms: |tau_t|^2 (arXiv:2406.11385) or 1/|theta_t| (arXiv:2505.16148).

    Shares times the expert weights, over their sum. Equal norms give the mean. Experts that moved nothing (within the
    scope) have no share.
    """
    import torch

    shares = _normalised(context.statistics["shares"], context.weights)
    return weighted_total(deltas, shares) if shares else torch.zeros_like(deltas[0])


def _normalised(shares: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Shares times weights, summing to 1; none if nobody has a share."""
    products = [share * weight for share, weight in zip(shares, weights, strict=False)]
    total = sum(products)
    return [one / total for one in products] if total else []


method(
    name="metagpt",
    summary="Several experts of one base, no data, no sweep: task arithmetic with coefficients from their norms.",
    source="Zhou et al., 2024, arXiv:2406.11385",
    stages=Stages(combine=("norm_share", {})),
    formula="sum_t |tau_t|^2 tau_t / sum_k |tau_k|^2",
    cost="N oi, two passes",
    promises=Promises(identical="mean"),
)
method(
    name="nan",
    summary="As metagpt, with shares that go down with the norm of an expert's weights.",
    source="Si et al., 2025, arXiv:2505.16148",
    stages=Stages(combine=("norm_share", {"rule": "nan"})),
    formula="sum_t tau_t / |theta_t| / sum_k 1 / |theta_k|",
    cost="N oi, two passes",
    promises=Promises(identical="mean", scale=False, sign=False),
)
