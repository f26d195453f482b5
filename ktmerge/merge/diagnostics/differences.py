"""How a tuned model's names, shapes, configuration, tokenizer and files differ from the base's. Reads no weights."""

from __future__ import annotations

import filecmp
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktmerge.checkpoints.adapter import CONFIG as ADAPTER_CONFIG
from ktmerge.checkpoints.alignment import Alignment
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.files import clear_os_errors
from ktmerge.checkpoints.tokens import read_object
from ktmerge.errors import printable
from ktmerge.merge.diagnostics import tokenizer
from ktmerge.merge.diagnostics.tokenizer import TokenizerFiles

_IGNORED = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "is_local")
_TOLD_BY_KEY = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
_SHOWN, _LONG, _LISTED = 3, 60, 8


@dataclass(frozen=True)
class Change:
    """A setting that is not the base's; None where one of the two does not have it."""

    where: str
    base: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.where}: {_short(self.base)} in the base, {_short(self.here)} here"


@dataclass(frozen=True)
class Differences:
    """What one tuned model has otherwise than the base.

    Attributes:
        tensors: names by kind of difference: ``missing``, ``extra``, ``reshaped``, ``renamed``, ``ambiguous``.
        types: (type in the base, type here) -> how many tensors.
        config: of ``config.json``, and of the generation's, the preprocessor's and the processor's configuration.
        vocabulary: number of tokens in the base and here; None where the tokenizer lists none.
        tokens: by kind of difference: ``added``, ``removed``, ``renamed`` (another token under a base's number),
            ``moved`` (a token of the base under another number).
        tokenizer: special tokens, chat template, rules, settings.
        files: by kind of difference: ``changed``, ``missing``, ``extra``.
    """

    tensors: dict[str, list[str]] = field(default_factory=dict)
    types: dict[tuple[str, str], int] = field(default_factory=dict)
    config: list[Change] = field(default_factory=list)
    vocabulary: tuple[int | None, int | None] = (None, None)
    tokens: dict[str, list[str]] = field(default_factory=dict)
    tokenizer: list[Change] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> Iterator[tuple[str, str]]:
        """In words: what it is about, and how it differs."""
        words = {
            "missing": "missing",
            "extra": "that the base lacks",
            "reshaped": "of another shape",
            "renamed": "under other names",
            "ambiguous": "that could be more than one of the base's",
        }
        for kind, names in self.tensors.items():
            yield "tensors", f"{len(names)} {words[kind]}: {_some(names)}"
        for (base, here), count in self.types.items():
            yield "types", f"{_many(count, 'tensor')} in {here}, {base} in the base"
        yield from (("config", line) for line in _words(self.config))
        base_size, size = self.vocabulary
        if base_size != size:
            yield "vocabulary", f"{_short(base_size)} tokens in the base, {_short(size)} here"
        for kind, tokens in self.tokens.items():
            yield "vocabulary", f"{_many(len(tokens), 'token')} {kind}: {_some(tokens)}"
        yield from (("tokenizer", line) for line in _words(self.tokenizer))
        for kind, files in self.files.items():
            yield "files", f"{len(files)} {'only here' if kind == 'extra' else kind}: {_some(files)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "types": [{"base": base, "here": here, "tensors": count} for (base, here), count in self.types.items()],
            "config": [vars(change) for change in self.config],
            "vocabulary": {"base": self.vocabulary[0], "here": self.vocabulary[1], **self.tokens},
            "tokenizer": [vars(change) for change in self.tokenizer],
            "files": self.files,
        }


def compare(base: Checkpoint, other: Checkpoint, alignment: Alignment) -> Differences:
    """Hold what stands beside the weights of a tuned model against the base's.

    An adapter is folded in float32, and its folder has no more than what is trained: neither is a difference.
    """
    adapter = ADAPTER_CONFIG in other.other_files
    mapping = {} if adapter else alignment.mapping
    pairs = [(base.tensors[here].dtype, other.tensors[there].dtype) for here, there in mapping.items()]
    tensors = {
        "missing": list(alignment.missing),
        "extra": list(alignment.extra),
        "reshaped": [str(one) for one in alignment.mismatched],
        "renamed": [f"{there} is {here}" for here, there in alignment.renamed.items()],
        "ambiguous": list(alignment.ambiguous),
    }
    config = list(_changes(base.config, other.config))
    for file in _TOLD_BY_KEY:
        if file in base.other_files and file in other.other_files:
            config += _changes(
                read_object(base.root / file), read_object(other.root / file), f"{file.removesuffix('.json')}: "
            )
    own, others = TokenizerFiles.read(base.root), TokenizerFiles.read(other.root)
    if adapter and not others.tokens:
        others = own
    return Differences(
        {kind: names for kind, names in tensors.items() if names},
        Counter(pair for pair in pairs if pair[0] != pair[1]),
        config,
        (len(own.tokens) or None, len(others.tokens) or None),
        _token_changes(own.tokens, others.tokens),
        list(_tokenizer_changes(own, others)),
        {} if adapter else _file_changes(base, other),
    )


def _token_changes(base: Mapping[str, int], other: Mapping[str, int]) -> dict[str, list[str]]:
    if not base or not other:
        return {}
    by_number = {number: token for token, number in other.items()}
    added = [token for token in other if token not in base]
    removed = [token for token in base if token not in other]
    renamed = {token: by_number[base[token]] for token in removed if base[token] in by_number}
    renamed = {token: new for token, new in renamed.items() if new not in base}
    new = set(renamed.values())
    found = {
        "added": [token for token in added if token not in new],
        "removed": [token for token in removed if token not in renamed],
        "renamed": [f"{token} is {here} here" for token, here in renamed.items()],
        "moved": [token for token, number in base.items() if other.get(token, number) != number],
    }
    return {kind: tokens for kind, tokens in found.items() if tokens}


def _tokenizer_changes(base: TokenizerFiles, other: TokenizerFiles) -> Iterator[Change]:
    yield from _changes(base.special, other.special)
    if base.template.strip() != other.template.strip():
        first, second = _size(base.template), _size(other.template)
        yield Change("chat template", first, second if second != first else f"another of {second}")
    if any(other.rules.get(file, rules) != rules for file, rules in base.rules.items()):
        yield Change("rules that cut text into tokens", "one set", "another")
    yield from _changes(base.settings, other.settings)


def _file_changes(base: Checkpoint, other: Checkpoint) -> dict[str, list[str]]:
    told = {"config.json", "README.md", *_TOLD_BY_KEY, *tokenizer.FILES} - {"tokenizer.model"}
    own, others = set(base.other_files) - told, set(other.other_files) - told
    both = sorted(own & others)
    with clear_os_errors(other.root):
        changed = [file for file in both if not filecmp.cmp(base.root / file, other.root / file, shallow=False)]
    found = {
        "changed": changed,
        "missing": sorted(own - others),
        "extra": sorted(others - own),
    }
    return {kind: files for kind, files in found.items() if files}


def _changes(base: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    here, there = dict(_flat(base)), dict(_flat(other))
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            yield Change(prefix + key, here.get(key), there.get(key))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _IGNORED:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _words(changes: Sequence[Change]) -> Iterator[str]:
    """Settings that both have, one a line; those that one of them leaves unsaid, together."""
    both = [change for change in changes if change.base is not None and change.here is not None]
    yield from map(str, both[:_LISTED])
    if len(both) > _LISTED:
        yield f"{len(both) - _LISTED} more that differ: {_some(change.where for change in both[_LISTED:])}"
    in_base = [f"{change.where} {_short(change.base)}" for change in changes if change.here is None]
    here = [f"{change.where} {_short(change.here)}" for change in changes if change.base is None]
    yield from (f"only {side}: {_some(found)}" for side, found in (("in the base", in_base), ("here", here)) if found)


def _size(template: str) -> str | None:
    return f"{len(template.strip())} characters" if template.strip() else None


def _short(value: Any) -> str:
    text = printable("none" if value is None else str(value))
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f", and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return printable(", ".join(listed[:_SHOWN])) + more
