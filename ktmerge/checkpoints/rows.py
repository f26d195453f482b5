"""Tables whose rows are taken from several tensors: how a vocabulary in another order, or of another size, is read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktmerge.checkpoints.dtypes import BITS
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.reader import Reader

if TYPE_CHECKING:
    from ktmerge.checkpoints.folding import Floats


@dataclass(frozen=True)
class Table:
    """A tensor to take rows from, and who reads it."""

    info: TensorInfo
    reader: Reader


Sources = Sequence[Sequence[tuple[int, int]]]
"""For each row what it is the mean of, each the number of a table and a row there; no row has none."""


@dataclass(frozen=True)
class Run:
    """Rows from ``start`` on that are those from ``first`` on of one table, or one row that is a mean."""

    start: int
    stop: int
    sources: tuple[tuple[int, int], ...]


def runs_of(sources: Sources) -> list[Run]:
    """Consecutive rows that lie behind one another joined."""
    runs: list[Run] = []
    for row, given in enumerate(sources):
        last = runs[-1] if runs else None
        if last is not None and len(given) == 1 == len(last.sources):
            (table, first), (number, place) = last.sources[0], given[0]
            if number == table and place == first + row - last.start:
                runs[-1] = Run(last.start, row + 1, last.sources)
                continue
        runs.append(Run(row, row + 1, tuple(given)))
    return runs


class Gathered:
    """One table as it is shown.

    Args:
        info: its header entry; of another type than a table's only if wider.
        tables: where rows come from.
        runs: which rows, as `runs_of` says.
    """

    def __init__(self, info: TensorInfo, tables: Sequence[Table], runs: Sequence[Run]) -> None:
        self._info = info
        self._tables = tables
        self._runs = runs
        self._starts = [run.start for run in runs]
        self._columns = info.numel // info.shape[0] if info.shape[0] else 1

    def fill(self, start: int, target: memoryview) -> None:
        width = BITS[self._info.dtype] // 8
        stop = start + len(target) // width
        for run, begin, end in self._pieces(start, stop):
            piece = target[(begin - start) * width : (end - start) * width]
            if len(run.sources) == 1:
                number, row = run.sources[0]
                self._take(self._tables[number], row * self._columns + begin - run.start * self._columns, piece)
            else:
                self._average(run, begin - run.start * self._columns, piece)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Run, int, int]]:
        """The runs that elements ``[start, stop)`` lie in, with the elements in each."""
        position = bisect_right(self._starts, start // self._columns) - 1
        while start < stop:
            run = self._runs[position]
            end = min(stop, run.stop * self._columns)
            yield run, start, end
            start, position = end, position + 1

    def _take(self, table: Table, start: int, target: memoryview) -> None:
        if table.info.dtype == self._info.dtype:
            table.reader.read_into(table.info.name, start, target)
            return
        from ktmerge.checkpoints.numbers import narrow

        target[:] = narrow(self._wide(table, start, len(target)), self._info.dtype).data

    def _average(self, run: Run, offset: int, target: memoryview) -> None:
        """The mean of several rows: summed in float64 in the order given, rounded once."""
        from ktmerge.checkpoints.numbers import narrow

        total = None
        for number, row in run.sources:
            values = self._wide(self._tables[number], row * self._columns + offset, len(target))
            total = values if total is None else total + values
        assert total is not None
        target[:] = narrow(total / len(run.sources), self._info.dtype).data

    def _wide(self, table: Table, start: int, nbytes: int) -> Floats:
        from ktmerge.checkpoints.numbers import widen

        count = nbytes // (BITS[self._info.dtype] // 8)
        raw = memoryview(bytearray(count * BITS[table.info.dtype] // 8))
        table.reader.read_into(table.info.name, start, raw)
        return widen(raw, table.info.dtype)
