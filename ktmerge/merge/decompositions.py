"""Eigenvectors, kept on disk when asked: a sweep decomposes every matrix once.

Off unless ``KTMERGE_CACHE_GB`` is above 0 or `keeping` is in force. Entries are named by the content of the matrix and
what was done to it, so that nothing ever has to be invalidated; what was not used for longest goes first.

They are found on the CPU, whatever device the rest runs on, as no two devices agree in the last bits; on a GPU if
``KTMERGE_DECOMPOSE_ON`` asks for that, several of equal shape in one call.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import xxhash

from ktmerge.checkpoints.cache import cache_folder
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge.device import choose_device
from ktmerge.merge.lockstep import ask, lockstep

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

VARIABLE = "KTMERGE_CACHE_GB"
PLACE = "KTMERGE_DECOMPOSE_ON"

_SUFFIX = ".decomposition"
_UNFINISHED = ".writing-"
_DIGEST = 16
"""Bytes of xxh3 before an entry's content."""
_DEAD = 3600
"""Seconds after which an unfinished entry was left by a process that is no more."""
_SHARE = 0.25
"""Of a device's memory that one call's matrices take, at most, with all that is made of them."""
_COPIES = 5
"""Times its own size that a matrix takes there: itself, its eigenvectors, and what the solver works in."""
_HELD = 1 << 30
"""Bytes of what waits here for one call, at most."""


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
    there, store = place(), _store()
    name = "" if store is None else _name(matrix, there)
    found = None if store is None else store.get(name)
    if found is None:
        pair = _eigh(matrix) if there == "cpu" else ask([matrix], partial(_on_device, there))[0]
        found = dict(zip(("values", "vectors"), pair, strict=True))
        if store is not None:
            store.put(name, found)
    return found["values"].to(matrix.device), found["vectors"].to(matrix.device)


def together(work: Callable[[Item], Result], items: Sequence[Item], size: int = 0) -> list[Result]:
    """``[work(item) for item in items]``; where a device decomposes, it is given the matrices of several in one call.

    On the CPU one comes after the other, as that takes the least memory.

    Args:
        work: finds its eigenvectors by `eigh`.
        items: what it is done with.
        size: bytes that one takes, if many could take too much; as many as `_HELD` has room for go together.
    """
    import torch

    there = place()
    if there == "cpu" or len(items) < 2:
        return [work(item) for item in items]
    inside = partial(torch.inference_mode, torch.is_inference_mode_enabled())
    each = max(1, _HELD // size) if size else len(items)
    parts = [items[start : start + each] for start in range(0, len(items), each)]
    return [one for part in parts for one in lockstep(work, part, partial(_on_device, there), inside)]


def _on_device(there: str, matrices: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues and eigenvectors of each, in one call for all of the same shape and type that there is room for."""
    import torch

    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for number, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.dtype), []).append(number)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for (shape, dtype), numbers in alike.items():
        each = _most(there, shape.numel() * dtype.itemsize)
        for start in range(0, len(numbers), each):
            part = numbers[start : start + each]
            try:
                batch = torch.empty(len(part), *shape, dtype=dtype, device=there)
                for own, number in zip(batch, part, strict=True):
                    own.copy_(matrices[number])
                values, vectors = (one.to(matrices[part[0]].device) for one in _eigh(batch))
            except torch.OutOfMemoryError as error:
                size = " x ".join(map(str, shape))
                raise KtmergeError(
                    f"{there}: out of memory for the decomposition of {size} matrices ({len(part)} at once); free some "
                    f"of it, or unset {PLACE}."
                ) from error
            found.update(zip(part, zip(values, vectors, strict=True), strict=True))
    return [found[number] for number in range(len(matrices))]


def _most(there: str, size: int) -> int:
    """How many matrices of so many bytes go in one call.

    Of the device's whole memory, not of what is free: other batches could give other last bits.
    """
    import torch

    if not there.startswith("cuda"):
        return max(1, _HELD // (_COPIES * size or 1))
    return max(1, int(_SHARE * torch.cuda.get_device_properties(there).total_memory) // (_COPIES * size or 1))


def _name(matrix: Tensor, there: str) -> str:
    """Of an entry: content, type, shape and operation; device, library and threads, as other bits could come out."""
    import torch

    digest = xxhash.xxh3_128(matrix.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    how = ("eigh", str(matrix.dtype), tuple(matrix.shape), there.partition(":")[0], torch.__version__)
    digest.update(repr((*how, torch.get_num_threads())).encode())
    return digest.hexdigest()


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Of one ``[n, n]`` or several ``[N, n, n]``."""
    import torch

    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors
