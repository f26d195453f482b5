"""CABS: n of every m changes, each expert's where those before it kept none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Method, Parameters, Promises, Stages

if TYPE_CHECKING:
    from torch import Tensor


class CabsParameters(Parameters):
    n: int = Field(64, ge=0, description="how many changes stay in each block")
    m: int = Field(128, ge=1, description="elements of a block, in the order of the file")


def _objection(parameters: CabsParameters, weights: Mapping[str, float]) -> str | None:
    if parameters.n > parameters.m:
        return f"n = {parameters.n} of m = {parameters.m} cannot stay; choose n up to m"
    return None


@stage("cabs", "combine", CabsParameters, reach="tensor", objection=_objection)
def cabs(deltas: list[Tensor], parameters: CabsParameters, context: Context) -> Tensor:
    """Sum of n:m pruned deltas that avoid one another as far as they can (arXiv:2503.01874).

    Expert by expert, in the order of their names: of every block of m elements the n largest changes stay, first of
    those that no expert before it kept, then, if they are fewer than n, of the others. Equal magnitudes are decided by
    a hash. The last block is filled up with zeros. Expert weights are the paper's lambda_t.
    Differs from the published code, which fails where m does not divide the number of elements, ranks in fp16, and
    knows two experts.
    """
    import torch

    blocks = -(-deltas[0].numel() // parameters.m)
    taken = torch.zeros(blocks, parameters.m, dtype=torch.bool, device=deltas[0].device)
    kept = []
    for delta, expert in zip(deltas, context.experts, strict=True):
        own = delta.new_zeros(blocks * parameters.m)
        own[: delta.numel()] = delta.reshape(-1)
        own = own.view(blocks, parameters.m)
        key = stream_key(context.seed, "cabs", expert, context.tensor)
        pruned = torch.where(_chosen(own, taken, parameters.n, key), own, 0.0)
        taken = taken | (pruned != 0)
        kept.append(pruned.reshape(-1)[: delta.numel()].view_as(delta))
    return weighted_total(kept, context.weights)


def _chosen(values: Tensor, taken: Tensor, n: int, key: int) -> Tensor:
    """Mask of n elements in each block ``[blocks, m]``: those not taken first, then by magnitude, then by hash."""
    import torch

    from ktmerge.merge.kernels.radix import magnitude_bits
    from ktmerge.merge.kernels.splitmix import hashes

    positions = torch.arange(values.numel(), device=values.device).view_as(values)
    lots = (hashes(key, positions) ^ (-1 << 63)).argsort(dim=1, descending=True)  # unsigned order
    rank = magnitude_bits(values).long() + ((~taken).long() << 31) * (values != 0)
    order = lots.gather(1, rank.gather(1, lots).argsort(dim=1, descending=True, stable=True))
    return torch.zeros_like(taken).scatter_(1, order[:, :n], True)


_SUM = Stages(combine=("sum", {}))

method(
    Method(
        name="cabs",
        summary="Two or more experts: each keeps its largest changes where those before it (by name) keep none.",
        source="Yang et al., ICML 2025, arXiv:2503.01874",
        stages=Stages(combine=("cabs", {})),
        otherwise={"vector": _SUM},
        formula="sum_t w_t m_t tau_t, m_t: n of m by |tau_t|, outside m_1 .. m_{t-1} first",
        cost="N oi log m",
        promises=Promises(neutral={"n": 128}, identical="sum", experts=False, elements=False),
    )
)
