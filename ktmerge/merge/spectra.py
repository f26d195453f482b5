"""Singular values and vectors of deltas: what the spectral methods share.

Both come from the smaller Gram matrix in float64: for float32 data at least as exact as an SVD in float32, the median
that tells noise included, and far cheaper.
No function's result depends on the signs of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from ktmerge.merge.covariance import gram
from ktmerge.merge.decompositions import eigh
from ktmerge.merge.kernels.keys import stream_key
from ktmerge.merge.matrices import by_map, changed
from ktmerge.merge.regression import leading
from ktmerge.merge.weights import relative

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.merge.stage import Context

Rule = Literal["rank", "fraction", "energy", "nuclear", "stable", "participation"]

NOISE = 1e-5
"""Singular values below this share of the largest are rounding; their vectors are arbitrary."""
_SMALL = 512
_FEW = 32
"""Matrices of at least `_SMALL` rows and columns are sampled for fewer than one in `_FEW` of their directions."""
_SPARE = 16
_BLOCK = 512
"""Columns worked on at a time."""
_ITERATIONS = 4


@dataclass(frozen=True)
class Spectrum:
    """U diag(s) V^T, float64.

    Attributes:
        left: U ``[o, r]``.
        values: s ``[r]``, from the largest to the smallest.
        right: V ``[i, r]``.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def matrix(self) -> Tensor:
        """The matrix of these triplets, ``[o, i]``."""
        return (self.left * self.values) @ self.right.T

    def product(self, other: Spectrum) -> float:
        """The inner product of the two matrices, which are not made."""
        sides = (self.left.T @ other.left) * (self.right.T @ other.right)
        return float(self.values @ sides @ other.values)

    def first(self, count: int) -> Spectrum:
        """The triplets of the ``count`` largest values."""
        return Spectrum(self.left[:, :count], self.values[:count], self.right[:, :count])


@dataclass(frozen=True)
class OneSided:
    """Singular values s and the vectors of a matrix's shorter side, float64.

    Attributes:
        values: s ``[m]``, m = min(o, i), from the largest to the smallest; exact to 1e-8 of the largest.
        vectors: ``[m, m]``: U if the matrix has no more outputs than inputs, else V.
    """

    whole: Tensor
    values: Tensor
    vectors: Tensor

    @property
    def is_left(self) -> bool:
        """Whether the vectors are U."""
        return self.whole.shape[0] <= self.whole.shape[1]

    def filtered(self, factors: Tensor) -> Tensor:
        """U diag(g s) V^T for factors g ``[k]`` of the k largest values, 0 for the others."""
        own = self.vectors[:, : factors.numel()]
        (short, count), wide = own.shape, max(self.whole.shape)
        if short * (count + wide) < 2 * count * wide:
            projector = (own * factors) @ own.T
            return projector @ self.whole if self.is_left else self.whole @ projector
        if self.is_left:
            return (own * factors) @ (own.T @ self.whole)
        return (self.whole @ own * factors) @ own.T

    def above(self, floor: float = NOISE) -> int:
        """How many values are above ``floor`` times the largest."""
        return int((self.values > floor * self.values[:1]).sum())

    def coordinates(self, count: int) -> Tensor:
        """S V^T = U^T of the whole ``[count, i]``, of the ``count`` largest values."""
        own = self.vectors[:, :count]
        return own.T @ self.whole if self.is_left else (own * self.values[:count]).T

    def back(self, coordinates: Tensor) -> Tensor:
        """U coordinates ``[o, n]``, of coordinates ``[r, n]`` along the r largest values, none of them 0."""
        count = coordinates.shape[0]
        own = self.vectors[:, :count]
        if self.is_left:
            return own @ coordinates
        return self.whole @ (own @ (coordinates / self.values[:count].unsqueeze(1)))

    def responses(self, others: Sequence[Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
        """<a_r, b_r> and ||b_r||^2, ``[count]`` each, of a_r = u_r^T whole and b_r = u_r^T other, for every other."""
        own, values = self.vectors[:, :count], self.values[:count].unsqueeze(1)
        found = [(values.new_zeros(count), values.new_zeros(count)) for _ in others]

        def add(number: int, answers: Tensor, response: Tensor) -> None:
            along, energy = found[number]
            along += (answers * response).sum(1)
            energy += (response**2).sum(1)

        if not self.is_left:
            for number, other in enumerate(others):
                add(number, values * own.T, own.T @ (self.whole.T @ other.double()) / values)
            return found
        for start in range(0, self.whole.shape[1], _BLOCK):
            part = slice(start, start + _BLOCK)
            answers = own.T @ self.whole[:, part]
            for number, other in enumerate(others):
                add(number, answers, own.T @ other[:, part].double())
        return found

    def inner(self, other: Tensor, count: int) -> Tensor:
        """U^T other V of the first triplets, ``[count, count]``, for another ``[o, i]``."""
        own, values = self.vectors[:, :count], self.values[:count]
        if self.is_left:
            return own.T @ (other @ self.whole.T) @ own / values
        return (own.T @ (self.whole.T @ other) @ own) / values.unsqueeze(1)

    def outer(self, core: Tensor) -> Tensor:
        """U core V^T of the first triplets ``[o, i]``, as many as ``core [count, count]`` is of."""
        count = core.shape[0]
        own, values = self.vectors[:, :count], self.values[:count]
        if self.is_left:
            return (own @ (core / values) @ own.T) @ self.whole
        return self.whole @ (own @ (core / values.unsqueeze(1)) @ own.T)

    def top(self, count: int, floor: float = NOISE) -> Spectrum:
        """The triplets of the ``count`` largest values above ``floor`` times the largest."""
        if not self.values.numel():
            return Spectrum(self.whole[:, :0], self.values, self.whole.T[:, :0])
        count = min(count, self.above(floor))
        own, values = self.vectors[:, :count], self.values[:count]
        if self.is_left:
            return Spectrum(own, values, self.whole.T @ own / values)
        return Spectrum(self.whole @ own / values, values, own)


def one_sided(matrix: Tensor) -> OneSided:
    """Singular values and the shorter side's vectors of ``[o, i]``."""
    whole = matrix.double()
    values, vectors = eigh(gram(whole.T if whole.shape[0] <= whole.shape[1] else whole))
    return OneSided(whole, values.flip(0).clamp(min=0).sqrt(), vectors.flip(1))


def top(matrix: Tensor, count: int, draw: Callable[[int], Tensor]) -> Spectrum:
    """The ``count`` largest singular triplets of ``[o, i]``; no triplets of values that are rounding.

    A few of a large matrix are found by subspace iteration from a random start (arXiv:0909.4061, algorithm 4.4), which
    is exact to about the gap between their values and the next.

    Args:
        matrix: any.
        count: r.
        draw: gives so many random numbers, from a keyed stream: see `draws`.
    """
    import torch

    outputs, inputs = matrix.shape
    if min(outputs, inputs) < _SMALL or count * _FEW > min(outputs, inputs):
        return one_sided(matrix).top(count)
    width = count + _SPARE
    basis = matrix @ draw(inputs * width).view(inputs, width).to(matrix)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(basis)[0]
        basis = matrix @ torch.linalg.qr(matrix.T @ basis)[0]
    basis = torch.linalg.qr(basis)[0].double()
    inner = one_sided(basis.T @ matrix.double()).top(count)
    return Spectrum(basis @ inner.left, inner.values, inner.right)


def polar(stack: Tensor) -> Tensor:
    """A B^T of the SVD A S B^T of ``[n, r]``, without the directions whose value is rounding.

    Vectors that are given twice leave no direction for the second: a full polar factor would put any there.
    """
    found = one_sided(stack)
    if not found.values.numel() or not float(found.values[0]) > 0:
        return found.whole
    kept = found.values[found.values > NOISE * found.values[0]]
    return found.filtered(1 / kept)


def rank_of(values: Tensor, rule: Rule, rank: int, share: float) -> int:
    """How many of the singular values ``[m]``, in descending order, a rule takes.

    Args:
        values: s.
        rule: ``rank``: as many; ``fraction`` of m; the fewest that hold a share of sum s^2 (``energy``) or of sum s
            (``nuclear``); the ``stable`` rank sum s^2 / s_1^2; the ``participation`` (sum s)^2 / sum s^2. Rounded up.
        rank: of that rule.
        share: the fraction or share.
    """
    positive = int((values > 0).sum())
    if rule == "rank":
        return min(rank, positive)
    return min(leading(values[:positive] ** 2, rule, share, values.numel()), positive)


def threshold(values: Tensor, shape: tuple[int, int]) -> float:
    """Gavish and Donoho's singular value threshold for unknown noise (arXiv:1305.5870; arXiv:2605.20296).

    omega(beta) median(s) / mu_beta, beta = min(o, i) / max(o, i), omega^2 = 2 (beta + 1) + 8 beta /
    ((beta + 1) + sqrt(beta^2 + 14 beta + 1)), mu_beta the root of the Marchenko-Pastur distribution's median.
    """
    beta = min(shape) / max(shape)
    omega = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    return omega * noise(values, shape)


def noise(values: Tensor, shape: tuple[int, int]) -> float:
    """sigma sqrt(max(o, i)) of the i.i.d. noise that would have the same median singular value.

    A singular value of pure noise lies between 1 - sqrt(beta) and 1 + sqrt(beta) times this.
    """
    count = values.numel()
    descending = values.double()
    middle = float(descending[(count - 1) // 2] + descending[count // 2]) / 2
    return middle / math.sqrt(marchenko_pastur_median(min(shape) / max(shape)))


@cache
def marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko-Pastur distribution of ratio beta in (0, 1] and variance 1.

    With x = 1 + beta - 2 sqrt(beta) cos(phi) its density is 2 sin(phi)^2 / (pi x) dphi, whose integral has a closed
    form; the rest is bisection.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"a ratio of {beta} is not in (0, 1]")
    root = math.sqrt(beta)

    def below(phi: float) -> float:
        angle = math.atan2((1 + root) * math.sin(phi / 2), (1 - root) * math.cos(phi / 2))
        return (math.sin(phi) * root + (1 + beta) * phi / 2 - (1 - beta) * angle) / (math.pi * beta)

    low, high = 0.0, math.pi
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < 0.5 else (low, middle)
    return 1 + beta - 2 * root * math.cos(low)


def draws(context: Context) -> Callable[[int], Tensor]:
    """Random numbers in (-1/2, 1/2) for `top`, from a stream of this tensor and, within a transform, this expert."""
    key = stream_key(context.seed, "subspace", context.expert, context.tensor)

    def draw(count: int) -> Tensor:
        words = context.kernels.words(key, 0, count, context.base.device)
        return (words.double() + 0.5) / 2**32 - 0.5

    return draw


def transformed(delta: Tensor, context: Context, change: Callable[[Tensor, Tensor], Tensor], *, fused: bool) -> Tensor:
    """One expert's delta, with ``change(tau [o, i], base [o, i])`` for each map that it changed; the rest as it is."""

    def one(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        return change(maps[0], base) if changed(maps, base) else maps[0]

    return by_map([delta], context, one, fused=fused)


def combined(deltas: list[Tensor], context: Context, merge: Callable[[list[Tensor]], Tensor], *, fused: bool) -> Tensor:
    """Each map ``merge(members)``, zero where it has none."""
    import torch

    def one(maps: list[Tensor], base: Tensor, number: int) -> Tensor:
        own = members(maps, base, context)
        return merge(own).float() if own else torch.zeros_like(base)

    return by_map(deltas, context, one, fused=fused)


def least_response(delta: Tensor, base: Tensor) -> float:
    """What ||u^T tau|| of an expert's delta has to exceed not to be rounding, along a direction u of all experts'.

    fp32 weights are rounded by 2^-24 of their size, which turns directions of nearly equal strength into one another by
    many times that: 2^-18 of the base is taken for it, but at least 1e-4 and at most 1e-2 of the delta.
    """
    import torch

    size, floor = float(delta.norm(dtype=torch.float64)), 2.0**-18 * float(base.norm(dtype=torch.float64))
    return min(max(floor, 1e-4 * size), 1e-2 * size)


def members(maps: Sequence[Tensor], base: Tensor, context: Context) -> list[Tensor]:
    """tau_t w_t / mean |w| of the experts that changed this map and have a weight; float32 like the deltas."""
    numbers = [number for number in changed(maps, base) if context.weights[number] != 0]
    if not numbers:
        return []
    weights = relative([context.weights[number] for number in numbers])
    return [maps[n] if weight == 1 else maps[n] * weight for n, weight in zip(numbers, weights, strict=True)]


def total(deltas: Iterable[Tensor]) -> Tensor:
    """sum_t tau_t ``[o, i]`` in float64, of one or more, taken one at a time."""
    rest = iter(deltas)
    added = next(rest).double()
    for delta in rest:
        added = added + delta.double()
    return added
