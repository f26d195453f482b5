"""A base that takes in the tokens its experts were given: more rows, and a tokenizer that knows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.derived import DerivedReader, Made, derive, shown
from ktmerge.checkpoints.rows import Gathered, Table, runs_of
from ktmerge.checkpoints.tokens import content, read_object
from ktmerge.checkpoints.vocabulary import pair_tables, resized, vocabulary_of, vocabulary_tables
from ktmerge.errors import UsageError


@dataclass(frozen=True)
class Union:
    """The base as it is to be, and the texts of those of its files that change with it."""

    base: Checkpoint
    texts: Mapping[str, str]


def join_vocabularies(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> Union:
    """``base`` with a row for each token that an expert has added, after its own tokens.

    A new row is the expert's; of several experts that have the token, the mean of theirs. Padding is used up first.

    Args:
        base: whose vocabulary grows.
        experts: by name; new tokens come in the order of names, then of their numbers.

    Raises:
        UsageError: a vocabulary is not listed in a tokenizer.json, or its new tokens are no added tokens.
    """
    names, rows = vocabulary_tables(base)
    own = vocabulary_of(base)
    if not names or not own.tokens or not (own.root / "tokenizer.json").exists():
        raise UsageError(f"base: output.vocabulary: union needs a tokenizer.json in {base.root} and one embedding.")
    first = max(own.tokens.values()) + 1
    if first > rows:
        raise UsageError(f"base: its tokenizer in {own.root} numbers tokens up to {first - 1}, but it has {rows} rows.")
    numbers: dict[str, int] = {}
    entries: list[dict[str, Any]] = []
    owners: dict[str, list[tuple[str, int]]] = {}
    for expert, checkpoint in sorted(experts.items()):
        theirs = vocabulary_of(checkpoint)
        added = {content(one): one for one in _added(read_object(theirs.root / "tokenizer.json"))}
        for token, number in sorted(theirs.tokens.items(), key=lambda pair: pair[1]):
            if token in own.tokens:
                continue
            if token not in added:
                raise UsageError(
                    f"experts.{expert}: its new token {token!r} is no added token of a tokenizer.json (the text is "
                    "split otherwise there): two such tokenizers cannot be joined. Write output.vocabulary: base."
                )
            if token not in numbers:
                numbers[token] = first + len(numbers)
                entries.append({**added[token], "id": numbers[token]})
            owners.setdefault(token, []).append((expert, number))
    if not numbers:
        return Union(base, {})
    grown = max(rows, first + len(numbers))
    pairs = {name: dict(pair_tables(base, one, names, f"experts.{name}")) for name, one in experts.items()}
    return Union(
        _grow(base, experts, names, rows, grown, [(numbers[token], owners[token]) for token in numbers], pairs),
        {**_tokenizer(base, own.root, entries), **_configs(base, rows, grown)},
    )


def _grow(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    names: Sequence[str],
    rows: int,
    grown: int,
    new: Sequence[tuple[int, list[tuple[str, int]]]],
    pairs: Mapping[str, Mapping[str, str]],
) -> Checkpoint:
    order = list(experts)
    for expert in experts:
        for name in names:
            if name not in pairs[expert] or experts[expert][pairs[expert][name]].shape[1:] != base[name].shape[1:]:
                raise UsageError(f"experts.{expert}: has no table that answers to the base's '{name}'.")
    sources = [[(0, min(row, rows - 1))] for row in range(grown)]
    for number, given in new:
        sources[number] = [(1 + order.index(expert), row) for expert, row in given]
    runs = runs_of(sources)
    tensors = dict(base.tensors)
    for name in names:
        tensors[name] = shown(base[name], None, (grown, *base[name].shape[1:]))

    def opened() -> DerivedReader:
        source, others = base.reader(), [experts[expert].reader() for expert in order]
        made: dict[str, Made] = {}
        for name in names:
            tables = [Table(base[name], source)]
            for expert, reader in zip(order, others, strict=True):
                tables.append(Table(experts[expert][pairs[expert][name]], reader))
            made[name] = Gathered(tensors[name], tables, runs)
        return DerivedReader(tensors, source, made, others)

    note = f"takes in {len(new)} tokens of its experts; it has {grown} rows for {rows}."
    return derive(base, tensors, opened, config=resized(base.config, rows, grown), notes=(*base.notes, note))


def _added(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = document.get("added_tokens")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _tokenizer(base: Checkpoint, root: Path, entries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The base's tokenizer files with the new tokens, wherever it lists its added ones."""
    folder = root.relative_to(base.root).as_posix() if root.is_relative_to(base.root) else ""
    texts = {}
    whole = read_object(root / "tokenizer.json")
    texts["tokenizer.json"] = {**whole, "added_tokens": [*_added(whole), *entries]}
    config = read_object(root / "tokenizer_config.json")
    if isinstance(config.get("added_tokens_decoder"), dict):
        described = {str(one["id"]): {key: one[key] for key in one if key != "id"} for one in entries}
        texts["tokenizer_config.json"] = {
            **config, "added_tokens_decoder": {**config["added_tokens_decoder"], **described},
        }  # fmt: skip
    if (root / "added_tokens.json").exists():
        listed = {content(one): one["id"] for one in entries}
        texts["added_tokens.json"] = {**read_object(root / "added_tokens.json"), **listed}
    prefix = "" if folder in ("", ".") else f"{folder}/"
    return {f"{prefix}{file}": json.dumps(text, indent=2, ensure_ascii=False) + "\n" for file, text in texts.items()}


def _configs(base: Checkpoint, rows: int, grown: int) -> dict[str, str]:
    """Every config.json that names the number of rows."""
    texts = {}
    for folder in ("", *(f"{branch}/" for branch, _ in base.branches)):
        document = read_object(base.root / folder / "config.json")
        changed = resized(document, rows, grown)
        if changed != document:
            texts[f"{folder}config.json"] = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    return texts
