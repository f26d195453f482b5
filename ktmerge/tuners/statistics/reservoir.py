"""A uniform sample of the rows that go by, of fixed size, and means over all of them, summed in fp64."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktmerge.errors import KtmergeError

Priorities = NDArray[np.uint64]


def priorities(seed: int, kind: str, example: int, count: int) -> Priorities:
    """Random 64-bit numbers of the first ``count`` rows of one example, uint64 ``[count]``.

    From a counter-based generator (Philox4x64, Salmon et al., SC 2011) keyed by seed and kind, with the example in the
    counter: a row has the same number in every module and whatever else goes by.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed} {kind}".encode(), digest_size=16).digest(), "little")
    words = [key & (2**64 - 1), key >> 64]
    return np.asarray(np.random.Philox(key=words, counter=[0, 0, example, 0]).random_raw(count), dtype=np.uint64)


class Reservoir:
    """The rows with the lowest priorities, kept in a file of scratch: memory does not grow with what is kept.

    Which row is in which place depends on the rows seen so far alone, so a run that goes on from a saved `state`, and
    is shown the rows after it again, ends with the same file.

    Args:
        path: the scratch file; made, or taken up.
        size: most rows to keep.
        width: numbers in a row.
    """

    def __init__(self, path: Path, size: int, width: int) -> None:
        # neither mapped, where a full disk is no error but a signal, nor kept open: mixtures have thousands of them
        path.touch()
        self._path, self._size, self.width = path, size, width
        self._order = np.empty((0, 3), np.uint64)
        self.count = 0
        self.square = torch.zeros(width, dtype=torch.float64)
        self.absolute = torch.zeros(width, dtype=torch.float64)

    @property
    def kept(self) -> int:
        """How many rows there are."""
        return len(self._order)

    def add(self, rows: Tensor, chances: Priorities, example: int, places: NDArray[np.int64]) -> None:
        """Show the next rows.

        Args:
            rows: ``[n, width]`` fp32.
            chances: uint64 ``[n]``; those with the lowest stay.
            example: number of the example they are of.
            places: int64 ``[n]``, their numbers in the example.
        """
        self.count += len(rows)
        self.square += rows.square().sum(0, dtype=torch.float64).cpu()
        self.absolute += rows.abs().sum(0, dtype=torch.float64).cpu()
        place = np.full(len(rows), example << 32, np.uint64) + places.astype(np.uint64)
        coming = np.stack([chances, place, np.full(len(rows), self._size, np.uint64)], axis=1)
        both = np.concatenate([self._order, coming])
        chosen = np.lexsort((both[:, 1], both[:, 0]))[: self._size]
        stays = np.sort(chosen[chosen < self.kept])
        comes = np.sort(chosen[chosen >= self.kept])
        is_free = np.ones(self._size, dtype=np.bool_)
        is_free[both[stays, 2].astype(np.int64)] = False
        free = np.flatnonzero(is_free)[: len(comes)]
        both[comes, 2] = free
        if len(comes):
            found = rows[torch.from_numpy(comes - self.kept).to(rows.device)].float().cpu().numpy()
            self._write(found, free)
        self._order = both[np.concatenate([stays, comes])]

    def sample(self) -> Tensor:
        """The rows kept, ``[kept, width]`` fp32, in the order in which they went by."""
        order = self._order[np.argsort(self._order[:, 1])]
        rows = np.fromfile(self._path, np.float32).reshape(-1, self.width)
        return torch.from_numpy(rows[order[:, 2].astype(np.int64)])

    def state(self) -> dict[str, Tensor]:
        """What has to be known to go on, beside the scratch file."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        return {
            "order": torch.from_numpy(self._order.astype(np.int64)),
            "count": torch.tensor(self.count),
            "square": self.square.clone(),
            "absolute": self.absolute.clone(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            KtmergeError: rows are missing in the scratch file.
        """
        self._order = state["order"].numpy().astype(np.uint64)
        if self._path.stat().st_size < 4 * self.width * self.kept:
            raise KtmergeError(f"{self._path}: lacks rows that were kept; start afresh with --overwrite.")
        self.count = int(state["count"])
        self.square, self.absolute = state["square"].clone(), state["absolute"].clone()

    def _write(self, rows: NDArray[np.float32], places: NDArray[np.intp]) -> None:
        """Put rows into places, which rise; neighbours at once."""
        ends = [*np.flatnonzero(np.diff(places) != 1) + 1, len(places)]
        start = 0
        with self._path.open("r+b") as file:
            for end in ends:
                file.seek(4 * self.width * int(places[start]))
                file.write(rows[start:end].tobytes())
                start = end
