"""One number per tensor, row or head, in closed form: how much of the change upstream and downstream together want."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ktmerge.merge.methods.backmerge import NEEDS, TRUSTED, TrustParameters
from ktmerge.merge.registry import method, stage
from ktmerge.merge.stage import Context, Need, Promises, SplitFused, Stages, Tensor
from ktmerge.merge.weights import positive, shares

if TYPE_CHECKING:
    from ktmerge.merge.covariance import Covariance


class CoefficientParameters(TrustParameters):
    granularity: Literal["tensor", "row", "head"] = Field(
        "tensor", description="one number for each linear map, each of its outputs, or each attention head"
    )
    head_size: int | None = Field(None, ge=1, description="width of an attention head; needed for granularity head")
    covariance: Literal["inputs", "weights"] = Field(
        "inputs", description="what the inputs are like: as measured, or as the deltas and the base's weights tell"
    )
    split_fused: SplitFused = True


def _needs(parameters: CoefficientParameters) -> tuple[Need, ...]:
    return NEEDS if parameters.covariance == "inputs" else ()


def _objection(parameters: CoefficientParameters, weights: Mapping[str, float]) -> str | None:
    if parameters.granularity == "head" and parameters.head_size is None:
        return "granularity 'head' needs head_size, the width of an attention head (head_dim of the config)"
    return positive(parameters, weights)


@stage("cstar", "guard", CoefficientParameters, reach="tensor", needs=_needs, objection=_objection)
def cstar(merged: Tensor, deltas: list[Tensor], parameters: CoefficientParameters, context: Context) -> Tensor:
    """Scale M by the c that minimises (1-a) ||cM C_u^(1/2)||^2 + a sum_t w_t ||(cM - tau_t) C_t^(1/2)||^2.

    c = a sum_t w_t <tau_t, M>_t / (a sum_t w_t <M, M>_t + (1-a) <M, M>_u), <A, B>_t = tr(A C_t B^T), weights as shares
    of their sum; with one expert and M = tau, a e_d / ((1-a) e_u + a e_d) of the mean squared changes of the output.
    ``row``: the same of each output. ``head``: of each head's rows in the queries, keys and values, of its columns in
    the output projection, and ``tensor`` elsewhere. A change that nobody feels gets c = a. Covariance ``weights`` takes
    no data: C_t = tau_t^T tau_t / ||tau_t||^2 and C_u = theta_0^T theta_0 / ||theta_0||^2 stand for X^T X / R.
    """
    from ktmerge.merge.diagnostics.kinds import kind_of
    from ktmerge.merge.matrices import by_map
    from ktmerge.merge.sampled import Sampled

    sampled = Sampled(context, fused=parameters.split_fused) if parameters.covariance == "inputs" else None
    weights = shares(context.weights)
    size = parameters.head_size if parameters.granularity == "head" else None
    kind = kind_of(context.tensor)

    def scale(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        values, own = maps[0].double(), [one.double() for one in maps[1:]]
        wide = base.shape[1]
        if sampled is None:
            covariances = [_told_by(one) for one in (base, *maps[1:])]
        else:
            covariances = [sampled.covariance(expert, number, wide) for expert in ("", *context.experts)]
        if size is not None and kind == "o" and wide % size == 0:
            pieces = [
                values[:, part] * _ratios(
                    values[:, part], [one[:, part] for one in own], [_within(one, part) for one in covariances],
                    weights, parameters.a, base.shape[0],
                )
                for part in _blocks(wide, size)
            ]  # fmt: skip
            import torch

            return torch.cat(pieces, 1).float()
        group = base.shape[0]
        if parameters.granularity == "row":
            group = 1
        elif size is not None and kind in ("q", "k", "v", "qkv") and group % size == 0:
            group = size
        return (values * _ratios(values, own, covariances, weights, parameters.a, group)).float()

    return by_map([merged, *deltas], context, scale, fused=parameters.split_fused)


def _told_by(weights: Tensor) -> Covariance:
    """What weights or a delta tell of the inputs; nothing if they are zero."""
    from ktmerge.merge.covariance import of_delta, of_rows

    return of_delta(weights) if bool(weights.any()) else of_rows(weights[:0])


def _blocks(wide: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, wide, size))


def _within(one: Covariance, part: slice) -> Covariance:
    from ktmerge.merge.covariance import Covariance

    return Covariance(one.factor[:, part], one.diagonal[part])


def _ratios(
    merged: Tensor,
    deltas: Sequence[Tensor],
    covariances: Sequence[Covariance],
    weights: Sequence[float],
    a: float,
    group: int,
) -> Tensor:
    """c of every ``group`` rows, ``[o, 1]``; the base's covariance first."""
    import torch

    wanted, felt = torch.zeros_like(merged[:, 0]), torch.zeros_like(merged[:, 0])
    for share, one, delta in zip(weights, covariances[1:], deltas, strict=True):
        shared, whole = one.products([delta, merged], merged)
        wanted += a * share * shared
        felt += a * share * whole
    if a < 1:
        felt += (1 - a) * covariances[0].energy(merged)
    wanted, felt = (one.reshape(-1, group).sum(1) for one in (wanted, felt))
    ratios = torch.where(felt > 0, wanted / felt, a)
    return ratios.repeat_interleave(group).unsqueeze(1)


_PROMISES = Promises(neutral={"a": 1.0}, nothing={"a": 0.0}, identical="mean", elements=False, tolerance=1e-5)

method(
    name="cstar",
    summary="Some data of both sides: interpolate every tensor by the share that costs least; one knob for all.",
    source="ktmerge; WiSE-FT, arXiv:2109.01903, with a coefficient by least squares on outputs",
    stages=Stages(combine=("mean", {}), guard=(("cstar", {}),)),
    otherwise=TRUSTED,
    formula="c M, c = a <tau, M>_d / (a <M, M>_d + (1-a) <M, M>_u)",
    cost="N oi R",
    promises=_PROMISES,
    semantics=2,
)
method(
    name="cts_guard",
    summary="Several experts and some data: cts, then damped where upstream inputs feel it, and scaled to fit.",
    source="ktmerge; damping after AlphaEdit, arXiv:2410.02355",
    stages=Stages(combine=("cts", {}), guard=(("nullspace", {}), ("cstar", {}))),
    otherwise=TRUSTED,
    formula="c (cts) (I + kappa C_u / mean eigenvalue)^-1",
    cost="eigh min(i, N o)^3 + N oi R",
    promises=Promises(
        neutral={"kappa": 0.0, "a": 1.0}, nothing={"a": 0.0}, identical="mean", elements=False, tolerance=1e-5
    ),
    semantics=4,
)
