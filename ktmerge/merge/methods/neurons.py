"""Neuron-Fusion: keep the changes of the neurons that moved most, suppress the rest, restore the strength."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pydantic import Field

from ktmerge.merge.projections import ATTENTION, FEED_FORWARD, kinds_in, module_of
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Amount, Context, OnePass, Parameters, Promises, Stages, Statistic, Tensor

_COLUMNS = ("o", "down")
"""Projections whose inputs are the neurons; of the others it is the outputs."""

Owner = tuple[str, int]
"""A module, and which of the stacked experts in it."""


class NeuronFusionParameters(Parameters):
    rho: float = Field(0.3, ge=0, le=1, description="fraction of the neurons of each module whose change is kept")
    gamma: float = Field(0.1, ge=0, le=1, description="what the change of the other neurons is multiplied by")
    alpha: Amount = Field(1.0, description="norm of the module's change afterwards, relative to before")
    head_size: int | None = Field(
        None, ge=1, description="width of an attention head: whole heads, not dimensions of one, are then the neurons"
    )


class _Energies(OnePass):
    """Observer of the squared change of every neuron; finds the factor of each."""

    def __init__(self, parameters: NeuronFusionParameters) -> None:
        self._parameters = parameters
        self._found: dict[Owner, dict[str, Tensor]] = {}

    def observe(self, values: Tensor, context: Context) -> None:
        for owner, kind, one in _maps(values, context):
            energies = one.double().square().sum(0 if kind in _COLUMNS else 1)
            self._found.setdefault(owner, {})[kind] = energies.cpu()

    def result(self) -> dict[Owner, dict[str, Tensor]]:
        """Of each projection, the factor of each neuron, float32."""
        factors: dict[Owner, dict[str, Tensor]] = {}
        for owner, energies in self._found.items():
            factors[owner] = {}
            for members, count in _groups(energies, self._parameters.head_size):
                factors[owner] |= _factors({kind: energies[kind] for kind in members}, count, self._parameters)
        return factors


def _maps(values: Tensor, context: Context) -> Iterator[tuple[Owner, str, Tensor]]:
    from ktmerge.merge.matrices import split

    if context.tensor_class != "matrix":  # stages spelled out in a recipe get to see all others, too
        return
    kinds = kinds_in(context.tensor, context.layout)
    for number, one in enumerate(split(values, context)):
        yield (module_of(context.tensor), number // len(kinds)), kinds[number % len(kinds)], one


def _groups(energies: Mapping[str, Tensor], head_size: int | None) -> Iterator[tuple[list[str], int]]:
    """Projections that share their neurons, and how many neurons those are."""
    for kinds in (FEED_FORWARD, ATTENTION):
        sizes = {kind: len(energies[kind]) for kind in kinds if kind in energies}
        if not sizes or not min(sizes.values()):
            continue
        heads = min(sizes.values()) // head_size if head_size and kinds == ATTENTION else 0
        if heads and all(size % (heads * (head_size or 1)) == 0 for size in sizes.values()):
            yield list(sizes), heads
        elif len(set(sizes.values())) == 1:
            yield list(sizes), min(sizes.values())
        elif kinds == ATTENTION:  # grouped queries: fewer keys and values than queries and outputs
            for pair in (("q", "o"), ("k", "v")):
                if all(kind in sizes for kind in pair) and sizes[pair[0]] == sizes[pair[1]]:
                    yield list(pair), sizes[pair[0]]


def _factors(energies: Mapping[str, Tensor], count: int, parameters: NeuronFusionParameters) -> dict[str, Tensor]:
    """Factor of each row or column of some projections with the same ``count`` neurons."""
    import torch

    scores = torch.stack([one.view(count, -1).sum(1) for one in energies.values()]).sum(0)
    kept = math.ceil(round(parameters.rho * count, 6))
    order = scores.argsort(descending=True, stable=True)
    strong, weak = float(scores[order[:kept]].sum()), float(scores[order[kept:]].sum())
    wanted = parameters.alpha**2 * (strong + weak) - parameters.gamma**2 * weak
    factors = torch.full_like(scores, parameters.gamma)
    restored = parameters.alpha if not weak else math.sqrt(max(0.0, wanted) / strong) if strong else 1.0
    factors[order[:kept]] = restored
    return {kind: factors.float().repeat_interleave(len(one) // count) for kind, one in energies.items()}


@stage(
    "neuron_fusion", "transform", NeuronFusionParameters, reach="tensor",
    statistics=lambda given: [Statistic("factors", "global", lambda _: _Energies(given))],
)  # fmt: skip
def neuron_fusion(delta: Tensor, parameters: NeuronFusionParameters, context: Context) -> Tensor:
    """Keep the ceil(rho n) neurons of each module that moved most, the others times gamma (arXiv:2505.16703).

    A neuron of a feed-forward module is a row of gate and up and a column of down; of attention, a row of q, k and v
    and a column of o, or with head_size a group of heads that share keys and values. Without it, where queries share
    keys, q and o have their neurons and k and v theirs. What is kept is rescaled so that ||M|| = alpha ||tau|| of the
    module, as far as gamma allows. Other matrices are left as they are.
    Differs from the paper, which gives no formulas: the score, gamma and the rescaling are a reconstruction.
    """
    from ktmerge.merge.matrices import join

    if (parameters.rho == 1 and parameters.alpha == 1) or context.tensor_class != "matrix":
        return delta
    scaled = []
    for owner, kind, one in _maps(delta, context):
        factors = context.statistics["factors"].get(owner, {}).get(kind)
        if factors is not None:
            own = factors.to(one.device)
            one = one * (own if kind in _COLUMNS else own.unsqueeze(1))
        scaled.append(one)
    return join(scaled, context)


method(
    name="neuron_fusion",
    summary="One multimodal expert that forgot text: keep the neurons that moved most, quieten all the others.",
    source="Yu and Ananiadou, Findings of EMNLP 2025, arXiv:2505.16703",
    stages=Stages(transform=(("neuron_fusion", {}),), combine=("sum", {})),
    experts=(1, 1),
    otherwise=dict.fromkeys(("embed", "vector", "conv"), Stages(combine=("sum", {}))),
    formula="s tau_n of the rho n neurons of largest ||tau_n||, gamma tau_n of the others; ||M|| = alpha ||tau||",
    promises=Promises(neutral={"rho": 1.0}, identical="other", elements=False),
    semantics=2,
)
