"""Second moments of a linear map's inputs, kept as a few rows and a diagonal instead of a dense i x i matrix.

Everything in float64: ill-conditioned solves follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ktmerge.merge.decompositions import eigh

if TYPE_CHECKING:
    from torch import Tensor

Normalisation = Literal["fro2", "trace1", "none", "spectral"]

_BLOCK = 512
"""Columns worked on at a time."""

ZERO = 1e-12
"""Eigenvalues below this share of the largest are rounding, not directions."""


@dataclass(frozen=True)
class Frame:
    """Eigenvectors V of a covariance with eigenvalue above zero, V = ``rows``^T ``turn``, never multiplied out.

    Attributes:
        eigenvalues: ``[r]``, from the largest to the smallest.
        rows: ``[n, i]``, or None for the identity.
        turn: ``[n, r]``.
    """

    eigenvalues: Tensor
    rows: Tensor | None
    turn: Tensor

    def onto(self, values: Tensor) -> Tensor:
        """Coordinates ``[o, r]`` of the rows of ``values [o, i]``: values V."""
        return (values if self.rows is None else values @ self.rows.T) @ self.turn

    def of_rows(self, part: slice) -> Tensor:
        """Coordinates F V = U sqrt(lambda) of some of the rows themselves: nothing is to be multiplied."""
        return self.turn[part] * self.eigenvalues

    def back(self, coordinates: Tensor) -> Tensor:
        """The rows ``[o, i]`` that have these coordinates ``[o, r]``: coordinates V^T."""
        turned = coordinates @ self.turn.T
        return turned if self.rows is None else turned @ self.rows


@dataclass(frozen=True)
class Covariance:
    """C = ``factor``^T ``factor`` + diag(``diagonal``).

    Attributes:
        factor: ``[r, i]`` float64; r may be larger or smaller than i, or 0.
        diagonal: ``[i]`` float64, of 0 or more.
        scale: s, if ``factor`` is s times the delta that tells of these inputs.
    """

    factor: Tensor
    diagonal: Tensor
    scale: float | None = None

    @property
    def inputs(self) -> int:
        """i, the size of C."""
        return self.diagonal.shape[0]

    def variances(self) -> Tensor:
        """The diagonal of C, ``[i]``."""
        return (self.factor**2).sum(0) + self.diagonal

    def trace(self) -> float:
        """Sum of the eigenvalues."""
        return float(self.variances().sum())

    def scaled(self, by: float) -> Covariance:
        """C times a number of 0 or more."""
        if by == 1:
            return self
        return Covariance(self.factor * by**0.5, self.diagonal * by)

    def shrunk(self, eta: float) -> Covariance:
        """eta C + (1 - eta) diag(C): everything off the diagonal times eta."""
        if eta == 1:
            return self
        return Covariance((self.factor if eta else self.factor[:0]) * eta**0.5,
                          self.diagonal + (1 - eta) * (self.factor**2).sum(0))  # fmt: skip

    def ridged(self, ridge: float) -> Covariance:
        """C + ridge I."""
        return Covariance(self.factor, self.diagonal + ridge)

    def times(self, values: Tensor) -> Tensor:
        """values C, ``[o, i]``."""
        if self._is_long(values.shape[0]):
            return values @ self.dense()
        return (values @ self.factor.T) @ self.factor + values * self.diagonal

    def _is_long(self, outputs: int) -> bool:
        """Whether a product with so many rows is less work by way of the dense C."""
        rows = self.factor.shape[0]
        return 2 * outputs * rows > (outputs + rows) * self.inputs

    def products(self, firsts: Sequence[Tensor], second: Tensor) -> list[Tensor]:
        """<first, second>_C of each row, the diagonal of first C second^T, ``[o]`` of each of the firsts."""
        if self._is_long(second.shape[0]):
            felt = second @ self.dense()
            return [(one * felt).sum(1) for one in firsts]
        answers, felt = second @ self.factor.T, second * self.diagonal
        return [
            ((answers if one is second else one @ self.factor.T) * answers).sum(1) + (one * felt).sum(1)
            for one in firsts
        ]

    def energy(self, values: Tensor) -> Tensor:
        """Mean square of each output, the diagonal of values C values^T, ``[o]``."""
        return self.products([values], values)[0]

    def dense(self) -> Tensor:
        """C itself, ``[i, i]``."""
        import torch

        return gram(self.factor) + torch.diag(self.diagonal)

    def solve(self, values: Tensor) -> Tensor:
        """values C^-1 of a positive definite C; with fewer rows than inputs, in the space of the rows (Woodbury)."""
        import torch

        rows = self.factor.shape[0]
        if not rows:
            return values / self.diagonal
        if rows >= self.inputs or not bool((self.diagonal > 0).all()):
            return torch.cholesky_solve(values.T, torch.linalg.cholesky(self.dense())).T
        scaled = values / self.diagonal
        small = gram((self.factor / self.diagonal.sqrt()).T)
        small.diagonal().add_(1)
        weights = torch.cholesky_solve((scaled @ self.factor.T).T, torch.linalg.cholesky(small)).T
        return scaled - weights @ (self.factor / self.diagonal)

    def frame(self) -> Frame:
        """The eigenvectors of C; with fewer rows than inputs and no diagonal, from the rows' own Gram matrix.

        The dual costs r^3 instead of i^3.
        """
        dual = self.factor.shape[0] < self.inputs and not bool(self.diagonal.any())
        values, vectors = eigh(gram(self.factor.T) if dual else self.dense())
        values, vectors = values.flip(0), vectors.flip(1)
        known = int((values > ZERO * values[:1].clamp(min=0)).sum())
        values, vectors = values[:known], vectors[:, :known]
        return Frame(values, self.factor, vectors / values.sqrt()) if dual else Frame(values, None, vectors)


def gram(columns: Tensor) -> Tensor:
    """columns^T columns ``[n, n]``; only one of the two halves is worked out."""
    import torch

    wide = columns.shape[1]
    whole = columns.new_zeros(wide, wide)
    for start in range(0, wide, _BLOCK):
        part = slice(start, start + _BLOCK)
        torch.mm(columns[:, part].T, columns[:, start:], out=whole[part, start:])
        whole[start + _BLOCK :, part] = whole[part, start + _BLOCK :].T
    return whole


def of_inputs(inputs: Tensor, eta: float = 1.0) -> Covariance:
    """X^T X / R of sampled inputs ``[R, i]``, with everything off the diagonal times ``eta``."""
    sample = inputs.double() / max(inputs.shape[0], 1) ** 0.5
    return Covariance(sample, sample.new_zeros(sample.shape[1])).shrunk(eta)


def of_rows(rows: Tensor) -> Covariance:
    """rows^T rows, of ``[o, i]``."""
    factor = rows.double()
    return Covariance(factor, factor.new_zeros(factor.shape[1]))


def total(covariances: Sequence[Covariance], weights: Sequence[float]) -> Covariance:
    """sum_t alpha_t C_t, with weights of 0 or more."""
    import torch

    used = [one.scaled(weight) for one, weight in zip(covariances, weights, strict=True) if weight > 0]
    if not used:
        return covariances[0].scaled(0)
    return Covariance(torch.cat([one.factor for one in used]), torch.stack([one.diagonal for one in used]).sum(0))


def of_delta(delta: Tensor, norm: Normalisation = "fro2", power: float = 1.0) -> Covariance:
    """What a delta ``[o, i]`` tells of the inputs it was trained on: C = (tau^T tau / s)^q (arXiv:2503.08099).

    Args:
        delta: tau, not all zero.
        norm: s: the squared Frobenius norm, the squared spectral norm, or 1; ``trace1`` divides the power by its trace.
        power: q; below 1 flattens the spectrum.
    """
    whole = of_rows(delta)
    if power == 1 and norm != "spectral":
        scale = 1.0 if norm == "none" else whole.trace() ** -0.5
        return Covariance(whole.factor * scale if scale != 1 else whole.factor, whole.diagonal, scale)
    frame = whole.frame()
    values = frame.eigenvalues
    size = {"fro2": float(values.sum()), "spectral": float(values[0])}.get(norm, 1.0)
    powers = (values / size) ** power
    if norm == "trace1":
        powers = powers / powers.sum()
    return Covariance(frame.back(powers.sqrt().diag()), whole.diagonal)
