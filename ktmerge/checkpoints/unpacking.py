"""The arithmetic of quantised weights: codes and scales to numbers, piece by piece, in float64, rounded once to F32."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktmerge.checkpoints.folding import Floats
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.numbers import narrow, widen
from ktmerge.checkpoints.quantised import Packed, scale_grid
from ktmerge.checkpoints.reader import Reader
from ktmerge.errors import KtmergeError

Codes = NDArray[np.uint8]

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""The magnitudes of OCP's E2M1, by the lower three bits; the fourth is the sign."""
_STEP = 1 << 16
"""Elements worked on at a time."""


def unpack(group: Packed, info: TensorInfo, source: Reader) -> Unpacked:
    """The weight of a group, shown as ``info``."""
    kinds = {"scaled": Scaled, "int8": Rows, "mxfp4": Blocks, "bnb4": Nibbles}
    return kinds[group.kind](group, info, source)


class Unpacked:
    """One dequantised weight."""

    def __init__(self, group: Packed, info: TensorInfo, source: Reader) -> None:
        self._group = group
        self._info = info
        self._source = source

    def fill(self, start: int, target: memoryview) -> None:
        for begin in range(start, start + len(target) // 4, _STEP):
            end = min(begin + _STEP, start + len(target) // 4)
            raw = narrow(self._values(begin, end), "F32")
            target[(begin - start) * 4 : (end - start) * 4] = raw.data

    def _values(self, start: int, stop: int) -> Floats:
        raise NotImplementedError

    def _raw(self, role: str, start: int, stop: int) -> Codes:
        """Bytes of a stored tensor whose elements are bytes."""
        raw = memoryview(bytearray(stop - start))
        self._source.read_into(self._group.stored[role].name, start, raw)
        return np.frombuffer(raw, np.uint8)

    def _floats(self, role: str) -> Floats:
        """A stored tensor of floats, or of powers of two, as a whole."""
        info = self._group.stored[role]
        raw = memoryview(bytearray(info.nbytes))
        self._source.read_into(info.name, 0, raw)
        if info.dtype in ("U8", "F8_E8M0"):
            return np.exp2(np.frombuffer(raw, np.uint8).astype(np.float64) - 127)
        return widen(raw, info.dtype)


class Scaled(Unpacked):
    """FP8: the number a code stands for, times the scale of its tensor, row or block."""

    @cached_property
    def _scales(self) -> Floats:
        return self._floats("scales")

    @cached_property
    def _table(self) -> Floats:
        return fp8_table(self._group.stored["codes"].dtype)

    def _values(self, start: int, stop: int) -> Floats:
        grid = scale_grid(self._info.shape, self._group.stored["scales"].shape, self._group.block)
        assert grid is not None
        down, across, tall, wide = grid
        rows, columns = (1, 1, *self._info.shape)[-2:]
        row, column = np.divmod(np.arange(start, stop), columns)
        matrix, row = np.divmod(row, rows)
        place = (row // tall) * across + column // wide
        if len(self._scales) > 1:
            place += matrix * down * across
        values: Floats = self._table[self._raw("codes", start, stop)] * self._scales[place]
        return values


class Rows(Unpacked):
    """bitsandbytes' int8: q * SCB / 127, one SCB a row (arXiv 2208.07339)."""

    @cached_property
    def _scales(self) -> Floats:
        return self._floats("scales")

    def _values(self, start: int, stop: int) -> Floats:
        codes = self._raw("codes", start, stop).view(np.int8).astype(np.float64)
        return codes * self._scales[np.arange(start, stop) // self._info.shape[1]] / 127.0


class Blocks(Unpacked):
    """MXFP4 (OCP Microscaling 1.0) as gpt-oss stores it: ``blocks [E, o, G, 16]``, shown as ``[E, 32 G, o]``.

    Element 2 j of a block is the lower half of byte j, element 2 j + 1 the upper; a scale is 2^(byte - 127).
    """

    def __init__(self, group: Packed, info: TensorInfo, source: Reader) -> None:
        super().__init__(group, info, source)
        self._held: tuple[int, Codes, Floats] | None = None

    def _values(self, start: int, stop: int) -> Floats:
        _, inputs, outputs = self._info.shape
        found = []
        while start < stop:
            expert, place = divmod(start, inputs * outputs)
            end = min(stop, (expert + 1) * inputs * outputs)
            column, row = np.divmod(np.arange(place, place + end - start), outputs)
            codes, scales = self._expert(expert)
            byte = codes[row, column // 2]
            code = np.where(column % 2 == 0, byte & 15, byte >> 4)
            found.append(np.where(code & 8, -FP4[code & 7], FP4[code & 7]) * scales[row, column // 32])
            start = end
        return np.concatenate(found)

    def _expert(self, expert: int) -> tuple[Codes, Floats]:
        """One expert's codes ``[o, 16 G]`` and scales ``[o, G]``; the last are held."""
        held = self._held
        if held is None or held[0] != expert:
            _, inputs, outputs = self._info.shape
            half, groups = inputs * outputs // 2, inputs // 32 * outputs
            codes = self._raw("codes", expert * half, (expert + 1) * half).reshape(outputs, -1)
            bits = self._raw("scales", expert * groups, (expert + 1) * groups).reshape(outputs, -1)
            held = self._held = (expert, codes, np.exp2(bits.astype(np.float64) - 127))
        return held[1], held[2]


class Nibbles(Unpacked):
    """bitsandbytes' nf4 and fp4 (arXiv 2305.14314): the number a code stands for, times the maximum of its block.

    The first of two elements is the upper half of a byte. Double quantisation keeps the maxima as codes, too.
    """

    @cached_property
    def _state(self) -> dict[str, Any]:
        info = self._group.stored["state"]
        return dict(json.loads(self._raw("state", 0, info.nbytes).tobytes()))

    @cached_property
    def _map(self) -> Floats:
        return self._floats("map")

    @cached_property
    def _absmax(self) -> Floats:
        stored = self._group.stored
        if "nested_absmax" not in stored:
            return self._floats("absmax")
        codes = self._raw("absmax", 0, stored["absmax"].nbytes)
        outer, table = self._floats("nested_absmax"), self._floats("nested_map")
        block = self._number("nested_blocksize")
        found = table[codes] * outer[np.arange(len(codes)) // block] + float(self._state.get("nested_offset", 0.0))
        return found.astype(np.float32).astype(np.float64)

    def _number(self, key: str) -> int:
        value = self._state.get(key)
        if type(value) is not int or value < 1:
            raise KtmergeError(f"the quantised tensor '{self._info.name}' says its {key} is {value!r}.")
        return value

    def _values(self, start: int, stop: int) -> Floats:
        elements = np.arange(start, stop)
        byte = self._raw("codes", start // 2, (stop + 1) // 2)[elements // 2 - start // 2]
        code = np.where(elements % 2 == 0, byte >> 4, byte & 15)
        return self._map[code] * self._absmax[elements // self._number("blocksize")]


def fp8_table(tag: str) -> Floats:
    """What the 256 codes of F8_E4M3 (finite, no infinities) or F8_E5M2 stand for."""
    mantissa, bias = (3, 7) if tag == "F8_E4M3" else (2, 15)
    code = np.arange(256)
    exponent, fraction = (code & 127) >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
    size = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if tag == "F8_E4M3":
        size = np.where((code & 127) == 127, np.nan, size)
    else:
        size = np.where(exponent == 31, np.where(fraction == 0, np.inf, np.nan), size)
    return np.where(code & 128, -size, size)
