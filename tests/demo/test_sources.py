"""Files of packages to plain values."""

from __future__ import annotations

import json

import pytest

from ktmerge.demo import sources
from ktmerge.errors import KtmergeError


def test_countries_need_plain_names_and_people() -> None:
    documents = [
        {"name": "Mali", "capital": "Bamako", "region": "Africa", "population": 20_000_000},
        {"name": "Togo", "capital": "Lomé", "region": "Africa", "population": 8_000_000},
        {"name": "Nauru", "capital": "Yaren", "region": "Oceania", "population": 10_000},
        {"name": "Antarctica", "region": "Polar", "population": 1_000_000},
        {"name": "Chad", "capital": "N'Djamena", "region": "Africa", "population": None},
    ]
    found = sources.countries([json.dumps(one).encode() for one in documents], population=300_000)
    assert found == [sources.Country("Mali", "Bamako", "Africa")]


def test_opinions_are_clear_short_and_unique() -> None:
    table = (
        "1\t2.5\tA   splendid film, really.\r\n"
        "2\t0.2\tNeither here nor there, this one.\r\n"
        "3\t-1.5\tA dreary, dull evening of it.\r\n"
        "4\t-3\tA splendid film, really.\r\n"
        "5\t3\tshort\r\n"
        "no tabs here\r\n"
        "6\t3\tBroken \ufffd letters in this text.\r\n"
    )
    found = sources.opinions(table.encode(), shortest=10, longest=40, clear=1.0)
    assert found == [("A splendid film, really.", True), ("A dreary, dull evening of it.", False)]


def test_passages_come_from_the_one_long_string() -> None:
    module = b'x = Bible(\n"""\nIn the [very] beginning\nshort\n""", {"a": """not this one"""})'
    assert sources.passages(module, shortest=8) == ["In the very beginning"]
    with pytest.raises(KtmergeError, match="one string"):
        sources.passages(b"x = 1", shortest=8)


def test_excerpts_are_whole_lines() -> None:
    text = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    assert sources.excerpts([text], 20) == ["def f():\n    return 1", "def g():\n    return 2"]


CATALOGUE = """
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8"

# a comment
msgid "Enter a number."
msgstr "Geben Sie eine "
"Zahl ein."

#, fuzzy
msgid "Doubtful"
msgstr "Zweifelhaft"

#, python-format
msgid "%d day"
msgid_plural "%d days"
msgstr[0] "%d Tag"
msgstr[1] "%d Tage"

msgid "Not done"
msgstr ""

msgctxt "month"
msgid "May"
msgstr "Mai \\"x\\""

#~ msgid "Old"
#~ msgstr "Alt"
"""


def test_translations_without_plurals_doubts_and_leftovers() -> None:
    assert sources.translations(CATALOGUE.encode()) == [
        ("Enter a number.", "Geben Sie eine Zahl ein."),
        ("May", 'Mai "x"'),
    ]


@pytest.mark.parametrize(
    ("text", "plain"), [("Ja, bitte.", True), ("%(n)s da", False), ("<b>x</b>", False), ("a_b", False)]
)
def test_plain_texts_have_no_placeholders(text: str, plain: bool) -> None:
    assert sources.is_plain(text) is plain
