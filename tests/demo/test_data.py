"""The demo's data: the same on every machine, no item in two splits, fair questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktmerge.demo import data
from ktmerge.demo.sources import Country

COUNTRIES = [Country(f"Land {n}", f"City {n}", "East" if n % 2 else "West") for n in range(40)]
COUNTRIES.append(Country("Lone", "Lone City", "North"))


def test_splits_share_no_item_and_refuse_too_few() -> None:
    dealt = data.split(list(range(10)), {"report": 4, "train": 6})
    assert dealt == {"report": [0, 1, 2, 3], "train": [4, 5, 6, 7, 8, 9]}
    with pytest.raises(ValueError, match="11 items are wanted, there are 10"):
        data.split(list(range(10)), {"report": 4, "train": 7})


def test_the_order_depends_on_keys_and_seed_only() -> None:
    words = ["one", "two", "three", "four", "five", "six"]
    order = data.shuffled(words, "seed")
    assert sorted(order) == sorted(words)
    assert order == data.shuffled(reversed(words), "seed")
    assert order != data.shuffled(words, "another seed")
    assert order == ["three", "six", "five", "four", "two", "one"], "the demo's items would change"


def test_capitals_offer_four_cities_of_one_region() -> None:
    rows = data.capital_rows(COUNTRIES, {"report": 20, "select": 15})
    capital_of = {country.name: country for country in COUNTRIES}
    regions = {country.capital: country.region for country in COUNTRIES}
    for row in rows["report"] + rows["select"]:
        country = capital_of[row["country"]]
        assert row["capital"] == country.capital
        assert row["capital"] in row["options"]
        assert len(set(row["options"])) == 4
        assert {regions[city] for city in row["options"]} == {country.region}
    names = [row["country"] for row in rows["report"] + rows["select"]]
    assert len(set(names)) == 35
    assert "Lone" not in names
    places = [row["options"].index(row["capital"]) for row in rows["report"] + rows["select"]]
    assert set(places) == {0, 1, 2, 3}, "the right answer must not stand in one place"
    assert rows == data.capital_rows(COUNTRIES, {"report": 20, "select": 15})


def test_opinions_take_turns() -> None:
    opinions = [(f"text {n}", n % 3 == 0) for n in range(30)]
    found = data.balanced(opinions, "seed")
    assert len(found) == 20
    assert [good for _, good in found] == [True, False] * 10
    assert set(found) <= set(opinions)


def catalogues() -> dict[str, list[tuple[str, str]]]:
    pairs = {locale: [(f"Sentence {n}", f"{locale} text {n}") for n in range(60)] for locale in ("de", "fr", "pl")}
    pairs["de"].append(("Email", "same in both"))
    pairs["fr"].append(("Email", "same in both"))
    pairs["pl"].append(("Sentence 61", "Sentence 61"))
    pairs["pl"].append(("Another sentence 3", "pl text 3"))  # one translation of two sentences
    return pairs


def test_translations_of_a_sentence_stay_in_one_split() -> None:
    sizes = {"report": 20, "select": 10, "train": 60}
    rows = data.language_rows(catalogues(), sizes)
    assert {name: len(found) for name, found in rows.items()} == sizes
    numbers = {name: {row["prompt"].split()[3] for row in found} for name, found in rows.items()}
    texts = [row["prompt"] for found in rows.values() for row in found]
    assert len(set(texts)) == len(texts)
    assert not numbers["report"] & numbers["select"]
    assert not numbers["report"] & (numbers["train"] - {"3"})
    assert not any("same in both" in text or "Sentence 61" in text for text in texts)
    codes = {"de": " deu", "fr": " fra", "pl": " pol"}
    for row in rows["train"]:
        assert row["completion"] == codes[row["prompt"].split()[1]]
    assert rows == data.language_rows(dict(reversed(catalogues().items())), sizes)


def test_groups_are_cut_by_their_share() -> None:
    assert data.split_bounds([2, 2, 2, 2, 2], {"a": 1, "b": 4}) == {"a": (0, 1), "b": (1, 5)}
    assert data.split_bounds([5, 1, 1], {"a": 1, "b": 1}) == {"a": (0, 1), "b": (1, 3)}


def test_rows_are_written_whole_and_equal_files_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "split" / "set.jsonl"
    rows = [{"text": "žluťoučký"}, {"text": 'a "quoted"\nline'}]
    data.write_rows(path, rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    before = path.stat().st_mtime_ns
    data.write_rows(path, rows)
    assert path.stat().st_mtime_ns == before
    data.write_rows(path, rows[:1])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


def test_every_set_says_what_the_demo_needs() -> None:
    sides = [one.side for one in data.SETS]
    assert sides.count("upstream") >= 3
    assert sides.count("downstream") == 2
    for one in data.SETS:
        assert one.package.licence
        assert len(one.package.sha256) == 64
        assert {data.REPORT, data.SELECT} <= set(one.sizes)
        assert (data.TRAIN in one.sizes) == (one.side == "downstream")
