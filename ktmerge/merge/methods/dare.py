"""DARE: drop changes at random and rescale the rest, so that their expectation stays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from ktmerge.checkpoints.classes import TensorClass
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.program import Drop
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Need, Parameters, Promises, Stages, Statistic, Tensor
from ktmerge.merge.summed import Summed

_CERTAINTY = 0.95
"""Chance with which the bound that the analytic q minimises holds."""


class DareParameters(Parameters):
    density: float = Field(0.5, ge=0, le=1, description="chance of each element to be kept; papers quote 1 - density")
    rescale: Literal["unbiased", "none", "l1", "l2", "q"] = Field(
        "unbiased",
        description="kept elements times 1/density, unchanged, to the tensor's former L1 or L2 norm, or times 1/q",
    )
    q: Annotated[float, Field(gt=0, le=1)] | Literal["analytic"] | None = Field(
        None, description="of rescale q: from density to 1, or analytic: the best for the expert's measured inputs"
    )


def _objection(parameters: DareParameters, weights: Mapping[str, float]) -> str | None:
    q = parameters.q
    if parameters.rescale != "q":
        return None if q is None else "q is used with rescale: q only"
    if q is None or (q != "analytic" and not max(parameters.density, 1e-6) <= q <= 1):
        return f"rescale q needs q, from density ({parameters.density:g}) to 1, or analytic"
    return None


def _analytic(parameters: DareParameters) -> bool:
    return parameters.rescale == "q" and parameters.q == "analytic"


def _needs(parameters: DareParameters) -> tuple[Need, ...]:
    return (Need("inputs", "experts"),) if _analytic(parameters) else ()


def _norms(parameters: DareParameters) -> tuple[Statistic, ...]:
    if parameters.rescale not in ("l1", "l2"):
        return ()

    power = 1 if parameters.rescale == "l1" else 2

    def ratio(_: Sequence[float], every: Fraction, kept: Fraction) -> float:
        """||tau|| / ||m * tau||."""
        return float((every / kept) ** (1 / power)) if kept else 0.0

    def parts(delta: Tensor, context: Context) -> Sequence[Tensor]:
        return [delta, drop(delta, parameters.density, context)]

    return (Statistic("ratio", "tensor", lambda elements: Summed(power, parts, ratio, 0.0)),)


def _compiled(parameters: DareParameters) -> Drop | None:
    if parameters.rescale in ("l1", "l2") or _analytic(parameters):
        return None
    return Drop(parameters.density, _factor(parameters), "dare")


def _factor(parameters: DareParameters) -> float:
    """What kept elements are multiplied by, where that is known beforehand."""
    if parameters.rescale == "none" or _chance(parameters.density) == 0:
        return 1.0
    return 1 / (parameters.q if isinstance(parameters.q, float) else parameters.density)


@stage(
    "dare", "transform", DareParameters, statistics=_norms, compiled=_compiled, objection=_objection, needs=_needs,
    whole=_analytic,
)  # fmt: skip
def dare(delta: Tensor, parameters: DareParameters, context: Context) -> Tensor:
    """Keep each element with probability d, independently, and multiply it by 1/d (arXiv:2311.03099, eq. 3-4).

    The choice of an element depends on (seed, expert, tensor, element) alone: not on chunks, threads or device.
    ``q``: by 1/q, d <= q <= 1, which trades the noise of large factors for a bias (DAREx-q, arXiv:2410.09344, 4.1).
    ``analytic``: of each output, q = d or q = 1, whichever bounds its error tighter; of the tensor, their mean.
    Differs from the authors' code in that the bound's free eta is minimised over, which leaves only these two.
    """
    kept = drop(delta, parameters.density, context)
    if parameters.density in (0, 1) and parameters.rescale != "q":
        return kept
    if _analytic(parameters):
        return kept / _best_q(delta, parameters.density, context)
    factor = context.statistics["ratio"] if parameters.rescale in ("l1", "l2") else _factor(parameters)
    return kept if factor == 1 else kept * factor


def _best_q(delta: Tensor, density: float, context: Context) -> float:
    """Mean over outputs of the q in [d, 1] that minimises (1 - d/q) |sum_j c_j| + sqrt(phi sum_j c_j^2 ln 40) / q.

    With probability 0.95 it bounds the change of the output, c_j = Delta_j E|x_j|; phi = (1-2p) / ln((1-p)/p), p = 1-d.
    """
    import torch

    from ktmerge.merge.matrices import split

    if density in (0, 1) or context.measured is None or not delta.numel():
        return 1.0
    drop_rate = 1 - density
    phi = 0.5 if density == drop_rate else (1 - 2 * drop_rate) / math.log((1 - drop_rate) / drop_rate)
    maps = split(delta, context, fused=False)
    felt = context.measured.inputs(context.expert).double().abs().mean(-2).view(-1, maps[0].shape[1])
    chosen = []
    for number, one in enumerate(maps):
        c = one.double() * felt[number % len(felt)]
        noise = (phi * (c * c).sum(1) * math.log(2 / (1 - _CERTAINTY))).sqrt()
        chosen.append(torch.where(noise > density * c.sum(1).abs(), 1.0, density))
    return float(torch.cat(chosen).mean())


def _chance(density: float) -> int:
    """Of 2^32 draws, how many keep an element."""
    return round(density * 2**32)


def drop(delta: Tensor, density: float, context: Context) -> Tensor:
    """The delta with elements that the stream ``dare`` did not choose set to zero."""
    import torch

    if density == 1:
        return delta
    key = stream_key(context.seed, "dare", context.expert, context.tensor)
    draws = context.kernels.draws(key, context.start, delta.numel(), delta.device).view(delta.shape)
    return torch.where(draws < _chance(density), delta, 0.0)


LEFT_OUT: tuple[TensorClass, ...] = ("embed", "vector", "conv")
"""Random choice among the few values of a norm, bias or filter, or the rarely touched rows of an embedding, only adds
noise (arXiv:2410.09344 leaves them out too): there the drop is left out and the rest of the method stays."""

method(
    name="dare",
    summary="Several experts with small changes: thin each out at random so that they collide less, then add.",
    formula="sum_t w_t m_t tau_t / density, m_t ~ Bernoulli(density)",
    source="Yu et al., ICML 2024, arXiv:2311.03099",
    stages=Stages(transform=(("dare", {}),), combine=("sum", {})),
    otherwise=dict.fromkeys(LEFT_OUT, Stages(combine=("sum", {}))),
    promises=Promises(neutral={"density": 1.0}, identical="other", elements=False, unbiased=True),
    semantics=3,
)
method(
    name="dare_ties",
    summary="As dare, and drop what the thinned-out experts still disagree on.",
    formula="elect(m_t tau_t / density), m_t ~ Bernoulli(density)",
    source="Yu et al., ICML 2024, arXiv:2311.03099, with the election of arXiv:2306.01708",
    stages=Stages(transform=(("dare", {}),), combine=("elect", {})),
    otherwise=dict.fromkeys(LEFT_OUT, Stages(combine=("elect", {}))),
    promises=Promises(neutral={"density": 1.0}, identical="other", elements=False),
    semantics=3,
)
