"""Pieces of one tensor in base and experts, as fp32, here or on a device. Knows the plan; knows nothing about methods.

Loads torch with the first piece.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

from ktmerge.checkpoints.dtypes import torch_dtype
from ktmerge.checkpoints.reader import Reader, TensorReader
from ktmerge.checkpoints.workers import Workers
from ktmerge.errors import KtmergeError
from ktmerge.merge.measured import OpenStatistics, TensorMeasurements, stored_fisher
from ktmerge.merge.needs import BASE
from ktmerge.merge.plan import Plan, TensorPlan
from ktmerge.merge.pristine import DeviceReader, Pristine

if TYPE_CHECKING:
    from torch import Tensor

    from ktmerge.merge.lanes import Lanes

CHUNK = 1 << 17
"""Elements of a piece on the CPU: what is computed on the way stays in the cache."""
DEVICE_CHUNK = 1 << 20
"""The same on a device, which takes a while to begin with each."""
HELD = 128 << 20
"""Tensors of up to this many bytes, base and experts together, are read once and held while they are worked on."""


@dataclass(frozen=True)
class Chunk:
    """Elements ``start .. start + len(base)`` of one tensor, flat; experts in the plan's order.

    Attributes:
        base: theta_0, fp32, or fp64 if one of them is.
        own: theta_0 in its own type.
        experts: theta_t, each in its own type.
        deltas: tau_t = theta_t - theta_0.
        broken: where one of them is not finite, if that is allowed and there are any; deltas are 0 there, and experts
            the base.
    """

    start: int
    base: Tensor
    own: Tensor
    experts: tuple[Tensor, ...]
    deltas: tuple[Tensor, ...]
    broken: Tensor | None = None

    def part(self, start: int, stop: int) -> Chunk:
        """Some of its elements, by their indices in the chunk."""
        some = slice(start, stop)
        return Chunk(
            self.start + start,
            self.base[some],
            self.own[some],
            tuple(expert[some] for expert in self.experts),
            tuple(delta[some] for delta in self.deltas),
            None if self.broken is None else self.broken[some],
        )


class _Held(threading.local):
    """The tensor a thread works on, as it is in base and experts."""

    key: tuple[str, Lanes | None] = ("", None)
    values: Sequence[Tensor] = ()


class Sources:
    """Context manager that holds the open files of all inputs."""

    def __init__(self, plan: Plan, chunk: int | None = None, pristine: Pristine | None = None) -> None:
        self._plan = plan
        self._chunk = chunk
        self._keep_base = plan.recipe.output.not_finite == "keep_base"
        self._stack = ExitStack()
        if pristine is None:
            self.base: Reader = plan.base.reader()
            self.experts: dict[str, Reader] = {expert.name: expert.checkpoint.reader() for expert in plan.experts}
        else:
            self.base = pristine.reader(plan, None)
            self.experts = {expert.name: pristine.reader(plan, expert.name) for expert in plan.experts}
        self._placed = all(isinstance(one, DeviceReader) for one in (self.base, *self.experts.values()))
        self._statistics = {name: OpenStatistics(one, one.reader()) for name, one in plan.statistics.items()}
        self._held = _Held()
        self._checked: set[tuple[str, int]] = set()

    def __enter__(self) -> Sources:
        for reader in (self.base, *self.experts.values()):
            self._stack.enter_context(reader)
        for measured in self._statistics.values():
            self._stack.enter_context(measured.reader)
        return self

    def __exit__(self, *_: object) -> None:
        self._held = _Held()
        self._stack.close()

    def of(self, expert: str | None) -> Reader:
        """The reader of an expert, or of the base."""
        return self.base if expert is None else self.experts[expert]

    def check_unchanged(self) -> None:
        """Raise KtmergeError if an input file is not the one whose header was planned with."""
        for reader in (self.base, *self.experts.values()):
            reader.check_unchanged()
        for measured in self._statistics.values():
            measured.reader.check_unchanged()

    def measurements(self, tensor: TensorPlan, start: int, piece: Tensor) -> TensorMeasurements:
        """What was measured of the elements of a tensor from ``start`` on that ``piece`` holds, shaped like it."""
        return TensorMeasurements(self._statistics, tensor, start, tuple(piece.shape), piece.device)

    def stored_fisher(self, tensor: TensorPlan, *, with_base: bool) -> Sequence[tuple[TensorReader, str, float]] | None:
        """Where the Fisher information of a tensor in base and experts is, and its norms; None unless all is fp32.

        Without the base another's stands in its place.
        """
        found = [stored_fisher(self._statistics, tensor, owner) for owner in (BASE, *tensor.sources)]
        found[0] = found[0] if with_base else found[1]
        known = [one for one in found if one is not None]
        return known if len(known) == len(found) else None

    def chunks(
        self, tensor: TensorPlan, *, whole: bool = False, grain: int = 1, lanes: Lanes | None = None
    ) -> Iterator[Chunk]:
        """The tensor piece by piece, or in one piece; all but the last are of multiples of ``grain`` elements.

        With ``lanes`` they are on the device that these lead to.

        Raises:
            KtmergeError: an input is not finite somewhere; tensor, model and count are named.
        """
        total = tensor.info.numel
        size = self._chunk or (CHUNK if lanes is None else DEVICE_CHUNK)
        step = max(total, 1) if whole else max(1, size // grain) * grain
        pieces = [(start, min(start + step, total)) for start in range(0, total, step)]
        if len(pieces) < 2 or self._placed or self._is_held(tensor):
            for start, stop in pieces:
                yield self._chunk_of(tensor, start, self._native(tensor, start, stop, lanes))
            return
        with Workers(1, "read") as ahead:  # the next piece is read while this one is worked on
            coming = ahead.submit(self._read, tensor, 0, step, lanes)
            for (start, _), following in zip_longest(pieces, pieces[1:]):
                loaded = coming.result()
                if following is not None:
                    coming = ahead.submit(self._read, tensor, following[0], following[1], lanes)
                yield self._chunk_of(tensor, start, loaded())

    def _chunk_of(self, tensor: TensorPlan, start: int, native: Sequence[Tensor]) -> Chunk:
        import torch

        # A difference of fp64 weights is taken in fp64: in fp32 small changes would vanish before they are seen.
        wide = torch.float64 if any(raw.dtype == torch.float64 for raw in native) else torch.float32
        own, *experts = native
        base = own.to(wide)
        deltas = tuple(_difference(expert, base) for expert in experts)
        if (tensor.name, start) not in self._checked:
            for delta in deltas:
                if not math.isfinite(float(torch.stack(torch.aminmax(delta)).sum())):
                    if self._keep_base:
                        return _without_broken(start, base, own, experts, deltas)
                    self._refuse_not_finite(tensor)
            self._checked.add((tensor.name, start))
        return Chunk(start, base, own, tuple(experts), deltas)

    def _is_held(self, tensor: TensorPlan) -> bool:
        return not self._placed and tensor.info.nbytes * (1 + len(tensor.sources)) <= HELD

    def _native(self, tensor: TensorPlan, start: int, stop: int, lanes: Lanes | None) -> Sequence[Tensor]:
        """The same elements of base and experts, in their own types."""
        if not self._is_held(tensor):
            return self._read(tensor, start, stop, lanes)()
        held = self._held
        if held.key != (tensor.name, lanes):
            held.key, held.values = ("", None), ()
            held.values = self._read(tensor, 0, tensor.info.numel, lanes)()
            held.key = tensor.name, lanes
        return [whole[start:stop] for whole in held.values]

    def _read(self, tensor: TensorPlan, start: int, stop: int, lanes: Lanes | None) -> Callable[[], Sequence[Tensor]]:
        """Read them, or bring them on their way to the device; what to call where they are to be worked on."""
        owners = [(self.base, tensor.name, self._plan.base.tensors)]
        for name, source in tensor.sources.items():
            owners.append((self.experts[name], source, self._plan.expert(name).checkpoint.tensors))
        if lanes is not None and not self._placed:
            from ktmerge.merge.lanes import Load

            loads = [
                Load(partial(_fill, reader, name, start), stop - start, torch_dtype(tensors[name].dtype))
                for reader, name, tensors in owners
            ]
            return partial(lanes.receive, lanes.upload(loads))
        place = "cpu" if lanes is None else lanes.device
        found = [reader.read(name, start, stop).to(place) for reader, name, _ in owners]
        return lambda: found

    def _refuse_not_finite(self, tensor: TensorPlan) -> None:
        """Say whose values are not finite. A delta shows it, whichever of the two it comes from."""
        import torch

        owners = [("the base", self.base, tensor.name)]
        owners += [(f"expert '{name}'", self.experts[name], source) for name, source in tensor.sources.items()]
        for owner, reader, source in owners:
            count = 0
            for start in range(0, tensor.info.numel, DEVICE_CHUNK):
                piece = reader.read(source, start, min(start + DEVICE_CHUNK, tensor.info.numel))
                count += int((~torch.isfinite(piece)).sum())
            if count:
                found = f"{owner}: tensor '{source}' has {count} values that are NaN or infinite"
                hint = "give a sound checkpoint, or keep the base's value there with output.not_finite: keep_base"
                raise KtmergeError(f"{found}; blending would spread them: {hint}.")


def _fill(reader: Reader, name: str, start: int, begin: int, target: memoryview) -> None:
    reader.read_into(name, start + begin, target)


def _difference(expert: Tensor, base: Tensor) -> Tensor:
    """Expert less base, fp32, with no further copy of a whole tensor."""
    import torch

    found = torch.empty_like(base, dtype=torch.float32)
    step = CHUNK if base.device.type == "cpu" else max(1, base.numel())
    for start in range(0, base.numel(), step):
        part = slice(start, start + step)
        torch.sub(expert[part].to(base.dtype), base[part], out=found[part])
    return found


def _without_broken(
    start: int, base: Tensor, own: Tensor, experts: Sequence[Tensor], deltas: Sequence[Tensor]
) -> Chunk:
    """A piece in which nobody moved where a value is not finite; a base that itself is not finite is 0 there."""
    import torch

    broken = ~torch.isfinite(base)
    for values in (*experts, *deltas):
        broken |= ~torch.isfinite(values)
    sound = torch.where(torch.isfinite(base), base, 0.0)
    theirs = tuple(torch.where(broken, sound, expert.to(base.dtype)) for expert in experts)
    return Chunk(start, sound, own, theirs, tuple(torch.where(broken, 0.0, delta) for delta in deltas), broken)


def equal_bytes(first: Reader, name: str, second: Reader, other: str) -> bool:
    """Whether two tensors of the same type and shape are equal byte by byte."""
    pairs = zip(first.blocks(name), second.blocks(other), strict=True)
    return all(a == b for a, b in pairs)


def buffer_notes(plan: Plan, sources: Sources) -> list[str]:
    """What to say of buffers, always the base's, that an expert has otherwise."""
    found: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        if tensor.tensor_class != "buffer" or tensor.action != "base":
            continue
        for expert, source in tensor.sources.items():
            info = plan.expert(expert).checkpoint.tensors[source]
            same_kind = (info.dtype, info.shape) == (tensor.info.dtype, tensor.info.shape)
            if not same_kind or not equal_bytes(sources.base, tensor.name, sources.experts[expert], source):
                found.setdefault(expert, []).append(tensor.name)
    return [
        f"{expert}: {len(names)} buffers differ from the base's, which are kept ({', '.join(names[:3])})."
        for expert, names in found.items()
    ]
