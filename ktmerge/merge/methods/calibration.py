"""What sets the size of a merged delta, whatever merged it: singular value calibration (SVC) and norm budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from pydantic import Field

from ktmerge.merge.methods.wudi import MEANS
from ktmerge.merge.program import Budget, Energies
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, SplitFused, Stages, Statistic, Tensor
from ktmerge.merge.summed import Summed
from ktmerge.merge.weights import relative

_SKIPPED = 1e-7
"""Singular values below this share of the largest become zero."""
_FROZEN = Fraction(1, 10**24)
"""Share of ||theta_0||^2 up to which ||tau_t||^2 is no change."""


class SvcParameters(Parameters):
    alpha: float | None = Field(
        None,
        gt=0,
        le=1e38,
        description="least response that each expert counts with in every direction; 1 / N if not given, right after a "
        "mean; 1 after a sum",
    )
    split_fused: SplitFused = True


@stage("svc", "calibrate", SvcParameters, reach="tensor")
def svc(merged: Tensor, deltas: list[Tensor], parameters: SvcParameters, context: Context) -> Tensor:
    """Rescale the merged delta, direction by direction, to what the experts do there (arXiv:2602.05536).

    M = U S V^T; a_r = u_r^T M, a_r^t = u_r^T tau_t, s_r^t = <a_r, a_r^t> / ||a_r^t||^2,
    gamma_r = N / sum_t max(alpha, s_r^t), S' = gamma S. Equal experts give the one, whether M was their sum or mean:
    what several share is no longer counted several times, and lambda 1 means the same after every rule. N counts the
    experts that changed the map. Tensors that are no linear maps stay as they were merged.

    The formula has no weights: each delta is multiplied by its weight over the mean of their magnitudes.

    Differs from the paper's code: an expert whose response to a direction is rounding counts as one without a response,
    with alpha, where the code divides by it.
    Differs from the paper, where alpha is 0.1 after means and sums alike: two experts at right angles come out 1.7 and
    1.8 times their sum. They are their sum with alpha 1 / N after a mean, and with alpha 1 after a sum or whatever adds
    such experts, as tsv_m does, and swudi_a in the directions that take part; the ready-made methods are set so.
    """
    import torch

    from ktmerge.merge.matrices import by_map
    from ktmerge.merge.spectra import least_response, members, one_sided

    def calibrate(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        whole = maps[0]
        own = members(maps[1:], base, context)
        if not own or not bool(whole.any()) or (len(own) == 1 and whole.equal(own[0])):
            return whole
        found = one_sided(whole)
        alpha = 1 / len(own) if parameters.alpha is None else parameters.alpha
        counted = torch.zeros_like(found.values[: found.above(_SKIPPED)])
        for delta, (along, energy) in zip(own, found.responses(own, counted.numel()), strict=True):
            responds = energy > least_response(delta, base) ** 2
            counted += torch.where(responds, along / energy, alpha).clamp(min=alpha)
        return found.filtered(len(own) / counted).float()

    return by_map([merged, *deltas], context, calibrate, fused=parameters.split_fused)


def _squared(merged: Tensor, context: Context) -> Sequence[Tensor]:
    return [context.base, merged, *context.deltas]


def _budgeted(weights: Sequence[float], base: Fraction, merged: Fraction, *deltas: Fraction) -> float:
    return _factor(Energies(base, deltas), merged, weights)


def _factor(energies: Energies, merged: Fraction, weights: Sequence[float]) -> float:
    """mean_t ||w_t tau_t|| / ||M|| over the experts that changed the tensor; 1 if nobody did, or nothing was merged."""
    pairs = zip(energies.deltas, weights, strict=True)
    own = [(delta, abs(weight)) for delta, weight in pairs if weight and delta > _FROZEN * energies.base]
    if not own or not merged:
        return 1.0
    shares = relative([weight for _, weight in own])
    return sum(math.sqrt(delta / merged) * share for (delta, _), share in zip(own, shares, strict=True)) / len(own)


@stage(
    "norm_budget", "calibrate", compiled=lambda _: Budget(_factor),
    statistics=lambda _: [Statistic("factor", "tensor", lambda elements: Summed(2, _squared, _budgeted, 1.0))],
)  # fmt: skip
def norm_budget(merged: Tensor, deltas: list[Tensor], parameters: Parameters, context: Context) -> Tensor:
    """Give the merged delta of each tensor the mean length of the experts': M' = M mean_t ||tau_t|| / ||M||.

    Makes lambda 1 comparable between rules. Only experts that changed the tensor count; each delta is multiplied by its
    weight over the mean of their magnitudes. A merged delta of zero stays zero.
    """
    factor: float = context.statistics["factor"]
    return merged if factor == 1 else merged * factor


_SVC = (("svc", dict[str, Any]()),)
_SVC_OF_SUM = (("svc", {"alpha": 1.0}),)
_SOURCE = "arXiv:2602.05536"
_CALIBRATED: tuple[tuple[str, str, str, Stages, str, str], ...] = (
    (
        "task_arithmetic_svc",
        "Several experts: their sum, with what they share counted once; needs no search for lambda.",
        f"Ilharco et al., ICLR 2023, arXiv:2212.04089; {_SOURCE}",
        Stages(combine=("sum", {}), calibrate=_SVC_OF_SUM),
        "sum_t tau_t",
        "eigh min(o, i)^3",
    ),
    (
        "ties_svc",
        "As ties, with the strength of every direction set by what the experts do there.",
        f"Yadav et al., NeurIPS 2023, arXiv:2306.01708; {_SOURCE}",
        Stages(transform=(("trim", {}),), combine=("elect", {}), calibrate=_SVC),
        "ties",
        "eigh min(o, i)^3",
    ),
    (
        "tsv_m_svc",
        "As tsv_m, with the strength of every direction set by what the experts do there.",
        f"Gargiulo et al., CVPR 2025, arXiv:2412.00081; {_SOURCE}",
        Stages(combine=("tsv_m", {}), calibrate=_SVC_OF_SUM),
        "tsv_m",
        "(N + 3) eigh min(o, i)^3",
    ),
    (
        "swudi_a_svc",
        "Several experts and no data: as swudi_a, with the strength of every direction set by the experts.",
        f"Wei et al., 2026, arXiv:2606.07289; {_SOURCE}",
        Stages(combine=("spectral_regmean", {"filter": "none", "rank": "participation"}), calibrate=_SVC_OF_SUM),
        "swudi_a",
        "eigh min(i, N o)^3 + eigh min(o, i)^3",
    ),
)

for _name, _summary, _from, _stages, _merged, _cost in _CALIBRATED:
    method(
        name=_name,
        summary=_summary,
        source=_from,
        stages=_stages,
        otherwise=MEANS,
        formula=f"U g S V^T of {_merged} = U S V^T, g = N / sum_t max(alpha, <u M, u tau_t> / ||u tau_t||^2)",
        cost=f"{_cost} + N oi min(o, i)",
        promises=Promises(
            neutral={"density": 1.0} if _name == "ties_svc" else {},
            identical="other" if _name == "tsv_m_svc" else "mean",
            elements=False, rotations=_name != "ties_svc", tolerance=2e-5,
        ),
        semantics=3 if _name in ("task_arithmetic_svc", "tsv_m_svc") else 4,
    )  # fmt: skip

method(
    name="norm_budget",
    summary="Several experts: their mean direction, as long as they are on average; averaging alone shortens it.",
    source="ktmerge; the rule for lengths after OPCM, arXiv:2501.09522",
    stages=Stages(combine=("mean", {}), calibrate=(("norm_budget", {}),)),
    otherwise=MEANS,
    formula="mean_t ||tau_t|| M / ||M||, M = mean_t tau_t",
    cost="N oi",
    promises=Promises(identical="mean", elements=False, rotations=True, tolerance=1e-6),
    semantics=2,
)
