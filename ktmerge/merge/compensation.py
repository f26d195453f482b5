"""What one input loses, made up for by those after it: R with R^T R = H^-1, block of columns by block.

Everything float64. Deltas are turned here, ``[i, o]``: what goes to one input lies together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ktmerge.merge.patching import inverse_factor

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.merge.covariance import Covariance


def factor_of(inputs: Covariance, parts: Sequence[slice]) -> Factor:
    """R of H, in the way that is less work.

    Args:
        inputs: H, positive definite.
        parts: the blocks, from the first column to the last.
    """
    rows, wide = inputs.factor.shape
    if 2 * rows < wide and bool((inputs.diagonal > 0).all()):
        return _Sampled(inputs, parts)
    return Factor(inverse_factor(inputs.dense()))


class Factor:
    """The upper triangular R ``[i, i]`` of a positive definite H, and errors on their way to later columns.

    Attributes:
        pivots: R_jj, ``[i]``.
    """

    def __init__(self, factor: Tensor) -> None:
        self._factor = factor
        self.pivots = factor.diagonal()

    def within(self, part: slice) -> Tensor:
        """R between the columns of one block, ``[b, b]``."""
        return self._factor[part, part]

    def settle(self, left: Tensor, part: slice) -> None:
        """Add to a block's rows of ``left [i, o]`` what earlier blocks handed on and is not there yet."""

    def hand_on(self, left: Tensor, part: slice, errors: Tensor) -> None:
        """Pass a block's errors ``[b, o]`` on to the rows of later blocks, each e_j times R_jk."""
        left[part.stop :].addmm_(self._factor[part, part.stop :].T, errors)


class _Sampled(Factor):
    """R of H = D + F^T F with few rows F ``[r, i]``, never written out: i r^2 instead of i^3.

    From the last block to the first, with P = (I + F_> D_>^-1 F_>^T)^-1 of the columns after block b and G = F_b^T P:
    K = D_b + G F_b is what H leaves of the block given later ones, R_bb the factor of K^-1,
    R_b> = A_b F_> D_>^-1 with A_b = -R_bb G, and P - A_b^T A_b is the next P.
    """

    def __init__(self, inputs: Covariance, parts: Sequence[slice]) -> None:
        import torch

        self._rows, self._diagonal = inputs.factor, inputs.diagonal
        self._within: dict[int, Tensor] = {}
        self._onward: dict[int, Tensor] = {}
        self._carried: Tensor | None = None
        rest = torch.eye(self._rows.shape[0], dtype=self._rows.dtype, device=self._rows.device)
        for part in reversed(parts):
            own = self._rows[:, part]
            seen = own.T @ rest
            self._within[part.start] = inverse_factor(seen @ own + self._diagonal[part].diag())
            self._onward[part.start] = -(self._within[part.start] @ seen)
            rest.addmm_(self._onward[part.start].T, self._onward[part.start], alpha=-1)
        self.pivots = torch.cat([self._within[part.start].diagonal() for part in parts])

    def within(self, part: slice) -> Tensor:
        return self._within[part.start]

    def settle(self, left: Tensor, part: slice) -> None:
        if self._carried is not None:
            left[part].addmm_((self._rows[:, part] / self._diagonal[part]).T, self._carried)

    def hand_on(self, left: Tensor, part: slice, errors: Tensor) -> None:
        passed = self._onward[part.start].T @ errors
        self._carried = passed if self._carried is None else self._carried.add_(passed)
