"""DARE: drop changes at random and rescale the rest, so that their expectation stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.program import Drop
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Domain, Method, Observer, Parameters, Promises, Stages, Statistic

if TYPE_CHECKING:
    from torch import Tensor


class DareParameters(Parameters):
    density: float = Field(0.5, ge=0, le=1, description="chance of each element to be kept; papers quote 1 - density")
    rescale: Literal["unbiased", "none", "l1", "l2"] = Field(
        "unbiased", description="kept elements times 1/density, unchanged, or to the tensor's former L1 or L2 norm"
    )


class _NormRatio:
    """Observer of ||tau|| / ||m * tau|| over one tensor, from exact sums."""

    def __init__(self, parameters: DareParameters) -> None:
        from ktmerge.merge.kernels.sums import ExactSum

        self._parameters = parameters
        self._power = 1 if parameters.rescale == "l1" else 2
        self._all, self._kept = ExactSum(self._power), ExactSum(self._power)
        self.done = False

    def observe(self, values: Tensor, context: Context) -> None:
        self._all.add(values)
        self._kept.add(_drop(values, self._parameters.density, context))

    def end_pass(self) -> None:
        self.done = True

    def result(self) -> float:
        kept = self._kept.value()
        return float((self._all.value() / kept) ** (1 / self._power)) if kept else 0.0


def _norms(parameters: DareParameters) -> tuple[Statistic, ...]:
    if parameters.rescale not in ("l1", "l2"):
        return ()

    def start(domain: Domain) -> Observer:
        return _NormRatio(parameters)

    return (Statistic("ratio", "tensor", start),)


def _compiled(parameters: DareParameters) -> Drop | None:
    if parameters.rescale in ("l1", "l2"):
        return None
    plain = parameters.rescale == "none" or parameters.density == 0
    return Drop(parameters.density, 1.0 if plain else 1 / parameters.density, "dare")


@stage("dare", "transform", DareParameters, statistics=_norms, compiled=_compiled)
def dare(delta: Tensor, parameters: DareParameters, context: Context) -> Tensor:
    """Keep each element with probability d, independently, and multiply it by 1/d (arXiv:2311.03099, eq. 3-4).

    The choice of an element depends on (seed, expert, tensor, element) alone: not on chunks, threads or device.
    """
    kept = _drop(delta, parameters.density, context)
    if parameters.rescale == "none" or parameters.density == 0:
        return kept
    factor = 1 / parameters.density if parameters.rescale == "unbiased" else context.statistics["ratio"]
    return kept * factor


def _drop(delta: Tensor, density: float, context: Context) -> Tensor:
    import torch

    if density == 1:
        return delta
    key = stream_key(context.seed, "dare", context.expert, context.tensor)
    words = context.kernels.words(key, context.start, delta.numel(), delta.device)
    return torch.where(words < round(density * 2**32), delta, 0.0)


# Random choice among the few values of a norm or bias, or the rarely touched rows of an embedding, only adds noise
# (arXiv:2410.09344 leaves them out too): there the drop is left out and the rest of the method stays.
_NO_DROP_SUM = Stages(combine=("sum", {}))
_NO_DROP_ELECT = Stages(combine=("elect", {}))

method(
    Method(
        name="dare",
        summary="Several experts with small changes: thin each out at random so that they collide less, then add.",
        source="Yu et al., ICML 2024, arXiv:2311.03099",
        stages=Stages(transform=(("dare", {}),), combine=("sum", {})),
        otherwise={"embed": _NO_DROP_SUM, "vector": _NO_DROP_SUM},
        promises=Promises(neutral={"density": 1.0}, identical="other", elements=False, unbiased=True),
    )
)
method(
    Method(
        name="dare_ties",
        summary="As dare, and drop what the thinned-out experts still disagree on.",
        source="Yu et al., ICML 2024, arXiv:2311.03099, with the election of arXiv:2306.01708",
        stages=Stages(transform=(("dare", {}),), combine=("elect", {})),
        otherwise={"embed": _NO_DROP_ELECT, "vector": _NO_DROP_ELECT},
        promises=Promises(neutral={"density": 1.0}, identical="other", elements=False),
    )
)
