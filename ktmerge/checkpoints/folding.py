"""The arithmetic of low-rank adapters: one folded tensor, piece by piece.

LoRA (arXiv 2106.09685): W' = W + s * B A. DoRA (arXiv 2402.09353, eq. 5): W' = m * (W + s * B A) / ||W + s * B A||, a
norm for each output. All in float64, in one order whatever the piece: over the rank one after the other, no BLAS;
rounded once.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ktmerge.checkpoints.adapted import AdaptedModule, Block, Grid
from ktmerge.checkpoints.dtypes import BITS
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.numbers import narrow, widen
from ktmerge.checkpoints.reader import Reader
from ktmerge.errors import KtmergeError

Floats = NDArray[np.float64]

_BLOCK = 1 << 15
"""Elements worked on at a time: they stay in the caches through all ranks."""
_HELD = 64 << 20
"""Bytes of factors that are kept between pieces."""


@dataclass(frozen=True)
class Factors:
    """``left [E, rows, r]`` times ``right [E, r, columns]``, for a stack of E matrices ``[rows, columns]``, or one.

    ``magnitude`` is DoRA's, one for each output of the one.
    """

    left: Floats
    right: Floats
    magnitude: Floats | None = None

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def cut(self, grid: Grid, outputs_are_rows: bool) -> Factors:
        """Those of some rows and columns of one matrix, as they lie in a file; DoRA needs all inputs of an output."""
        left, right = self.left[grid.matrix, grid.rows], self.right[grid.matrix][:, grid.columns]
        outputs = grid.rows if outputs_are_rows else grid.columns
        magnitude = None if self.magnitude is None else self.magnitude[outputs]
        if grid.turned:
            left, right = right.T, left.T
        return Factors(np.ascontiguousarray(left)[None], np.ascontiguousarray(right)[None], magnitude)


class Shelf:
    """Keeps what was loaded last, up to a number of bytes. Any thread may ask."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Factors] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, load: Callable[[], Factors]) -> Factors:
        """What ``load`` gives, loaded anew only if it was dropped."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        found = load()
        with self._lock:
            self._kept[name] = found
            while len(self._kept) > 1 and sum(one.nbytes for one in self._kept.values()) > _HELD:
                self._kept.popitem(last=False)
        return found


@dataclass
class Fold:
    """One adapted matrix: a tensor of a file, or elements of it that lie behind one another.

    Attributes:
        info: what is shown of the tensor: F32, or F64 over an F64 weight.
        original: the weight's entry where ``weights`` reads it.
        weights: the reader that has it.
        factors: gives those of the matrix.
        begin: its first element in the tensor.
        rows: how many it has.
        columns: how many it has.
        scale: s.
        outputs_are_rows: whether an output of the layer is a row of it (a linear layer) or a column (GPT-2's transposed
            layers, embeddings).
    """

    info: TensorInfo
    original: TensorInfo
    weights: Reader
    factors: Callable[[], Factors]
    begin: int
    rows: int
    columns: int
    scale: float
    outputs_are_rows: bool

    def __post_init__(self) -> None:
        self._ratio: Floats | None = None
        self._lock = threading.Lock()

    def fill(self, start: int, target: memoryview) -> None:
        """Fill ``target`` with the matrix's elements from its element ``start`` on."""
        width = BITS[self.info.dtype] // 8
        factors = self.factors()
        ratio = None if factors.magnitude is None else self._ratio_of(factors, factors.magnitude)
        for row, row_end, column, column_end in _rectangles(start, start + len(target) // width, self.columns):
            values = self._sum(factors, row, row_end, column, column_end)
            if ratio is not None:
                values *= ratio[row:row_end, None] if self.outputs_are_rows else ratio[None, column:column_end]
            position = (row * self.columns + column - start) * width
            raw = narrow(values, self.info.dtype)
            target[position : position + len(raw)] = raw.data

    def _sum(self, factors: Factors, row: int, row_end: int, column: int, column_end: int) -> Floats:
        """W + s * B A on a rectangle."""
        count = (row_end - row) * (column_end - column)
        raw = memoryview(bytearray(count * (BITS[self.original.dtype] // 8)))
        self.weights.read_into(self.original.name, self.begin + row * self.columns + column, raw)
        left, right = factors.left[0, row:row_end], factors.right[0, :, column:column_end]
        total = np.zeros((row_end - row, column_end - column))
        product = np.empty_like(total)
        for k in range(left.shape[1]):
            np.multiply(left[:, k, None], right[k, None, :], out=product)
            np.add(total, product, out=total)
        np.multiply(total, self.scale, out=total)
        return np.add(widen(raw, self.original.dtype).reshape(total.shape), total)

    def _ratio_of(self, factors: Factors, magnitude: Floats) -> Floats:
        """m / ||W + s * B A|| for each output; the sum of squares is taken once, in one order."""
        with self._lock:
            if self._ratio is None:
                squares = np.zeros(len(magnitude))
                for row, row_end, column, column_end in _rectangles(0, self.rows * self.columns, self.columns):
                    block = self._sum(factors, row, row_end, column, column_end) ** 2
                    if self.outputs_are_rows:
                        squares[row:row_end] += _sum_rows(block)
                    else:
                        for one in block:
                            squares[column:column_end] += one
                with np.errstate(divide="ignore", invalid="ignore"):  # a zero norm gives what is not finite
                    self._ratio = magnitude / np.sqrt(squares)
            return self._ratio


@dataclass(frozen=True)
class Folds:
    """A tensor with several matrices in it; what is in none is the weight's."""

    info: TensorInfo
    folds: Sequence[Fold]

    def fill(self, start: int, target: memoryview) -> None:
        width = BITS[self.info.dtype] // 8
        stop = start + len(target) // width
        for fold in self.folds:
            begin, end = max(start, fold.begin), min(stop, fold.begin + fold.rows * fold.columns)
            if begin < end:
                fold.fill(begin - fold.begin, target[(begin - start) * width : (end - start) * width])


def fold(
    parts: Sequence[tuple[AdaptedModule, Block]],
    info: TensorInfo,
    original: TensorInfo,
    weights: Reader,
    own: Reader,
    shelf: Shelf,
) -> Folds:
    """A folded tensor.

    Args:
        parts: the adapter's modules that have a part in it, and which.
        info: what is shown.
        original: the weight's entry where ``weights`` reads it.
        weights: the reader that has it.
        own: the adapter's reader.
        shelf: keeps factors.
    """
    folds: list[Fold] = []
    for module, block in parts:
        load = partial(shelf.get, module.name, partial(_load, module, own))
        for begin, grid in _matrices(module, block):
            if grid is None:
                rows, columns = module.shape[0], 1 if module.is_bias else math.prod(module.shape[1:])
                factors, outputs_are_rows = load, module.outputs_are_rows
            else:
                rows, columns = len(grid.rows), len(grid.columns)
                rows, columns = (columns, rows) if grid.turned else (rows, columns)
                factors = partial(_cut, load, grid, module.outputs_are_rows)
                outputs_are_rows = module.outputs_are_rows != grid.turned
            folds.append(Fold(info, original, weights, factors, begin, rows, columns, module.scale, outputs_are_rows))
    return Folds(info, _without_gaps(sorted(folds, key=lambda one: one.begin), info, original, weights))


def _matrices(module: AdaptedModule, block: Block) -> Iterator[tuple[int, Grid | None]]:
    """The matrices that a block consists of, with their first elements; None: the whole tensor is one."""
    if block.grid is not None or not module.is_stack:
        yield block.begin, block.grid
        return
    count, rows, columns = module.shape
    for number in range(count):
        begin = block.begin + number * rows * columns
        yield begin, Grid(number, np.arange(rows), np.arange(columns), False)


def _cut(load: Callable[[], Factors], grid: Grid, outputs_are_rows: bool) -> Factors:
    return load().cut(grid, outputs_are_rows)


def _without_gaps(folds: Sequence[Fold], info: TensorInfo, original: TensorInfo, weights: Reader) -> list[Fold]:
    """The same, with what no adapter changes folded with factors of rank 0."""
    found: list[Fold] = []
    ends = [0, *(one.begin + one.rows * one.columns for one in folds)]
    for end, following in zip(ends, [*(one.begin for one in folds), info.numel], strict=True):
        if end < following:
            size = following - end
            nothing = Factors(np.zeros((1, size, 0)), np.zeros((1, 0, 1)))
            found.append(Fold(info, original, weights, partial(_same, nothing), end, size, 1, 1.0, True))
    return sorted([*folds, *found], key=lambda one: one.begin)


def _same(factors: Factors) -> Factors:
    return factors


def _load(module: AdaptedModule, own: Reader) -> Factors:
    factors = module.factors
    if module.is_bias:
        return Factors(_values(factors["lora_B.bias"], own)[None], np.ones((1, 1, 1)))
    first, second = (_values(info, own) for info in module.pair)
    if module.tied and any(
        not np.array_equal(_values(info, own), factor.T)
        for info, factor in zip(module.tied, (first, second), strict=True)
    ):
        raise KtmergeError(
            f"{module.tied[0].file}: the adapter's '{module.tied[0].name}' is not its '{module.pair[0].name}', though "
            "its config ties them (ensure_weight_tying); save it again with PEFT."
        )
    magnitude = factors.get("lora_magnitude_vector")
    norms = None if magnitude is None else _values(magnitude, own).reshape(-1)
    experts = module.shape[0] if module.is_stack else 1
    inputs = first.reshape(experts, -1, first.shape[1])  # A [E r, in], an expert's rows behind one another
    outputs = second.reshape(len(second), -1, experts).transpose(2, 0, 1)  # B [out, r E], an expert's every E-th
    if module.outputs_are_rows:
        return Factors(np.ascontiguousarray(outputs), inputs, norms)
    return Factors(
        np.ascontiguousarray(inputs.transpose(0, 2, 1)), np.ascontiguousarray(outputs.transpose(0, 2, 1)), norms
    )


def _values(info: TensorInfo, own: Reader) -> Floats:
    """One of the adapter's tensors, seen as ``[first dimension, the others]``."""
    raw = memoryview(bytearray(info.nbytes))
    own.read_into(info.name, 0, raw)
    found = widen(raw, info.dtype)
    if not np.isfinite(found).all():
        raise KtmergeError(
            f"{info.file}: the adapter's tensor '{info.name}' has values that are NaN or infinite, which would spread; "
            "give a sound adapter."
        )
    return found.reshape(*info.shape[:1], -1)


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """The flat elements ``[start, stop)`` of a matrix as whole rows and pieces of rows, in order."""
    while start < stop:
        row, column = divmod(start, columns)
        if column or columns > _BLOCK or stop - start < columns:
            column_end = min(columns, column + min(stop - start, _BLOCK))
            yield row, row + 1, column, column_end
            start += column_end - column
        else:
            rows = min((stop - start) // columns, _BLOCK // columns)
            yield row, row + rows, 0, columns
            start += rows * columns


def _sum_rows(block: Floats) -> Floats:
    """The sum of each row, halves added to halves: an order that no library or processor changes."""
    while block.shape[1] > 1:
        half = (block.shape[1] + 1) // 2
        folded = block[:, :half].copy()
        folded[:, : block.shape[1] - half] += block[:, half:]
        block = folded
    return block[:, 0]
