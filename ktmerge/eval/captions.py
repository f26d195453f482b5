"""The words of a caption, as the official evaluation of captions takes them. Knows no metric."""

from __future__ import annotations

import re
from itertools import pairwise

from ktmerge.eval.treebank import treebank_words

_LEFT_OUT = frozenset("'\"`.?!,:;-“”‘’") | {"``"}
_DASHES = re.compile(r"-+|\.+")
_SAME = str.maketrans({
    "’": "'", "‘": "'", "“": '"', "”": '"', "–": " ", "—": " ", "…": " ", "½": "1/2", "¼": "1/4", "¾": "3/4",
    "(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- ",
    "£": " # ", "€": " $ ", "¢": " cents ", **{mark: f" {mark} " for mark in "*=~|\\¥°²³"},
})  # fmt: skip
_OPENING = re.compile(r"(?<!\S)'(?=\w)(?!(?:s|m|d|ll|re|ve|em|n|tis|twas|\d+s?)\b)")
_ABBREVIATIONS = """
mr. mrs. ms. dr. prof. st. jr. sr. etc. vs. inc. co. corp. ltd. gen. gov. sen. rep. rev. mt. ave. blvd. jan. feb. mar.
apr. jun. jul. aug. sep. sept. oct. nov. dec.
"""
_KEPT_STOPS = frozenset(_ABBREVIATIONS.split())


def caption_words(text: str) -> str:
    """A caption as the words that count, with single spaces: lower case, contractions apart, no punctuation.

    As the official evaluation's tokeniser (Stanford's, a Java program) does with captions: ``a man's well-known dog``
    has the words ``man`` and ``'s``, brackets are words such as ``-lrb-``, and abbreviations keep their full stop.
    Addresses, emoticons and marks inside words are not told apart as there.
    """
    words = treebank_words(_OPENING.sub("", text.lower().translate(_SAME)))
    found = (_without_stop(word, after) for word, after in pairwise([*words, ""]))
    return " ".join(word for word in found if word and word not in _LEFT_OUT and not _DASHES.fullmatch(word))


def _without_stop(word: str, following: str) -> str:
    abbreviated = word in _KEPT_STOPS or (word == "no." and following[:1].isdigit())
    initial = len(word) == 2 and word[0].isalpha() and following[:1].isalnum()
    if not word.endswith(".") or "." in word[:-1] or abbreviated or initial:
        return word
    return word[:-1]
