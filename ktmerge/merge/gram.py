"""Inner products of deltas, per tensor, row or column, and weighted sums of deltas by coefficients found from them.

Norms, angles, means on the sphere: all that geometric methods ask of a tensor are its ``N x N`` inner products, and all
they answer are N coefficients. The products are summed as integers, so that they are the same whatever the order and
size of the pieces, the number of threads and the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktmerge.merge.arithmetic import weighted_total
from ktmerge.merge.geometry import HALF, Geometry, geometry_of, units
from ktmerge.merge.kernels.codes import BLOCK
from ktmerge.merge.kernels.native import Native, native
from ktmerge.merge.stage import Context

Granularity = Literal["tensor", "row", "column"]
_BLOCK = 1 << 15
"""Elements of a vector that are worked on at once: they stay in the cache."""


class GramObserver:
    """Observer of a tensor's `Geometry`: each group's largest magnitudes first, then the sums of products.

    Values become integers of 34 bits relative to the largest of their group, in two halves of 17: fp64 adds up the
    halves' products without rounding, so that matrix products may do it in any order.
    """

    def __init__(self, granularity: Granularity) -> None:
        self._granularity = granularity
        self._largest: Tensor | None = None
        self._exponents: Tensor | None = None
        self._sums: Tensor | None = None
        self.done = False

    def observe(self, values: list[Tensor], context: Context) -> None:
        vectors = [one.reshape(-1) for one in (*values, context.base)]
        if not vectors[0].numel():
            return
        _, groups = element_groups(context, self._granularity, 0)
        grid = _grid(context, self._granularity)
        compiled = native() if vectors[0].device.type == "cpu" and (grid is None or grid.by_row) else None
        if compiled is not None:
            self._observe_compiled(compiled, vectors, context.start, None if grid is None else grid.columns, groups)
            return
        for first, block in _blocks(vectors, context, self._granularity):
            if self._exponents is None:
                self._observe_largest(first, block, groups)
            else:
                self._observe_products(first, block, self._exponents)

    def end_pass(self) -> None:
        if self._exponents is None and self._largest is not None:
            self._exponents = torch.frexp(self._largest.double()).exponent
        else:
            self.done = True

    def result(self) -> Geometry | None:
        """None of an empty tensor."""
        if self._sums is None or self._exponents is None:
            return None
        return geometry_of(self._sums.cpu().numpy(), self._exponents.cpu().numpy().T)

    def _observe_compiled(
        self, kernels: Native, vectors: Sequence[Tensor], start: int, wide: int | None, groups: int
    ) -> None:
        """The same of rows of ``wide`` elements, or of all in one group."""
        count, size = len(vectors), vectors[0].numel()
        vectors = [one.contiguous() for one in vectors]
        for first, begin, rows, each in _rows(start, size, wide):
            own = slice(first, first + rows)
            if self._exponents is None:
                if self._largest is None:
                    self._largest = torch.zeros(count, groups)
                for largest, one in zip(self._largest, vectors, strict=True):
                    low, high = torch.aminmax(one[begin : begin + rows * each].view(rows, each), dim=1)
                    largest[own] = torch.maximum(largest[own], torch.maximum(high, -low))
                continue
            if self._sums is None:
                self._sums = torch.zeros(groups, 2 * count, 2 * count, dtype=torch.int64)
            unit = units(self._exponents[:, own].T.contiguous().numpy())
            places = np.array([one.data_ptr() // 4 + begin for one in vectors], np.int64)
            scratch = np.empty((2, count, BLOCK))
            kernels.products(
                0, places.ctypes.data, count, rows, each, unit.ctypes.data, self._sums[own].data_ptr(),
                scratch.ctypes.data,
            )  # fmt: skip

    def _observe_largest(self, first: int, block: Tensor, groups: int) -> None:
        if self._largest is None:
            self._largest = block.new_zeros(block.shape[0], groups)
        own = self._largest[:, first : first + block.shape[1]]
        own.copy_(torch.maximum(own, block.abs().amax(-1)))

    def _observe_products(self, first: int, block: Tensor, exponents: Tensor) -> None:
        count, groups = exponents.shape
        if self._sums is None:
            self._sums = torch.zeros(groups, 2 * count, 2 * count, dtype=torch.int64, device=block.device)
        own = slice(first, first + block.shape[1])
        unit = _powers_of_two(2 * HALF - 1 - exponents[:, own])
        integers = (block.double() * unit[..., None]).round_()
        high = (integers * 2.0**-HALF).round_()
        halves = torch.cat([high, integers - high * 2.0**HALF]).transpose(0, 1)
        self._sums[own] += (halves @ halves.transpose(1, 2)).to(torch.int64)


def _rows(start: int, size: int, wide: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Rows in a piece that begins with element ``start``: the first's number, its first element in the piece, how many
    there are, and how many elements of each; those cut off at either end by themselves."""
    if wide is None:
        yield 0, 0, 1, size
        return
    begin = 0
    while begin < size:
        row, within = divmod(start + begin, wide)
        rows = (size - begin) // wide if not within else 0
        each = wide if rows else min(wide - within, size - begin)
        yield row, begin, max(rows, 1), each
        begin += max(rows, 1) * each


def _blocks(vectors: list[Tensor], context: Context, granularity: Granularity) -> Iterator[tuple[int, Tensor]]:
    """Parts of a piece as ``[vectors, groups, members]``, with the number of their first group.

    What a piece lacks of the first and the last row is filled up with zeros, which add nothing.
    """
    start, stop = context.start, context.start + vectors[0].numel()
    grid = _grid(context, granularity)
    if grid is None:
        for low in range(0, stop - start, _BLOCK):
            yield 0, torch.stack([one[low : low + _BLOCK] for one in vectors])[:, None]
        return
    row, last = start // grid.columns, -(-stop // grid.columns)
    while row < last:
        end = min(row + max(1, _BLOCK // grid.columns), last)
        if not grid.by_row:
            end = min(end, (row // grid.rows + 1) * grid.rows)
        low, high = max(row * grid.columns, start), min(end * grid.columns, stop)
        part = torch.stack([one[low - start : high - start] for one in vectors])
        part = torch.nn.functional.pad(part, (low - row * grid.columns, end * grid.columns - high))
        part = part.view(len(vectors), end - row, grid.columns)
        if grid.by_row:
            yield row, part
        else:
            yield row // grid.rows * grid.columns, part.transpose(1, 2)
        row = end


def _powers_of_two(exponents: Tensor) -> Tensor:
    """2**e in fp64, by its bits: torch.ldexp goes by way of an fp32 power that may be off by its last bit."""
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64)


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


@dataclass(frozen=True)
class _Grid:
    """A tensor as matrices ``[rows, columns]`` one after another, grouped by row or by column."""

    rows: int
    columns: int
    by_row: bool


def _grid(context: Context, granularity: Granularity) -> _Grid | None:
    """None if the whole tensor is one group.

    A row is what makes one output: of convolutions a filter, of vectors all of it; a column what one input goes to.
    """
    shape = context.shape
    if granularity == "tensor" or len(shape) < 2 or not math.prod(shape):
        return None
    folded = context.tensor_class == "conv"
    rows, columns = (shape[0], math.prod(shape[1:])) if folded else (shape[-2], shape[-1])
    transposed = context.layout is not None and context.layout.transposed
    return _Grid(rows, columns, granularity == ("column" if transposed else "row"))


def element_groups(context: Context, granularity: Granularity, count: int) -> tuple[Tensor | None, int]:
    """The group of each of ``count`` elements from ``context.start`` on, or None if there is one, and how many."""
    grid = _grid(context, granularity)
    if grid is None:
        return None, 1
    elements = torch.arange(context.start, context.start + count, device=context.base.device)
    if grid.by_row:
        return elements // grid.columns, math.prod(context.shape) // grid.columns
    block = grid.rows * grid.columns
    return elements // block * grid.columns + elements % grid.columns, math.prod(context.shape) // grid.rows
