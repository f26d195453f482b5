"""Half fine-tuning after training: put half of the projections of every module back to the base."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.methods.dare import drop
from ktmerge.merge.program import Chosen, Drop
from ktmerge.merge.projections import ATTENTION, FEED_FORWARD, is_gated, kinds_in, module_of
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Place, Promises, Stages, Tensor

if TYPE_CHECKING:
    from ktmerge.checkpoints.matrices import MatrixLayout


class HalfResetParameters(Parameters):
    mode: Literal["projections", "element"] = Field(
        "projections", description="put back whole projections, half of each module's, or half of all elements"
    )
    others: Literal["base", "expert"] = Field(
        "base", description="mode projections: whose the embeddings, the head, norms and all other tensors are"
    )


def _maps(parameters: HalfResetParameters, place: Place) -> int:
    """The elements of all projections that share a tensor."""
    if parameters.mode == "element" or place.layout is None or len(place.layout.outputs) == 1:
        return 1
    return math.prod(place.shape[-2:] if place.tensor_class == "matrix" else place.shape[-1:])


def is_kept(seed: int, name: str, kind: str) -> bool | None:
    """Whether the projection ``kind`` in the tensor ``name`` stays the expert's; None if it is no projection.

    Two of the four of attention stay, one of up and down; of gate, up and down one in every other layer, else two.
    Maps of queries, keys and values that cannot be told apart stay where the output projection does not.
    """
    if kind == "qkv":
        return not is_kept(seed, name, "o")
    module = module_of(name)
    members: tuple[str, ...] = ATTENTION if kind in ATTENTION else FEED_FORWARD
    if kind in ATTENTION:
        count = 2
    elif kind in FEED_FORWARD and not is_gated(name):
        members, count = FEED_FORWARD[1:], 1
    elif kind in FEED_FORWARD:
        numbers = re.findall(r"\d+", module)
        count = 1 + ((int(numbers[-1]) if numbers else 0) + stream_key(seed, "half_reset", "", "")) % 2
    else:
        return None
    order = sorted(members, key=lambda one: stream_key(seed, "half_reset", one, module))
    return kind in order[:count]


def _compiled(parameters: HalfResetParameters) -> Chosen | Drop:
    if parameters.mode == "element":
        return Drop(0.5, 1.0, "dare")

    def kept(seed: int, name: str, layout: MatrixLayout | None) -> bool | None:
        found = _kept(parameters, seed, name, layout)
        return found[0] if len(set(found)) == 1 else None

    return Chosen(kept)


def _kept(parameters: HalfResetParameters, seed: int, name: str, layout: MatrixLayout | None) -> list[bool]:
    """Whether each of the maps that share a tensor stays the expert's."""
    found = [is_kept(seed, name, kind) for kind in kinds_in(name, layout)]
    return [parameters.others == "expert" if one is None else one for one in found]


@stage("half_reset", "transform", HalfResetParameters, grain=_maps, compiled=_compiled)
def half_reset(delta: Tensor, parameters: HalfResetParameters, context: Context) -> Tensor:
    """Keep the change of a random half of {q, k, v, o} and of {gate, up, down} of each module (after arXiv:2404.18466).

    The choice depends on the seed and the tensor's name alone, so every expert's is the same; fused projections are
    taken apart, and so are their biases. ``element``: of a random half of all elements, as dare with density 1/2 and
    without rescale.
    """
    import torch

    if parameters.mode == "element":
        return drop(delta, 0.5, context)
    kept = _kept(parameters, context.seed, context.tensor, context.layout)
    if all(kept) or not any(kept):
        return delta if all(kept) else torch.zeros_like(delta)

    reset = delta.clone()
    for number, one in enumerate(_parts(reset, context)):
        if not kept[number % len(kept)]:
            one.zero_()
    return reset


def _parts(values: Tensor, context: Context) -> list[Tensor]:
    """Views of what each of the maps that share a tensor has of it, or of their bias."""
    from ktmerge.merge.matrices import split

    if context.tensor_class == "matrix" or context.layout is None:
        return split(values.view(-1, *context.shape[-2:]), context)
    return [one for row in values.view(-1, context.shape[-1]) for one in row.split(context.layout.outputs)]


method(
    name="half_reset",
    summary="One expert: give half of its projections back to the base, whole; quick to try with several seeds.",
    source="Hui et al., 2024, arXiv:2404.18466, applied after training",
    stages=Stages(transform=(("half_reset", {}),), combine=("sum", {})),
    experts=(1, 1),
    formula="tau in half of {q, k, v, o} and of {gate, up, down}, 0 elsewhere",
    cost="oi",
    promises=Promises(neutral=None, identical="other"),
    semantics=3,
)
