"""The arithmetic of low-rank adapters: one folded tensor, piece by piece.

LoRA (arXiv 2106.09685): W' = W + s * B A. DoRA (arXiv 2402.09353, eq. 5): W' = m * (W + s * B A) / ||W + s * B A||, a
norm for each output. All in float64, in one order whatever the piece: over the rank one after the other, no BLAS;
rounded once.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ktmerge.checkpoints.adapted import AdaptedModule
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
    """``left [rows, r]`` times ``right [r, columns]``, for a tensor seen as a matrix ``[rows, columns]``.

    ``magnitude`` is DoRA's, one for each output.
    """

    left: Floats
    right: Floats
    magnitude: Floats | None = None

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes


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
    """One adapted tensor.

    Attributes:
        info: what is shown: F32, or F64 over an F64 weight.
        original: the weight's entry where ``weights`` reads it.
        weights: the reader that has it.
        load: reads the factors.
        shelf: keeps them.
        columns: the tensor is seen as a matrix of so many columns.
        scale: s.
        outputs_are_rows: whether an output of the layer is a row of that matrix (a linear layer) or a column of it
            (GPT-2's transposed layers, embeddings).
    """

    info: TensorInfo
    original: TensorInfo
    weights: Reader
    load: Callable[[], Factors]
    shelf: Shelf
    columns: int
    scale: float
    outputs_are_rows: bool

    def __post_init__(self) -> None:
        self._ratio: Floats | None = None
        self._lock = threading.Lock()

    def fill(self, start: int, target: memoryview) -> None:
        width = BITS[self.info.dtype] // 8
        factors = self.shelf.get(self.info.name, self.load)
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
        self.weights.read_into(self.original.name, row * self.columns + column, raw)
        left, right = factors.left[row:row_end], factors.right[:, column:column_end]
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
                for row, row_end, column, column_end in _rectangles(0, self.info.numel, self.columns):
                    block = self._sum(factors, row, row_end, column, column_end) ** 2
                    if self.outputs_are_rows:
                        squares[row:row_end] += _sum_rows(block)
                    else:
                        for one in block:
                            squares[column:column_end] += one
                with np.errstate(divide="ignore", invalid="ignore"):  # a zero norm gives what is not finite
                    self._ratio = magnitude / np.sqrt(squares)
            return self._ratio


def fold(
    module: AdaptedModule, info: TensorInfo, original: TensorInfo, weights: Reader, own: Reader, shelf: Shelf
) -> Fold:
    """The folded tensor of a module.

    Args:
        module: the adapter's part in it.
        info: what is shown.
        original: the weight's entry where ``weights`` reads it.
        weights: the reader that has it.
        own: the adapter's reader.
        shelf: keeps factors.
    """
    columns = 1 if module.is_bias else math.prod(info.shape[1:])
    load = partial(_load, module, own)
    return Fold(info, original, weights, load, shelf, columns, module.scale, module.outputs_are_rows)


def _load(module: AdaptedModule, own: Reader) -> Factors:
    factors = module.factors
    if module.is_bias:
        return Factors(_values(factors["lora_B.bias"], own), np.ones((1, 1)))
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
    if module.outputs_are_rows:
        return Factors(second, first, norms)
    return Factors(np.ascontiguousarray(first.T), np.ascontiguousarray(second.T), norms)


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
