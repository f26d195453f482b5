"""Which entries of a delta stay, block of columns by block, and how the others' effect is passed on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ktmerge.merge.compensation import factor_of
from ktmerge.merge.ranking import largest

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.merge.covariance import Covariance

Score = Literal["wanda", "delta_obs", "mag", "up_aware", "paper"]

_STEP = 16
"""Columns that errors are passed on between one at a time; beyond them, so many at once."""


@dataclass(frozen=True)
class Tailor:
    """One linear map and what its inputs are like; everything float64.

    Attributes:
        base: theta_0 ``[o, i]``.
        inputs: H, positive definite.
        felt: sqrt(C_jj) of the tuned model's inputs, ``[i]``.
        upstream: kappa + sqrt(C_jj) of the base's inputs, ``[i]``; only for score ``up_aware``.
        score: what is kept.
        density: fraction of each block that is kept.
        block: columns in a block.
        key: of the hash that decides ties.
    """

    base: Tensor
    inputs: Covariance
    felt: Tensor
    upstream: Tensor | None
    score: Score
    density: float
    block: int
    key: int

    def mask(self, delta: Tensor) -> Tensor:
        """What stays of ``delta [o, i]`` when nothing is passed on."""
        import torch

        blocks, pivots = self._blocks(), self.felt
        if self.score in ("delta_obs", "paper"):
            pivots = factor_of(self.inputs, blocks).pivots
        return torch.cat([self._kept(delta[:, part], part, pivots) for part in blocks], 1)

    def swept(self, delta: Tensor, sign: int) -> Tensor:
        """Column by column: those not kept become 0, and later ones get ``sign`` times their error R_jk / R_jj."""
        import torch

        blocks = self._blocks()
        left, factor = delta.T.contiguous(), factor_of(self.inputs, blocks)
        for part in blocks:
            factor.settle(left, part)
            own, pivots = left[part], factor.pivots[part].unsqueeze(1)
            kept = self._kept(own.T, part, factor.pivots).T
            errors = _passed(own, factor.within(part), torch.where(kept, 0.0, sign / pivots))
            own.masked_fill_(~kept, 0.0)
            factor.hand_on(left, part, errors)
        return left.T

    def _blocks(self) -> list[slice]:
        inputs = self.base.shape[1]
        return [slice(start, min(start + self.block, inputs)) for start in range(0, inputs, self.block)]

    def _kept(self, delta: Tensor, part: slice, pivots: Tensor) -> Tensor:
        """Mask of a block's entries, given the delta there; R's diagonal is used by the scores that need it."""
        scores = self._scores(delta, part, pivots[part])
        return largest(scores, math.floor(self.density * scores.numel()), self.key + part.start)

    def _scores(self, delta: Tensor, part: slice, pivots: Tensor) -> Tensor:
        size = delta.abs()
        if self.score == "mag":
            return size
        if self.score == "delta_obs":
            return (delta / pivots) ** 2
        if self.score == "paper":
            return _standard(size) / 2 + _standard(((self.base[:, part] + delta) / pivots) ** 2) / 2
        felt = size * self.felt[part]
        return felt if self.upstream is None else felt / self.upstream[part]


def _passed(left: Tensor, factor: Tensor, rates: Tensor) -> Tensor:
    """Errors ``[b, o]`` of a block's columns, its rows of ``left [b, o]`` changed by those before them.

    Args:
        left: what is there; changed in place.
        factor: R between them, ``[b, b]``.
        rates: error over what is there, ``[b, o]``; 0 of what stays.
    """
    import torch

    errors, wide = torch.empty_like(left), left.shape[0]
    for start in range(0, wide, _STEP):
        stop = min(start + _STEP, wide)
        for column in range(start, stop):
            torch.mul(left[column], rates[column], out=errors[column])
            left[column + 1 : stop].addr_(factor[column, column + 1 : stop], errors[column])
        left[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop])
    return errors


def _standard(values: Tensor) -> Tensor:
    """Each row less its mean, over its standard deviation; rows of equal values become 0."""
    import torch

    apart = values - values.mean(1, keepdim=True)
    spread = (apart**2).mean(1, keepdim=True).sqrt()
    return torch.where(spread > 0, apart / spread, 0.0)
