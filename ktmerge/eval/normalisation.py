"""Named normalisations of answers: what is done to a text before it is compared. Pure functions of text."""

from __future__ import annotations

import re
from collections.abc import Callable

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_VQA_NUMBERS = {word: str(i) for i, word in enumerate(_NUMBERS)} | {"none": "0"}
_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset(("a", "an", "the"))
_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def without_one_apostrophe(word: str) -> list[str]:
    """``word`` with each of its apostrophes left out in turn: the misspellings the VQA evaluation mends."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {wrong: word for word in _CONTRACTED.split() for wrong in without_one_apostrophe(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # so in the official table


def vqa_punctuation(text: str) -> str:
    """Punctuation as the VQA evaluation treats it (arXiv 1505.00468, its evaluation code).

    A mark that stands beside a space goes; one inside a word becomes a space; all go where a comma stands between
    digits. A full stop goes unless a digit follows it.
    """
    found = text
    in_number = re.search(r"\d,\d", text) is not None
    for mark in _VQA_PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or in_number else " ")
    return re.sub(r"\.(?!\d)", "", found, count=32)  # that many, since its code passes a flag where the count belongs


def vqa_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophes (same source)."""
    words = (_VQA_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def one_line(text: str) -> str:
    """Line ends and tabs as spaces, none around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa(text: str) -> str:
    """The whole normalisation of the VQA evaluation."""
    return vqa_words(vqa_punctuation(one_line(text)))


def squad(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (arXiv 1606.05250, its evaluation code)."""
    bare = "".join(letter for letter in text.lower() if letter not in _ASCII_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def number(text: str) -> str:
    """A number as one writes it without ornament: no thousands commas, currency or percent signs, no full stop behind,
    no zeros behind the decimal point; lower case where it is no number."""
    bare = text.strip().lower().replace(",", "").strip("$€£% ").rstrip(".")
    if re.fullmatch(r"[-+]?\d+\.\d*", bare):
        bare = bare.rstrip("0").rstrip(".")
    return bare.removeprefix("+")


NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "strip": str.strip,
    "lower": lambda text: text.strip().lower(),
    "squad": squad,
    "vqa": vqa,
    "number": number,
}
