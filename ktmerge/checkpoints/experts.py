"""Mixtures of experts stored in two ways: one matrix an expert, or all of a layer stacked, gate above up.

Files have them one by one; models in memory, and what is saved from there as it is, have them stacked.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ktmerge.checkpoints.alignment import without_wrappers
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.derived import DerivedReader, Made, derive, shown
from ktmerge.checkpoints.dtypes import BITS
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.reader import Reader

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SINGLE = re.compile(
    r"^(?P<owner>.+)\.experts\.(?P<number>\d{1,5})\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_STYLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What gate, up and down are called."""

Singles = Mapping[str, dict[int, dict[str, TensorInfo]]]


def fit_experts(base: Checkpoint, other: Checkpoint) -> Checkpoint:
    """``other`` with its experts stacked or single as the base's are; given back as it is where nothing is to be done.

    Only shapes that leave no doubt are taken: gate and up ``[E, 2 i, h]`` above each other, down ``[E, h, i]``; stacks
    whose matrices lie transposed are turned.
    """
    single, single_there = _singles(base), _singles(other)
    stacked, stacked_there = _stacks(base), _stacks(other)
    if single and not single_there and stacked_there:
        return _split(other, single, stacked_there)
    if stacked and not stacked_there and single_there:
        return _stack(other, stacked, single_there)
    return _turn(other, stacked, stacked_there)


def _turn(
    other: Checkpoint,
    stacks: Mapping[str, tuple[TensorInfo, TensorInfo]],
    theirs: Mapping[str, tuple[TensorInfo, TensorInfo]],
) -> Checkpoint:
    """Show stacks ``[E, in, out]`` as ``[E, out, in]`` where the base has them so, or the other way round.

    Qwen3-VL's mixtures are published the one way, and saved by transformers the other way.
    """
    pairs = [
        (info, own.shape)
        for owner, place in _owners(theirs, stacks).items()
        for info, own in zip(theirs[owner], stacks.get(place, ()), strict=False)
    ]
    turned = {one.name: own for one, own in pairs if one.shape != own == (*one.shape[:1], *one.shape[:0:-1])}
    if not turned:
        return other
    tensors = {
        name: shown(info, shape=turned[name]) if name in turned else info for name, info in other.tensors.items()
    }

    def opened() -> DerivedReader:
        source = other.reader()
        last: dict[tuple[str, int], NDArray[Any]] = {}
        return DerivedReader(tensors, source, {name: _Turned(other[name], source, last) for name in turned})

    return derive(
        other, tensors, opened, notes=(*other.notes, "its stacks of experts are turned to lie as the base's.")
    )


def _singles(checkpoint: Checkpoint) -> Singles:
    """Owner -> number -> leaf."""
    found: dict[str, dict[int, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    for name, info in checkpoint.tensors.items():
        if ".experts." in name and (match := _SINGLE.match(name)):
            found[match["owner"]][int(match["number"])][match["leaf"]] = info
    return found


def _stacks(checkpoint: Checkpoint) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Owner -> gate and up (or up alone), and down; without biases, as gpt-oss has them, gate and up interleaved."""
    found = {}
    for name, info in checkpoint.tensors.items():
        owner, _, leaf = name.rpartition(".experts.")
        if leaf in ("gate_up_proj", "up_proj") and f"{name}_bias" not in checkpoint.tensors:
            down = checkpoint.tensors.get(f"{owner}.experts.down_proj")
            if down is not None and len(info.shape) == len(down.shape) == 3:
                found[owner] = info, down
    return found


def _maps(raised: TensorInfo) -> int:
    """How many matrices of an expert a stack holds above each other."""
    return 2 if raised.name.endswith("gate_up_proj") else 1


def _split(other: Checkpoint, single: Singles, stacks: Mapping[str, tuple[TensorInfo, TensorInfo]]) -> Checkpoint:
    """Show each expert of a stack as the place in the file where it lies."""
    if type(other) is not Checkpoint:  # what is made while it is read lies nowhere
        return other
    owners = _owners(stacks, single)
    named = {leaf for numbers in single.values() for one in numbers.values() for leaf in one}
    style = next(style for style in _STYLES if named & set(style))
    tensors: dict[str, TensorInfo] = {}
    for name, info in other.tensors.items():
        owner, leaf = name.rpartition(".experts.")[::2]
        if owner not in owners or name not in (info.name for info in stacks[owner]):
            renamed = _renamed(name, owners)
            tensors[renamed] = replace(info, name=renamed)
            continue
        raised, lowered = stacks[owner]
        maps, (count, hidden, inner) = _maps(raised), lowered.shape
        if raised.shape != (count, maps * inner, hidden):
            return other
        leaves = style[2:] if leaf == "down_proj" else style[2 - maps : 2]
        shape = (hidden, inner) if leaf == "down_proj" else (inner, hidden)
        size, begin = inner * hidden * BITS[info.dtype] // 8, info.begin
        for number in range(count):
            for part in leaves:
                own = f"{owners[owner]}.experts.{number}.{part}.weight"
                tensors[own] = TensorInfo(own, info.dtype, shape, info.file, begin, begin + size)
                begin += size
    return replace(other, tensors=tensors, notes=(*other.notes, "its experts are stacked; they are taken one by one."))


def _stack(other: Checkpoint, stacks: Mapping[str, tuple[TensorInfo, TensorInfo]], single: Singles) -> Checkpoint:
    """Show the experts of each owner as one tensor."""
    owners = _owners(single, stacks)
    tensors = {_renamed(name, owners): info for name, info in other.tensors.items() if not _SINGLE.match(name)}
    places = {name: info.name for name, info in tensors.items()}
    joined: dict[str, list[TensorInfo]] = {}
    for owner, numbers in single.items():
        maps = len(numbers.get(0, ())) - 1  # gate and up, or up alone, and down
        if (
            set(numbers) != set(range(len(numbers)))
            or maps not in (1, 2)
            or any(len(one) != maps + 1 for one in numbers.values())
        ):
            return other
        for stack, leaves in (
            ("gate_up_proj" if maps == 2 else "up_proj", range(2 - maps, 2)),
            ("down_proj", range(2, 3)),
        ):
            names = [[style[leaf] for leaf in leaves] for style in _STYLES]
            chosen = next((one for one in names if all(set(one) <= set(given) for given in numbers.values())), None)
            if chosen is None:
                return other
            parts = [numbers[number][leaf] for number in range(len(numbers)) for leaf in chosen]
            if len({(part.dtype, part.shape) for part in parts}) != 1 or len(parts[0].shape) != 2:
                return other
            rows, columns = parts[0].shape
            name = f"{owners[owner]}.experts.{stack}"
            info = TensorInfo(name, parts[0].dtype, (len(numbers), rows * len(chosen), columns), parts[0].file, 0, 0)
            tensors[name], joined[name] = shown(info), parts

    def opened() -> DerivedReader:
        source = other.reader()
        made: dict[str, Made] = {name: _Joined(parts, source) for name, parts in joined.items()}
        made |= {name: _Joined([other.tensors[own]], source) for name, own in places.items() if name != own}
        return DerivedReader(tensors, source, made)

    return derive(other, tensors, opened, notes=(*other.notes, "its experts are single; they are taken as stacks."))


@dataclass(frozen=True)
class _Joined:
    """Tensors of one size behind one another."""

    parts: Sequence[TensorInfo]
    source: Reader

    def fill(self, start: int, target: memoryview) -> None:
        width, size = BITS[self.parts[0].dtype] // 8, self.parts[0].numel
        done = 0
        while done < len(target):
            number, offset = divmod(start + done // width, size)
            piece = target[done : done + (size - offset) * width]
            self.source.read_into(self.parts[number].name, offset, piece)
            done += len(piece)


@dataclass(frozen=True)
class _Turned:
    """A stack of matrices, each transposed; of all stacks together ``last`` keeps the one that was asked for last."""

    info: TensorInfo
    source: Reader
    last: dict[tuple[str, int], NDArray[Any]]

    def fill(self, start: int, target: memoryview) -> None:
        width = BITS[self.info.dtype] // 8
        size, done = self.info.shape[1] * self.info.shape[2], 0
        while done < len(target):
            number, offset = divmod(start + done // width, size)
            piece = target[done : done + (size - offset) * width]
            piece[:] = self._matrix(number)[offset * width : offset * width + len(piece)].data
            done += len(piece)

    def _matrix(self, number: int) -> NDArray[Any]:
        """One of them, turned, as bytes."""
        import numpy as np

        found = self.last.get((self.info.name, number))
        if found is None:
            _, rows, columns = self.info.shape
            width = BITS[self.info.dtype] // 8
            raw = bytearray(rows * columns * width)
            self.source.read_into(self.info.name, number * rows * columns, memoryview(raw))
            found = np.frombuffer(raw, f"u{width}").reshape(rows, columns).T.reshape(-1).view(np.uint8)
            self.last.clear()
            self.last[self.info.name, number] = found
        return found


def _owners(theirs: Iterable[str], base: Collection[str]) -> dict[str, str]:
    """The base's name of every block of experts: its own, or that of the only one in the same layer."""
    by_layer: dict[str, list[str]] = defaultdict(list)
    for owner in base:
        by_layer[_layer(owner)].append(owner)
    alone = {layer: owners[0] for layer, owners in by_layer.items() if len(owners) == 1}
    return {owner: owner if owner in base else alone.get(_layer(owner), owner) for owner in theirs}


def _layer(owner: str) -> str:
    return without_wrappers(owner.rpartition(".")[0])


def _renamed(name: str, owners: Mapping[str, str]) -> str:
    """The name of a tensor beside the experts, such as the router, in a block that the base calls otherwise."""
    for depth in range(name.count("."), 0, -1):
        owner = name.rsplit(".", depth)[0]
        if owner in owners:
            return owners[owner] + name[len(owner) :]
    return name
