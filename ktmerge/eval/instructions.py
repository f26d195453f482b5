"""Whether an answer follows instructions that a program can check: the 25 kinds of IFEval (arXiv 2311.07911).

Written anew from the published definitions, so that neither lm_eval nor nltk's downloaded data are needed. Two kinds
may differ from the published code in rare cases: sentences are counted by a rule here and not by nltk's trained
splitter, and words in capitals by a rule like nltk's tokeniser. Languages are told by langdetect, as there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from ktmerge.errors import UsageError, did_you_mean
from ktmerge.eval.treebank import treebank_words

_SHORT = """
mr mrs ms dr prof sr jr st vs etc e.g i.e inc ltd co corp no fig al approx dept est gen gov hon lt rep rev sen
u.s u.k a.m p.m ph.d jan feb mar apr jun jul aug sep sept oct nov dec
"""
_ABBREVIATIONS = frozenset(_SHORT.split())
_SENTENCE_END = re.compile(r"""(\S*?)([.!?]+)["'”’)\]]*(?=\s|$)""")
_STARS = "*"


@dataclass(frozen=True)
class Instruction:
    """One instruction of a prompt: its kind, as ``length_constraints:number_words``, and that kind's arguments."""

    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def check(self, answer: str) -> bool:
        """Whether ``answer`` follows it; an empty answer follows none."""
        return bool(answer.strip()) and _CHECKS[self.kind](answer, self.arguments)


def instruction(kind: str, arguments: Any) -> Instruction:
    """An instruction with those of ``arguments``, a mapping, that are given.

    Raises:
        UsageError: no such kind, an argument is missing or of the wrong type, or the kind needs a package that is not
            installed.
    """
    if kind not in _CHECKS:
        raise UsageError(f"there is no kind of instruction '{kind}'.{did_you_mean(kind, _CHECKS)}")
    if not isinstance(arguments, Mapping):
        raise UsageError(f"the arguments of '{kind}' are {arguments!r}; names and values are needed.")
    given = {name: value for name, value in arguments.items() if value is not None}
    missing = [name for name in _NEEDED.get(kind, ()) if name not in given]
    if missing:
        raise UsageError(f"the instruction '{kind}' needs the argument '{missing[0]}'.")
    if kind in _OF_LANGUAGE and find_spec("langdetect") is None:
        raise UsageError(f"the instruction '{kind}' needs the package langdetect; pip install 'ktmerge[metrics]'.")
    made = Instruction(kind, given)
    if kind not in _OF_LANGUAGE:
        try:
            made.check("A word.\n\nAnother one.")
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise UsageError(f"the instruction '{kind}' cannot be checked with {given}: {error}.") from None
    return made


def followed(answer: str, instructions: Sequence[Instruction]) -> tuple[list[bool], list[bool]]:
    """Of each instruction, whether the answer follows it strictly, and whether loosely.

    Loosely: as it stands, or without its first line, last line or both (greetings and notes), each with and without
    the stars of Markdown.
    """
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = [*cut, *(text.replace(_STARS, "") for text in cut)]
    strict = [one.check(answer) for one in instructions]
    return strict, [any(one.check(variant) for variant in variants) for one in instructions]


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Pieces that end in ``.``, ``!`` or ``?`` before white space, and what is left at the end of the text.

    A full stop after an abbreviation, a single capital or a list's number ends none.
    """
    count, start = 0, 0
    for match in _SENTENCE_END.finditer(text):
        word = match[1].lstrip("\"'“‘([*").lower()
        stops_nothing = match[2] == "." and (
            word in _ABBREVIATIONS
            or (len(word) == 1 and match[1][-1:].isupper() and word != "i")
            or (word.isdigit() and not text[start : match.start()].strip())
        )
        rest = text[match.end() :].lstrip()
        if stops_nothing and rest:
            continue
        if match[2] != "." and rest[:1].islower():  # "Really?" he asked
            continue
        count, start = count + 1, match.end()
    return count + bool(text[start:].strip())


def _holds(count: int, relation: str, wanted: int) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def _keywords(answer: str, a: Mapping[str, Any]) -> bool:
    return all(re.search(str(keyword), answer, re.IGNORECASE) for keyword in a["keywords"])


def _keyword_frequency(answer: str, a: Mapping[str, Any]) -> bool:
    found = re.findall(str(a["keyword"]), answer, re.IGNORECASE)
    return _holds(len(found), a["relation"], int(a["frequency"]))


def _forbidden(answer: str, a: Mapping[str, Any]) -> bool:
    return not any(re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in a["forbidden_words"])


def _letters(answer: str, a: Mapping[str, Any]) -> bool:
    return _holds(answer.lower().count(str(a["letter"]).lower()), a["let_relation"], int(a["let_frequency"]))


def _language(answer: str, a: Mapping[str, Any]) -> bool:
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # else the same text may be told differently
    try:
        return bool(detect(answer) == a["language"])
    except LangDetectException:  # no letters at all
        return True


def _sentences(answer: str, a: Mapping[str, Any]) -> bool:
    return _holds(count_sentences(answer), a["relation"], int(a["num_sentences"]))


def _number_of_words(answer: str, a: Mapping[str, Any]) -> bool:
    return _holds(count_words(answer), a["relation"], int(a["num_words"]))


def _paragraphs(answer: str, a: Mapping[str, Any]) -> bool:
    """Parted by three stars; empty ones are allowed at both ends only."""
    parts = re.split(r"\s?\*\*\*\s?", answer)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == int(a["num_paragraphs"])


def _first_word(answer: str, a: Mapping[str, Any]) -> bool:
    parts = answer.split("\n\n")
    count, nth = sum(bool(part.strip()) for part in parts), int(a["nth_paragraph"])
    if nth > count or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    return count == int(a["num_paragraphs"]) and re.split(r"[.,?!'\"]", word)[0].lower() == a["first_word"].lower()


def _placeholders(answer: str, a: Mapping[str, Any]) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= int(a["num_placeholders"])


def _postscript(answer: str, a: Mapping[str, Any]) -> bool:
    marker = str(a["postscript_marker"])
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(marker, rf"\s*{marker.lower()}.*$")
    return re.search(pattern, answer.lower(), re.MULTILINE) is not None


def _bullets(answer: str, a: Mapping[str, Any]) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", answer, re.MULTILINE)
    return len(stars) + len(dashes) == int(a["num_bullets"])


def _constrained(answer: str, a: Mapping[str, Any]) -> bool:
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


def _highlights(answer: str, a: Mapping[str, Any]) -> bool:
    single = [one for one in re.findall(r"\*[^\n\*]*\*", answer) if one.strip("*").strip()]
    double = [one for one in re.findall(r"\*\*[^\n\*]*\*\*", answer) if one.strip("*").strip()]
    return len(single) + len(double) >= int(a["num_highlights"])


def _sections(answer: str, a: Mapping[str, Any]) -> bool:
    parts = re.split(rf"\s?{a['section_spliter']}\s?\d+\s?", answer)
    return len(parts) - 1 >= int(a["num_sections"])


def _json(answer: str, a: Mapping[str, Any]) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str, a: Mapping[str, Any]) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", answer))


def _two_responses(answer: str, a: Mapping[str, Any]) -> bool:
    parts = answer.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    said = [part.strip() for part in parts if part.strip()]
    return len(said) == 2 and said[0] != said[1]


def _repeats(answer: str, a: Mapping[str, Any]) -> bool:
    return answer.strip().lower().startswith(str(a["prompt_to_repeat"]).strip().lower())


def _ends(answer: str, a: Mapping[str, Any]) -> bool:
    return answer.strip().strip('"').lower().endswith(str(a["end_phrase"]).strip().lower())


def _capital_words(answer: str, a: Mapping[str, Any]) -> bool:
    capitals = sum(word.isupper() for word in treebank_words(answer))
    return _holds(capitals, a["capital_relation"], int(a["capital_frequency"]))


def _all_capitals(answer: str, a: Mapping[str, Any]) -> bool:
    return answer.isupper() and _language(answer, {"language": "en"})


def _all_small(answer: str, a: Mapping[str, Any]) -> bool:
    return answer.islower() and _language(answer, {"language": "en"})


def _no_comma(answer: str, a: Mapping[str, Any]) -> bool:
    return "," not in answer


def _quoted(answer: str, a: Mapping[str, Any]) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


_CHECKS: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _number_of_words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _all_capitals,
    "change_case:english_lowercase": _all_small,
    "punctuation:no_comma": _no_comma,
}
_OF_LANGUAGE = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
_NEEDED = {
    "keywords:existence": ("keywords",),
    "keywords:frequency": ("keyword", "relation", "frequency"),
    "keywords:forbidden_words": ("forbidden_words",),
    "keywords:letter_frequency": ("letter", "let_relation", "let_frequency"),
    "language:response_language": ("language",),
    "length_constraints:number_sentences": ("relation", "num_sentences"),
    "length_constraints:number_paragraphs": ("num_paragraphs",),
    "length_constraints:number_words": ("relation", "num_words"),
    "length_constraints:nth_paragraph_first_word": ("num_paragraphs", "nth_paragraph", "first_word"),
    "detectable_content:number_placeholders": ("num_placeholders",),
    "detectable_content:postscript": ("postscript_marker",),
    "detectable_format:number_bullet_lists": ("num_bullets",),
    "detectable_format:number_highlighted_sections": ("num_highlights",),
    "detectable_format:multiple_sections": ("section_spliter", "num_sections"),
    "combination:repeat_prompt": ("prompt_to_repeat",),
    "startend:end_checker": ("end_phrase",),
    "change_case:capital_word_frequency": ("capital_relation", "capital_frequency"),
}
