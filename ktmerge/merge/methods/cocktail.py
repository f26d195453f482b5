"""LM-Cocktail: experts weighted by their loss on a few examples of the task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.program import Sum
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Tensor
from ktmerge.merge.weights import positive
from ktmerge.recipes.schema import Factor


class CocktailParameters(Parameters):
    losses: dict[str, Factor] = Field(
        {}, description="of each expert, by name, on a few examples of the task; none: all the same"
    )
    temperature: float = Field(5.0, gt=0, le=1e38, description="how little the losses matter")


def _objection(parameters: CocktailParameters, weights: Mapping[str, float]) -> str | None:
    if parameters.losses and parameters.losses.keys() != weights.keys():
        return f"losses: give one for each expert ({', '.join(weights)}), and no other"
    return positive(parameters, weights)


@stage(
    "cocktail", "combine", CocktailParameters, objection=_objection,
    compiled=lambda given, weights: Sum(_shares(given, tuple(weights), tuple(weights.values()))),
)  # fmt: skip
def cocktail(deltas: list[Tensor], parameters: CocktailParameters, context: Context) -> Tensor:
    """Mean of the deltas by softmax(-loss_t / T) (arXiv:2311.13534), times the expert weights.

    The base's fixed share in the mixture is 1 - lambda. Tensors of integers are the base's.
    """
    return weighted_total(deltas, _shares(parameters, context.experts, context.weights))


def _shares(parameters: CocktailParameters, experts: Sequence[str], weights: Sequence[float]) -> list[float]:
    losses = [parameters.losses.get(expert, 0.0) for expert in experts]
    least = min(losses)
    terms = [w * math.exp((least - loss) / parameters.temperature) for w, loss in zip(weights, losses, strict=True)]
    total = sum(terms)
    if total == 0:  # the experts with weight lose by so much that the exponential underflows
        terms, total = list(weights), sum(weights)
    return [term / total for term in terms]


method(
    name="lm_cocktail",
    summary="One or several experts, a few examples: shares by their losses there, and half of it all the base.",
    source="Xiao et al., 2023, arXiv:2311.13534",
    stages=Stages(combine=("cocktail", {})),
    lambda_=0.5,
    formula="sum_t softmax(-loss_t / T) tau_t; the base's share is 1 - lambda",
    promises=Promises(identical="mean"),
)
