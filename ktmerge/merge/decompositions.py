"""Eigenvectors and singular vectors, kept on disk when asked: a sweep decomposes every matrix once.

Off unless ``KTMERGE_CACHE_GB`` is above 0 or `keeping` is in force. Entries are named by the content of the matrix and
what was done to it, so that nothing ever has to be invalidated; what was not used for longest goes first.

They are found on the CPU, whatever device the rest runs on, as no two devices agree in the last bits; on a GPU if
``KTMERGE_DECOMPOSE_ON`` asks for that.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge.device import choose_device

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "KTMERGE_CACHE_GB"
PLACE = "KTMERGE_DECOMPOSE_ON"

_SUFFIX = ".decomposition"
_UNFINISHED = ".writing-"
_DIGEST = 16
"""Bytes of xxh3 before an entry's content."""
_DEAD = 3600
"""Seconds after which an unfinished entry was left by a process that is no more."""


@dataclass(frozen=True)
class Store:
    """A folder of results, of a bounded size, shared by any number of threads and processes.

    An entry is written under a name of its own and then renamed, and checked against its digest when it is read: a torn
    or damaged one counts as none. A folder that cannot be written to keeps nothing, which is no error.

    Attributes:
        folder: where; made when the first entry is written.
        room: most bytes of all entries together.
    """

    folder: Path
    room: int

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The entry, or None if there is no whole one."""
        from safetensors.torch import load

        path = self.folder / (name + _SUFFIX)
        try:
            data = path.read_bytes()
            if xxhash.xxh3_128_digest(data[_DIGEST:]) != data[:_DIGEST]:
                path.unlink()
                return None
            os.utime(path)
        except OSError:
            return None
        return load(data[_DIGEST:])

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep an entry, and drop those not used for longest if there are too many."""
        from safetensors.torch import save

        data = save({key: values.cpu().contiguous() for key, values in tensors.items()})
        if len(data) + _DIGEST > self.room:
            return
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=_UNFINISHED, dir=self.folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(xxhash.xxh3_128_digest(data) + data)
                os.replace(temporary, self.folder / (name + _SUFFIX))
            except OSError:
                os.unlink(temporary)
                raise
            self._make_room()

    def _make_room(self) -> None:
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - _DEAD:
                    path.unlink()
        found = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):  # another process dropped it
                state = path.stat()
                found.append((state.st_mtime_ns, path.name, state.st_size))
        excess = sum(size for *_, size in found) - self.room
        for _, name, size in sorted(found):
            if excess <= 0:
                return
            with suppress(OSError):
                (self.folder / name).unlink()
            excess -= size


_stores: list[Store] = []
"""In force through `keeping`, the last one first."""


@contextmanager
def keeping(gigabytes: float, folder: Path | None = None) -> Iterator[None]:
    """Keep decompositions, in all threads, until the block ends; what is on disk then stays there.

    Args:
        gigabytes: most of all entries together; 0 keeps nothing.
        folder: where; ``decompositions`` in ktmerge's cache by default.
    """
    store = Store(folder or cache_folder() / "decompositions", int(gigabytes * 1e9))
    _stores.append(store)
    try:
        yield
    finally:
        _stores.remove(store)


def _store() -> Store | None:
    if _stores:
        return _stores[-1] if _stores[-1].room else None
    told = os.environ.get(VARIABLE)
    if not told:
        return None
    try:
        gigabytes = float(told)
    except ValueError:
        raise UsageError(f"{VARIABLE}: must be a number of gigabytes, not '{told}'.") from None
    return Store(cache_folder() / "decompositions", int(gigabytes * 1e9)) if gigabytes > 0 else None


def place() -> str:
    """Where decompositions are done: ``cpu``, or the device that the environment names.

    Raises:
        UsageError: it is not there.
    """
    return _place(os.environ.get(PLACE) or "cpu")


@cache
def _place(wanted: str) -> str:
    return choose_device(wanted, f"{PLACE}=")


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[n]``, ascending, and eigenvectors ``[n, n]`` in columns, of a symmetric matrix, in its type.

    Raises:
        UsageError: the environment asks for a cache of a size that is no number, or for a device that is not there.
        KtmergeError: that device's memory is full.
    """
    found = _kept(matrix, "eigh", _eigh)
    return found["values"], found["vectors"]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U ``[o, m]``, singular values ``[m]``, descending, and V^T ``[m, i]``, m = min(o, i), in the matrix's type.

    Raises:
        UsageError, KtmergeError: as for `eigh`.
    """
    found = _kept(matrix, "svd", _svd)
    return found["left"], found["values"], found["right"]


def _kept(matrix: Tensor, operation: str, compute: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    there = place()
    if there != "cpu":
        compute = partial(_elsewhere, compute, there)
    store = _store()
    if store is None:
        return compute(matrix)
    name = _name(matrix, operation, there)
    found = store.get(name)
    if found is None:
        found = compute(matrix)
        store.put(name, found)
    return {key: values.to(matrix.device) for key, values in found.items()}


def _elsewhere(compute: Callable[[Tensor], dict[str, Tensor]], there: str, matrix: Tensor) -> dict[str, Tensor]:
    import torch

    try:
        return {key: values.to(matrix.device) for key, values in compute(matrix.to(there)).items()}
    except torch.OutOfMemoryError as error:
        shape = " x ".join(map(str, matrix.shape))
        raise KtmergeError(
            f"{there}: out of memory for the decomposition of a {shape} matrix; free some of it, or unset {PLACE}."
        ) from error


def _name(matrix: Tensor, operation: str, there: str) -> str:
    """Of an entry: content, type, shape and operation; device, library and threads, as other bits could come out."""
    import torch

    digest = xxhash.xxh3_128(matrix.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    how = (operation, str(matrix.dtype), tuple(matrix.shape), there.partition(":")[0], torch.__version__)
    digest.update(repr((*how, torch.get_num_threads())).encode())
    return digest.hexdigest()


def _eigh(matrix: Tensor) -> dict[str, Tensor]:
    import torch

    values, vectors = torch.linalg.eigh(matrix)
    return {"values": values, "vectors": vectors}


def _svd(matrix: Tensor) -> dict[str, Tensor]:
    """On failure once more in float64 on the CPU, where the divide-and-conquer driver fails on other matrices."""
    import torch

    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        found = torch.linalg.svd(matrix.double().cpu(), full_matrices=False)
        left, values, right = (one.to(matrix) for one in found)
    return {"left": left, "values": values, "right": right}
