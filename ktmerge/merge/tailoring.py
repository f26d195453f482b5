"""Which entries of a delta stay, block of columns by block, and how the others' effect is passed on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ktmerge.merge.patching import inverse_factor
from ktmerge.merge.ranking import largest

if TYPE_CHECKING:
    from torch import Tensor

Score = Literal["wanda", "delta_obs", "mag", "up_aware", "paper"]


@dataclass(frozen=True)
class Tailor:
    """One linear map and what its inputs are like; everything float64.

    Attributes:
        base: theta_0 ``[o, i]``.
        moment: H ``[i, i]``, positive definite.
        felt: sqrt(C_jj) of the tuned model's inputs, ``[i]``.
        upstream: kappa + sqrt(C_jj) of the base's inputs, ``[i]``; only for score ``up_aware``.
        score: what is kept.
        density: fraction of each block that is kept.
        block: columns in a block.
        key: of the hash that decides ties.
    """

    base: Tensor
    moment: Tensor
    felt: Tensor
    upstream: Tensor | None
    score: Score
    density: float
    block: int
    key: int

    def mask(self, delta: Tensor) -> Tensor:
        """What stays of ``delta [o, i]`` when nothing is passed on."""
        import torch

        factor = inverse_factor(self.moment) if self.score in ("delta_obs", "paper") else self.moment
        return torch.cat([self._kept(delta[:, part], part, factor) for part in self._blocks()], 1)

    def swept(self, delta: Tensor, sign: int) -> Tensor:
        """Column by column: those not kept become 0, and later ones get ``sign`` times their error R_jk / R_jj."""
        import torch

        left, factor = delta.clone(), inverse_factor(self.moment)
        for part in self._blocks():
            kept = self._kept(left[:, part], part, factor)
            errors = torch.zeros_like(left[:, part])
            for column in range(part.start, part.stop):
                values, stays = left[:, column].clone(), kept[:, column - part.start]
                error = torch.where(stays, 0.0, values) / factor[column, column]
                left[:, column] = torch.where(stays, values, 0.0)
                left[:, column + 1 : part.stop] += sign * error.unsqueeze(1) * factor[column, column + 1 : part.stop]
                errors[:, column - part.start] = error
            left[:, part.stop :] += sign * errors @ factor[part, part.stop :]
        return left

    def _blocks(self) -> list[slice]:
        inputs = self.base.shape[1]
        return [slice(start, min(start + self.block, inputs)) for start in range(0, inputs, self.block)]

    def _kept(self, delta: Tensor, part: slice, factor: Tensor) -> Tensor:
        """Mask of a block's entries, given the delta there; R's diagonal is used by the scores that need it."""
        scores = self._scores(delta, part, factor.diagonal()[part])
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


def _standard(values: Tensor) -> Tensor:
    """Each row less its mean, over its standard deviation; rows of equal values become 0."""
    import torch

    apart = values - values.mean(1, keepdim=True)
    spread = (apart**2).mean(1, keepdim=True).sqrt()
    return torch.where(spread > 0, apart / spread, 0.0)
