"""Inner products of deltas, per tensor, row or column, and weighted sums of deltas by coefficients found from them.

Norms, angles, means on the sphere: all that geometric methods ask of a tensor are its ``N x N`` inner products, and all
they answer are N coefficients. The products are summed as integers, so that they are the same whatever the order and
size of the pieces, the number of threads and the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.stage import Context

Granularity = Literal["tensor", "row", "column"]
_FROZEN = 1e-12
_INTEGER_BITS, _PRODUCT_BITS = 62, 52


@dataclass(frozen=True)
class Geometry:
    """Inner products of N deltas in each of G groups of elements.

    Attributes:
        products: ``[G, N, N]`` fp64, <tau_a, tau_b>.
        base: ``[G]`` fp64, ||theta_0||^2.
    """

    products: NDArray[Any]
    base: NDArray[Any]

    @cached_property
    def norms(self) -> NDArray[Any]:
        """``[G, N]``: ||tau_t||; exactly 0 for experts that did not move, that is up to 1e-12 ||theta_0||."""
        norms = np.sqrt(np.diagonal(self.products, axis1=1, axis2=2))
        return np.asarray(np.where(norms > _FROZEN * np.sqrt(self.base)[:, None], norms, 0.0))

    @cached_property
    def cosines(self) -> NDArray[Any]:
        """``[G, N, N]``; 0 for experts that did not move."""
        lengths = self.norms[:, :, None] * self.norms[:, None, :]
        return np.asarray(
            np.clip(np.divide(self.products, lengths, out=np.zeros_like(lengths), where=lengths > 0), -1.0, 1.0)
        )


class GramObserver:
    """Observer of a tensor's `Geometry`: the largest magnitudes first, then sums of products as multiples of 2**-s.

    With s as large as 62 bits allow for the tensor's size, a sum errs by less than 2**-34 of its largest product.
    """

    def __init__(self, granularity: Granularity) -> None:
        self._granularity = granularity
        self._largest: Tensor | None = None
        self._sums: Tensor | None = None
        self._exponents: Tensor | None = None
        self._bits = 0
        self.done = False

    def observe(self, values: list[Tensor], context: Context) -> None:
        vectors = [one.reshape(-1) for one in (*values, context.base)]
        count = vectors[0].numel()
        if not count:
            return
        index, groups = element_groups(context, self._granularity, count)
        if self._exponents is None:
            self._observe_largest(vectors, index, groups)
        else:
            self._observe_products(vectors, index, context)

    def end_pass(self) -> None:
        if self._exponents is None and self._largest is not None:
            self._exponents = torch.frexp(self._largest.double()).exponent.to(torch.int64)
        else:
            self.done = True

    def result(self) -> Geometry | None:
        """None of an empty tensor."""
        if self._sums is None or self._exponents is None:
            return None
        exponents = self._exponents.cpu().numpy().T  # [G, N + 1]
        pairs = exponents[:, :, None] + exponents[:, None, :] - self._bits
        everything = np.ldexp(self._sums.cpu().numpy().astype(np.float64), pairs)
        everything = everything + np.triu(everything, 1).swapaxes(1, 2)
        return Geometry(everything[:, :-1, :-1], everything[:, -1, -1])

    def _observe_largest(self, vectors: list[Tensor], index: Tensor | None, groups: int) -> None:
        if self._largest is None:
            self._largest = vectors[0].new_zeros(len(vectors), groups)
        for largest, vector in zip(self._largest, vectors, strict=True):
            if index is None:
                largest.copy_(torch.maximum(largest, vector.abs().max()))
            else:
                largest.scatter_reduce_(0, index, vector.abs(), "amax")

    def _observe_products(self, vectors: list[Tensor], index: Tensor | None, context: Context) -> None:
        exponents = self._exponents
        assert exponents is not None
        groups = exponents.shape[1]
        if self._sums is None:
            self._bits = min(_PRODUCT_BITS, _INTEGER_BITS - math.prod(context.shape).bit_length())
            self._sums = torch.zeros(groups, len(vectors), len(vectors), dtype=torch.int64, device=vectors[0].device)
        place = 0 if index is None else index
        scaled = [torch.ldexp(one.double(), -powers[place]) for one, powers in zip(vectors, exponents, strict=True)]
        base = len(vectors) - 1
        for a, first in enumerate(scaled):
            for b in range(a, len(scaled)):
                if b == base and a != base:
                    continue
                terms = (first * scaled[b] * 2.0**self._bits).round().to(torch.int64)
                if index is None:
                    self._sums[0, a, b] += terms.sum()
                else:
                    self._sums[:, a, b].index_add_(0, index, terms)


def combined(
    deltas: Sequence[Tensor], coefficients: NDArray[Any], granularity: Granularity, context: Context
) -> Tensor:
    """``sum_t c_t tau_t`` with the coefficients ``[G, N]`` of each element's group."""
    if coefficients.shape[0] == 1:
        return weighted_total(deltas, coefficients[0].tolist())
    index, _ = element_groups(context, granularity, deltas[0].numel())
    assert index is not None
    own = torch.from_numpy(coefficients.astype(np.float32)).to(deltas[0].device)
    total = deltas[0] * own[index, 0]
    for number, delta in enumerate(deltas[1:], 1):
        total += delta * own[index, number]
    return total


def element_groups(context: Context, granularity: Granularity, count: int) -> tuple[Tensor | None, int]:
    """The group of each of ``count`` elements from ``context.start`` on, or None if there is one, and how many.

    A row is what makes one output: of convolutions a filter, of vectors all of it; a column what one input goes to.
    """
    shape = context.shape
    if granularity == "tensor" or len(shape) < 2:
        return None, 1
    folded = context.tensor_class == "conv"
    rows, columns = (shape[0], math.prod(shape[1:])) if folded else (shape[-2], shape[-1])
    elements = torch.arange(context.start, context.start + count, device=context.base.device)
    if granularity == ("column" if context.layout is not None and context.layout.transposed else "row"):
        return elements // columns, math.prod(shape) // columns
    return elements // (rows * columns) * columns + elements % columns, math.prod(shape) // rows
