"""CABS: n of every m changes, each expert's where those before it kept none."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Parameters, Promises, Stages, Tensor


class CabsParameters(Parameters):
    n: int = Field(64, ge=0, description="how many changes stay in each block")
    m: int = Field(128, ge=1, description="elements of a block, in the order of the file")


def _objection(parameters: CabsParameters, weights: Mapping[str, float]) -> str | None:
    if parameters.n > parameters.m:
        return f"n = {parameters.n} of m = {parameters.m} cannot stay; choose n up to m"
    return None


@stage("cabs", "combine", CabsParameters, objection=_objection, grain=lambda given, _: given.m)
def cabs(deltas: list[Tensor], parameters: CabsParameters, context: Context) -> Tensor:
    """Sum of n:m pruned deltas that avoid one another as far as they can (arXiv:2503.01874).

    Expert by expert, in the order of their names: of every block of m elements the n largest changes stay, first of
    those that no expert before it kept, then, if they are fewer than n, of the others. Equal magnitudes are decided by
    a hash. The last block is filled up with zeros. Expert weights are the paper's lambda_t.
    Differs from the published code, which fails where m does not divide the number of elements, ranks in fp16, and
    knows two experts.
    """
    import torch
    from torch.nn.functional import pad

    count = deltas[0].numel()
    m = max(1, min(parameters.m, count))  # where there is but one block, it is not filled up
    blocks = -(-count // m)
    positions = torch.arange(context.start, context.start + blocks * m, device=deltas[0].device).view(blocks, m)
    taken = torch.zeros(blocks, m, dtype=torch.bool, device=deltas[0].device)
    kept = []
    for delta, expert in zip(deltas, context.experts, strict=True):
        own = pad(delta, (0, blocks * m - count)).view(blocks, m)
        key = stream_key(context.seed, "cabs", expert, context.tensor)
        pruned = torch.where(_chosen(own, taken, positions, min(parameters.n, m), key), own, 0.0)
        taken = taken | (pruned != 0)
        kept.append(pruned.reshape(-1)[:count])
    return weighted_total(kept, context.weights)


def _chosen(values: Tensor, taken: Tensor, positions: Tensor, n: int, key: int) -> Tensor:
    """Mask of n elements in each block ``[blocks, m]``: those not taken first, then by magnitude, then by hash."""
    import torch

    from ktmerge.merge.rows import ranks_of

    m = values.shape[1]
    if n in (0, m):
        return torch.full_like(taken, n == m)
    order = ranks_of(values, positions, key)
    if bool(taken.any()):
        order = torch.where(~taken & (values != 0), order + m, order)
        least = order.kthvalue(m - n + 1, dim=1, keepdim=True).values
        return order >= least
    return order >= m - n


method(
    name="cabs",
    summary="Two or more experts: each keeps its largest changes where those before it (by name) keep none.",
    source="Yang et al., ICML 2025, arXiv:2503.01874",
    stages=Stages(combine=("cabs", {})),
    otherwise={"vector": Stages(combine=("sum", {}))},
    formula="sum_t w_t m_t tau_t, m_t: n of m by |tau_t|, outside m_1 .. m_{t-1} first",
    cost="N oi log m",
    promises=Promises(neutral={"n": 128}, identical="sum", experts=False, elements=False),
    semantics=2,
)
