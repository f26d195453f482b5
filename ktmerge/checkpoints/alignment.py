"""Which tensor of another checkpoint is which tensor of the base, across the renames of library versions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from operator import or_

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.tying import settle_heads
from ktmerge.errors import UsageError

# Wrapper modules that come and go between versions; what is ignored grows from one level to the next.
_LEVELS = tuple(
    accumulate(
        (
            frozenset(names.split())
            for names in (
                "",
                "model module _orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module base_model",
                "language_model text_model",
                "vision_model transformer backbone",
            )
        ),
        or_,
    )
)
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}
# Weight norm: what torch called `weight_g` is `parametrizations.weight.original0` now.
_PARAMETRISED = re.compile(r"\bparametrizations\.(\w+)\.original([01])$")
_SHOWN = 3


@dataclass(frozen=True)
class Mismatch:
    """A tensor both have, in different shapes or as different kinds of numbers."""

    name: str
    base: TensorInfo
    other: TensorInfo

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.base.dtype} {list(self.base.shape)} in the base, "
            f"{self.other.dtype} {list(self.other.shape)} here)"
        )


@dataclass(frozen=True)
class Alignment:
    """How one checkpoint's tensors answer to the base's.

    Attributes:
        label: what messages call the other checkpoint.
        mapping: base name -> the other's name, for every tensor that fits.
        missing: base names with no counterpart; buffers, which are the base's anyway, aren't counted.
        extra: the other's names with no counterpart; buffers aren't counted.
        mismatched: pairs that don't fit together.
        ambiguous: base names for which more than one tensor could be meant.
        tied_extra: the other's explicit head -> its embedding, where the base ties the two; fine only if equal.
    """

    label: str
    mapping: dict[str, str]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    ambiguous: tuple[str, ...] = ()
    tied_extra: dict[str, str] = field(default_factory=dict)

    @property
    def renamed(self) -> dict[str, str]:
        """The part of the mapping where the names differ."""
        return {name: other for name, other in self.mapping.items() if name != other}

    def require_complete(self, kept: Collection[str] = ()) -> None:
        """Refuse a checkpoint that doesn't answer to the base tensor by tensor.

        Args:
            kept: base names that need no answer, as nothing is taken from this checkpoint there.

        Raises:
            UsageError: what is missing, too many, ambiguous or mismatched: the first few and how many.
        """
        mismatched = [one for one in self.mismatched if one.name not in kept]
        if mismatched:
            raise UsageError(f"{self.label}: {_mismatches(mismatched)}")
        ambiguous, missing = ([name for name in names if name not in kept] for names in (self.ambiguous, self.missing))
        troubles = []
        if ambiguous:
            troubles.append(f"{_some(ambiguous)} could be more than one of its tensors")
        if missing:
            troubles.append(f"lacks {len(missing)} of the base's tensors: {_some(missing)}")
        if self.extra:
            troubles.append(f"has {len(self.extra)} that the base lacks: {_some(self.extra)}")
        if troubles:
            dropped = "; what it was saved without can stay the base's by a where rule (keep: base)" if missing else ""
            raise UsageError(f"{self.label}: {'; '.join(troubles)}. It must be a fine-tune of this very base{dropped}.")

    def require_tied(self, other: Checkpoint) -> None:
        """Compare heads that the base ties to the embeddings but ``other`` stores: they must be equal byte by byte.

        Raises:
            UsageError: a head differs from its embedding, so ``other`` was tuned untied.
            KtmergeError: the weights cannot be read.
        """
        with other.reader() as first, other.reader() as second:
            for head, embedding in self.tied_extra.items():
                pairs = zip(first.blocks(head), second.blocks(embedding), strict=True)
                if not all(a == b for a, b in pairs):
                    raise UsageError(
                        f"{self.label}: its '{head}' differs from its '{embedding}', which the base ties together; "
                        "untie the base first, or tune with tied embeddings."
                    )


def align(base: Checkpoint, other: Checkpoint, label: str) -> Alignment:
    """Find for every tensor of ``base`` its counterpart in ``other``.

    Equal names first; what is left is matched under names without wrapper modules, as long as these stay unique in
    both checkpoints. Nothing is matched by shape or order alone.
    """
    mapping, ambiguous = _match(base.tensors, other.tensors)
    tied_extra = settle_heads(base, other, mapping)
    taken = {*mapping.values(), *tied_extra}
    fits = {name: found for name, found in mapping.items() if _fit(base.tensors[name], other.tensors[found])}
    return Alignment(
        label=label,
        mapping={name: fits[name] for name in base.tensors if name in fits},
        missing=tuple(n for n in base.tensors if n not in mapping and n not in ambiguous and not _buffer(base, n)),
        extra=tuple(n for n in other.tensors if n not in taken and not _buffer(other, n)),
        mismatched=tuple(
            Mismatch(name, base.tensors[name], other.tensors[mapping[name]])
            for name in base.tensors
            if name in mapping and name not in fits and not _buffer(base, name)
        ),
        ambiguous=tuple(name for name in base.tensors if name in ambiguous),
        tied_extra=tied_extra,
    )


def locate(names: Iterable[str], wanted: Iterable[str], label: str) -> dict[str, str]:
    """Find single tensors, as an adapter names them, among a model's ``names``; what isn't there is left out.

    Equal names first, then names without wrapper modules, at the strictest level at which one is left, then names
    with one leading module more or less.

    Raises:
        UsageError: one could be several of the model's, or two would be the same; ``label`` says whose they are.
    """
    wanted, names = list(wanted), list(names)
    there = set(names)
    levels = [_grouped(dropped, names) for dropped in _LEVELS[1:]]
    found: dict[str, str] = {}
    for name in wanted:
        candidates = [name] if name in there else []
        for dropped, groups in zip(_LEVELS[1:], levels, strict=True):
            candidates = candidates or groups.get(_canonical(name, dropped), [])
        if len(candidates) > 1:
            raise UsageError(f"{label}: '{name}' could be {_some(candidates)} of the model.")
        if candidates:
            found[name] = candidates[0]
    taken = set(found.values())
    found |= _pair_prefixed(
        [name for name in wanted if name not in found], [name for name in names if name not in taken]
    )
    owners: dict[str, str] = {}
    for name, place in found.items():
        if owners.setdefault(place, name) != name:
            raise UsageError(f"{label}: '{owners[place]}' and '{name}' would be one tensor of the model, '{place}'.")
    return found


def without_wrappers(module: str) -> str:
    """A module's path without what wraps models and language models in one version and not in another."""
    return ".".join(segment for segment in module.split(".") if segment not in _LEVELS[2])


def _match(base: Iterable[str], other: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Pair names; return the pairs, and the names of ``base`` that could be paired in more than one way."""
    base, other = list(base), list(other)
    there = set(other)
    mapping = {name: name for name in base if name in there}
    left_here = _grouped(_LEVELS[-1], (name for name in base if name not in mapping))
    left_there = _grouped(_LEVELS[-1], (name for name in other if name not in mapping))
    ambiguous: set[str] = set()
    for canonical in left_here.keys() & left_there.keys():
        here, found = left_here[canonical], left_there[canonical]
        pairs = _pair(here, found)
        if len(pairs) == len(here) == len(found):
            mapping |= pairs
        else:
            ambiguous.update(here)
    mapping |= _pair_prefixed(
        [name for canonical, names in left_here.items() if canonical not in left_there for name in names],
        [name for canonical, names in left_there.items() if canonical not in left_here for name in names],
    )
    return mapping, ambiguous


def _pair(here: list[str], there: list[str]) -> dict[str, str]:
    """Pair names that are alike under the strictest level at which they have only each other."""
    pairs: dict[str, str] = {}
    for dropped in _LEVELS:
        groups_here = _grouped(dropped, (name for name in here if name not in pairs))
        groups_there = _grouped(dropped, (name for name in there if name not in pairs.values()))
        for canonical, group in groups_here.items():
            found = groups_there.get(canonical, [])
            if len(group) == 1 and len(found) == 1:
                pairs[group[0]] = found[0]
    return pairs


def _pair_prefixed(here: list[str], there: list[str]) -> dict[str, str]:
    """Pair names that differ by one leading module, as a model saved with and without its head does."""

    def by_tail(names: list[str]) -> dict[str, list[str]]:
        tails: dict[str, list[str]] = defaultdict(list)
        for name in names:
            tails[name.partition(".")[2]].append(name)
        return tails

    longer_here, longer_there = by_tail(here), by_tail(there)
    pairs = {name: longer_there[name][0] for name in here if len(longer_there.get(name, ())) == 1}
    shorter = {longer_here[name][0]: name for name in there if len(longer_here.get(name, ())) == 1}
    return {name: found for name, found in shorter.items() if name not in pairs} | pairs


def _grouped(dropped: frozenset[str], names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_canonical(name, dropped)].append(name)
    return groups


def _canonical(name: str, dropped: frozenset[str]) -> str:
    if "parametrizations" in name:
        name = _PARAMETRISED.sub(lambda found: f"{found[1]}_{'gv'[int(found[2])]}", name)
    *path, leaf = name.split(".")
    return ".".join([*(segment for segment in path if segment not in dropped), _OLD_LEAVES.get(leaf, leaf)])


def _fit(base: TensorInfo, other: TensorInfo) -> bool:
    return base.shape == other.shape and base.is_float == other.is_float


def _buffer(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.classes[name] == "buffer"


def _mismatches(found: list[Mismatch]) -> str:
    if all(map(_rows_differ, found)):
        rows = found[0]
        return (
            f"its vocabulary has {rows.other.shape[0]} rows, the base's {rows.base.shape[0]} ('{rows.name}'): "
            "tokens were added or removed while tuning. Rows are matched by the tokens' text: put the "
            "tokenizer.json of both beside their weights."
        )
    differing = f"differs from the base in {len(found)} of its tensors: {_some(map(str, found))}"
    return f"{differing}. It must be a fine-tune of this very base."


def _rows_differ(mismatch: Mismatch) -> bool:
    base, other = mismatch.base, mismatch.other
    rows_only = len(base.shape) == len(other.shape) and base.shape[1:] == other.shape[1:]
    return rows_only and tensor_class(mismatch.name, base, {"vocab_size": base.shape[:1] and base.shape[0]}) == "embed"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
