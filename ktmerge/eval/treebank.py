"""Words as the Penn Treebank splits them, by a rule: close to nltk's and Stanford's tokenisers. Knows no metric."""

from __future__ import annotations

import re

_APART = re.compile(r"""([;@#$%&?!()\[\]{}<>"“”‘`]|--+|\.{2,}|[:,](?!\d))""")
_ENDING = re.compile(r"(?<=\w)('(?:s|m|d|ll|re|ve)|n't)$", re.IGNORECASE)
_TOGETHER = re.compile(r"(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me)", re.IGNORECASE)


def treebank_words(text: str) -> list[str]:
    """Words and marks of a text: contractions and most punctuation stand apart, hyphens and full stops do not."""
    found: list[str] = []
    for chunk in text.split():
        for piece in filter(None, _APART.split(chunk)):
            bare = piece.rstrip("'") if len(piece) > 1 else piece
            ending = _ENDING.search(bare)
            found += [bare[: ending.start()], ending[0]] if ending else _parted(bare)
    return found


def _parted(word: str) -> list[str]:
    together = _TOGETHER.fullmatch(word)
    return [part for part in together.groups() if part] if together else [word]
