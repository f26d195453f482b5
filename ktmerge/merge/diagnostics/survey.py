"""The one pass over base and tuned models: every weight is read once, on all cores, in memory of fixed size.

Loads numba and no torch. Sums are taken in the order of the tensors, so that threads do not show in the last digit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import BITS
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.reader import Reader
from ktmerge.checkpoints.workers import Workers
from ktmerge.merge.device import cores
from ktmerge.merge.diagnostics.measures import Movement, Pair, Spread
from ktmerge.progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE = 1 << 18
"""Elements worked on at a time by one thread."""

_ULPS = {"BF16": (-126, 7), "F16": (-14, 10), "F32": (-126, 23), "F64": (-1022, 52)}
"""Per type of a base: the exponent of its least normal number, and the bits of its fraction."""


@dataclass
class Piece:
    """What a piece, or all pieces of a tensor so far, showed; arrays as `ktmerge.merge.kernels.distances` says."""

    count: int
    broken: NDArray[Any]
    own: NDArray[Any]
    sums: NDArray[Any]
    largest: NDArray[Any]
    histograms: NDArray[Any]
    dots: NDArray[Any]
    signs: NDArray[Any]

    @classmethod
    def empty(cls, count: int, experts: int) -> Piece:
        """All zero, of ``count`` elements."""
        import numpy as np

        from ktmerge.merge.kernels.bins import BINS

        pairs = experts * (experts - 1) // 2
        whole = np.int64
        return cls(
            count, np.zeros(experts + 1, whole), np.zeros(1), np.zeros((experts, 2)), np.zeros(experts, whole),
            np.zeros((experts, BINS), whole), np.zeros(pairs), np.zeros((pairs, 2), whole),
        )  # fmt: skip

    def add(self, other: Piece) -> None:
        """Add what another piece of the same tensor showed."""
        import numpy as np

        self.count += other.count
        np.maximum(self.largest, other.largest, out=self.largest)
        for name in ("broken", "own", "sums", "histograms", "dots", "signs"):
            getattr(self, name)[...] += getattr(other, name)


@dataclass(frozen=True)
class Surveyed:
    """One tensor of the base and what its counterparts showed.

    Attributes:
        broken: values that are infinite or NaN, by model; the base is ``""``. Only where there are any.
        movements: by model that has the tensor.
        spreads: the same.
        pairs: by every two of these models.
    """

    name: str
    broken: dict[str, int]
    movements: dict[str, Movement]
    spreads: dict[str, Spread]
    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)


def survey(
    base: Checkpoint,
    names: Sequence[str],
    others: Mapping[str, Checkpoint],
    mappings: Mapping[str, Mapping[str, str]],
    progress: Progress,
) -> Iterator[Surveyed]:
    """Measure tensors of the base against their counterparts, one after the other.

    Args:
        base: the base.
        names: its tensors to look at, of float types.
        others: tuned models by name.
        mappings: per tuned model, base name -> its name, as `Alignment.mapping`.
        progress: where to report.

    Raises:
        KtmergeError: a file cannot be read, or was changed meanwhile.
    """
    found = [rows for rows in (_rows(base, name, others, mappings) for name in names) if rows.names]
    total = sum(rows.info.nbytes for rows in found)
    with ExitStack() as stack:
        readers = {name: stack.enter_context(checkpoint.reader()) for name, checkpoint in {"": base, **others}.items()}
        step = stack.enter_context(progress.task("inspect", total, "bytes"))
        whole: Piece | None = None
        for rows, piece in _in_order(_Worker(readers), found):
            step.advance(rows.info.nbytes * piece.count / max(rows.info.numel, 1))
            if whole is None:
                whole = piece
            else:
                whole.add(piece)
            if whole.count == rows.info.numel:
                yield rows.result(whole)
                whole = None
        for reader in readers.values():
            reader.check_unchanged()


@dataclass(frozen=True)
class _Rows:
    """A tensor of the base and its counterparts: their names by model, and all types, the base's first."""

    info: TensorInfo
    names: dict[str, str]
    types: list[str]

    def result(self, whole: Piece) -> Surveyed:
        """What all pieces together showed."""
        models, norm = list(self.names), float(whole.own[0])
        broken = {model: int(count) for model, count in zip(["", *models], whole.broken, strict=True) if count}
        movements = {
            model: Movement(norm, float(delta), float(along), whole.count, whole.count - int(unchanged))
            for model, (delta, along), unchanged in zip(models, whole.sums, whole.histograms[:, 0], strict=True)
        }
        largest = whole.largest.view("float64")
        spreads = {model: Spread(whole.histograms[i], float(largest[i])) for i, model in enumerate(models)}
        pairs = {
            (a, b): Pair(float(dot), movements[a].delta, movements[b].delta, int(both), int(opposed))
            for (a, b), dot, (both, opposed) in zip(combinations(models, 2), whole.dots, whole.signs, strict=True)
        }
        return Surveyed(self.info.name, broken, movements, spreads, pairs)


def _rows(
    base: Checkpoint, name: str, others: Mapping[str, Checkpoint], mappings: Mapping[str, Mapping[str, str]]
) -> _Rows:
    names = {model: mapping[name] for model, mapping in mappings.items() if name in mapping}
    info = base.tensors[name]
    return _Rows(info, names, [info.dtype, *(others[model].tensors[there].dtype for model, there in names.items())])


class _Worker:
    """Reads and measures pieces, from any thread, each with a buffer of its own."""

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self._readers = readers
        self._local = threading.local()

    def piece(self, rows: _Rows, start: int) -> Piece:
        """Measure the elements from ``start`` on."""
        import numpy as np

        from ktmerge.merge.kernels.distances import KINDS, measure

        count = min(PIECE, rows.info.numel - start)
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.empty((len(self._readers), PIECE * 8), np.uint8)
        buffer: NDArray[np.uint8] = self._local.buffer[: len(rows.types)]
        places = [("", rows.info.name), *rows.names.items()]
        for row, (model, name), tag in zip(buffer, places, rows.types, strict=True):
            self._readers[model].read_into(name, start, row[: count * (BITS[tag] // 8)].data)
        piece = Piece.empty(count, len(rows.names))
        measure(
            buffer, np.array([KINDS[tag] for tag in rows.types]), count, *_ULPS[rows.info.dtype],
            piece.broken, piece.own, piece.sums, piece.largest, piece.histograms, piece.dots, piece.signs,
        )  # fmt: skip
        return piece


def _in_order(worker: _Worker, found: Sequence[_Rows]) -> Iterator[tuple[_Rows, Piece]]:
    """All pieces of all tensors, worked on some way ahead of where the caller is."""
    threads = cores()
    places = [(rows, start) for rows in found for start in range(0, max(rows.info.numel, 1), PIECE)]
    with Workers(threads, "inspect") as pool:
        pieces = pool.in_order((partial(worker.piece, rows, start) for rows, start in places), 2 * threads)
        for (rows, _), piece in zip(places, pieces, strict=True):
            yield rows, piece
