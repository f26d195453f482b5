"""Vocabularies that differ: which row of an expert's tables is which of the base's, told by the token's text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.derived import Derived, DerivedReader, Made, derive, shown
from ktmerge.checkpoints.rows import Gathered, Run, Table, runs_of
from ktmerge.checkpoints.tokens import read_tokens, same_tokens
from ktmerge.errors import UsageError

# Tables of something else than tokens, which may have as many rows by chance.
_OTHER = re.compile(r"pos|type|segment|relative|query_tokens|latents|register|patch|class_emb|router|gate")
_HEAD_BIAS = re.compile(r"(^|\.)(lm_head|embed_out|output|output_layer|decoder|predictions)\.bias$")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a checkpoint.

    Attributes:
        root: the folder whose files list them.
        tokens: number by token; empty if no file lists them.
    """

    root: Path
    tokens: Mapping[str, int]


def vocabulary_of(checkpoint: Checkpoint) -> Vocabulary:
    """The vocabulary in the first of a checkpoint's folders that has one: an adapter's own goes before its model's."""
    for root in _folders(checkpoint):
        if tokens := read_tokens(root):
            return Vocabulary(root, tokens)
    return Vocabulary(checkpoint.root, {})


def tokenizer_root(checkpoint: Checkpoint) -> Path:
    """The first of its folders that seems to have a tokenizer."""
    names = ("tokenizer.json", "vocab.json", "vocab.txt")
    return next(
        (root for root in _folders(checkpoint) if any((root / name).exists() for name in names)), checkpoint.root
    )


def _folders(checkpoint: Checkpoint) -> list[Path]:
    roots = checkpoint.roots
    return [*roots, *(root / branch for root in roots for branch, _ in checkpoint.branches)]


def vocabulary_tables(checkpoint: Checkpoint) -> tuple[list[str], int]:
    """The names of all tensors with a row for each token, and how many rows they have; none if that is not clear."""
    embeddings = [
        name
        for name, info in checkpoint.tensors.items()
        if checkpoint.classes[name] == "embed"
        and name.endswith(".weight")
        and len(info.shape) == 2
        and not _OTHER.search(name.rpartition(".")[0].rpartition(".")[2])
    ]
    rows = {checkpoint.tensors[name].shape[0] for name in embeddings}
    if len(rows) != 1:
        return [], 0
    biases = [
        name
        for name, info in checkpoint.tensors.items()
        if _HEAD_BIAS.search(name) and info.is_float and info.shape[:1] == (min(rows),)
    ]
    return embeddings + biases, rows.pop()


def fit_vocabulary(base: Checkpoint, other: Checkpoint, label: str, *, grown: bool = False) -> Checkpoint:
    """``other`` with the rows of its tables in the base's order, and as many.

    A row whose token it doesn't have, and padding, is shown as the base's, so that it stays as it is there. Where both
    have the same tokens, or no tokenizer says otherwise and the sizes agree, ``other`` is given back as it is.

    Args:
        base: whose vocabulary counts.
        other: the expert.
        label: what messages call it.
        grown: whether the base has rows of tokens that its own files don't list: they count as padding here.

    Raises:
        UsageError: the tokenizers say that tokens were changed, but not which row is which.
    """
    names, rows = vocabulary_tables(base)
    same_files = not grown and same_tokens(tokenizer_root(base), tokenizer_root(other))
    if same_files and all(name in other.tensors and other[name].shape == base[name].shape for name in names):
        return other
    pairs = pair_tables(base, other, names, label)
    sizes = {other[found].shape[0] for _, found in pairs}
    if len(sizes) != 1 or any(base[name].shape[1:] != other[found].shape[1:] for name, found in pairs):
        return other
    theirs = sizes.pop()
    own, vocabulary = vocabulary_of(base).tokens, vocabulary_of(other)
    places = {token: number for token, number in vocabulary.tokens.items() if 0 <= number < theirs}
    if grown and not places:
        raise UsageError(f"{label}: has no tokenizer.json, so its tokens cannot be joined with the others'.")
    if not own or not places:
        return other  # equal sizes answer row by row; of others the alignment says that they don't fit
    if not grown and theirs == rows and all(own.get(token) == number for token, number in places.items()):
        return other
    known = {token: number for token, number in own.items() if token in places and 0 <= number < rows}
    if len(known) < len(own) / 2:
        raise UsageError(
            f"{label}: its vocabulary differs from the base's, and of the base's {len(own)} tokens its tokenizer files "
            f"in {vocabulary.root} list only {len(known)}; put its whole tokenizer.json there."
        )
    if len({found for _, found in pairs}) < len(pairs):
        raise UsageError(
            f"{label}: ties its head to its embedding, which the base does not, and has other tokens than the base; "
            "untie it first."
        )
    sources = [(0, row) for row in range(rows)]
    for token, number in known.items():
        sources[number] = (1, places[token])
    moved = sum(number != places[token] for token, number in known.items())
    note = _note(sum(token not in own for token in places), len(own) - len(known), moved)
    return _aligned(base, other, pairs, runs_of([[source] for source in sources]), note)


def pair_tables(base: Checkpoint, other: Checkpoint, names: list[str], label: str) -> list[tuple[str, str]]:
    """The tables of the base, and what they are in ``other``, a head that only ``other`` stores included."""
    alignment = align(base, other, label)
    found = alignment.mapping | {wrong.name: wrong.other.name for wrong in alignment.mismatched}
    pairs = [(name, found[name]) for name in names if name in found and other[found[name]].is_float]
    table = {theirs: name for name, theirs in pairs}
    return pairs + [(table[tied], head) for head, tied in alignment.tied_extra.items() if tied in table]


def _aligned(base: Checkpoint, other: Checkpoint, pairs: list[tuple[str, str]], runs: list[Run], note: str) -> Derived:
    tensors = dict(other.tensors)
    for name, found in pairs:
        kinds = {base[name].dtype, other[found].dtype}
        wide = kinds.pop() if len(kinds) == 1 else "F64" if "F64" in kinds else "F32"
        tensors[found] = shown(other[found], wide, base[name].shape)

    def opened() -> DerivedReader:
        first, second = base.reader(), other.reader()
        made: dict[str, Made] = {
            found: Gathered(tensors[found], [Table(base[name], first), Table(other[found], second)], runs)
            for name, found in pairs
        }
        return DerivedReader(tensors, second, made, [first])

    name, found = pairs[0]
    config = resized(other.config, other[found].shape[0], base[name].shape[0])
    return derive(other, tensors, opened, config=config, notes=(*other.notes, note))


def resized(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """A config whose vocabularies of ``old`` tokens have ``new``."""
    changed = {key: resized(value, old, new) if isinstance(value, Mapping) else value for key, value in config.items()}
    return {**changed, "vocab_size": new} if changed.get("vocab_size") == old else changed


def _note(extra: int, missing: int, moved: int) -> str:
    said = [
        f"{count} {what}"
        for count, what in (
            (extra, "are unknown to the base"),
            (missing, "of the base's are not there and stay as they are"),
            (moved, "have another number there"),
        )
        if count
    ]
    return f"its tokens are matched by their text: {', '.join(said) or 'all are there'}."
