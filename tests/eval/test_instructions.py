"""Checks of instructions, by examples of both outcomes, and IFEval's two levels in both strictnesses."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.eval import read_sets
from ktmerge.eval.instructions import count_sentences, followed, instruction
from ktmerge.eval.marking import mark
from ktmerge.eval.treebank import treebank_words
from ktmerge.recipes.suites import Suite

AT_LEAST, LESS = "at least", "less than"
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["fox", "dog"]}, "The FOX and the doge", "The fox"),
    ("keywords:frequency", {"keyword": "fox", "relation": AT_LEAST, "frequency": 2}, "fox, Fox", "fox"),
    ("keywords:frequency", {"keyword": "fox", "relation": LESS, "frequency": 2}, "fox", "fox fox"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "A Cat."),
    ("keywords:letter_frequency", {"letter": "E", "let_relation": AT_LEAST, "let_frequency": 3}, "Eel, e", "eel"),
    ("length_constraints:number_sentences", {"relation": LESS, "num_sentences": 3}, "One. Two!", "A b. C d. E f."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n***\n\n***\ntwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none *** two\n***", "one"),
    ("length_constraints:number_words", {"relation": AT_LEAST, "num_words": 4}, "it's two words", "just three words"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"}, "One.\n\n'then, he", "One.\n\nAnd then"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "a"}, "A!\n\nb", "a\n\nb\n\nc"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. more", "Bye. PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\np.p.s. more", "P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b **\n"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "maybe"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na\nSECTION two"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<<>> text"),
    ("combination:two_responses", {}, "one\n******\ntwo", "same\n******\nsame"),
    ("combination:two_responses", {}, "******one******two", "one******two******three"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, " say it. Done", "Done. Say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, '"... the END."', "The end. Really"),
    ("startend:quotation", {}, ' "quoted" ', '"'),
    ("change_case:capital_word_frequency", {"capital_relation": AT_LEAST, "capital_frequency": 2},
     "NASA's and U.S. rockets", "NASA and us"),
    ("punctuation:no_comma", {}, "one; two", "one, two"),
    ("change_case:english_capital", {}, "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG", "The quick brown fox"),
    ("change_case:english_lowercase", {}, "the quick brown fox jumps over the lazy dog", "The quick brown fox"),
    ("language:response_language", {"language": "de"}, "Der schnelle braune Fuchs springt über den faulen Hund",
     "The quick brown fox jumps over the lazy dog"),
]  # fmt: skip


DETECTED = ("language", "change_case:english")
"""Kinds that take a library of languages, whose profiles are read for most of a second."""


@pytest.mark.parametrize(
    ("kind", "arguments", "right", "wrong"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0].startswith(DETECTED) else []) for case in CASES],
)
def test_each_kind_tells_right_from_wrong(kind: str, arguments: dict[str, Any], right: str, wrong: str) -> None:
    if kind.startswith(DETECTED):
        pytest.importorskip("langdetect")
    one = instruction(kind, {**arguments, "not_given": None})
    assert one.check(right)
    assert not one.check(wrong)
    assert not one.check(" \n")


def test_all_kinds_of_ifeval_are_known() -> None:
    from ktmerge.eval.instructions import _CHECKS

    assert len(_CHECKS) == 25
    assert {kind for kind, *_ in CASES} == set(_CHECKS)


def test_loose_forgives_greetings_and_stars() -> None:
    small = instruction("startend:end_checker", {"end_phrase": "bye"})
    quoted = instruction("startend:quotation", {})
    assert followed('Sure!\n"hello"\nI hope this helps', [quoted]) == ([False], [True])
    assert followed("**bye**", [small, quoted]) == ([False, False], [True, False])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two. Three.", 3), ("Dr. Smith met Mr. Jones at 3 p.m. sharp.", 1), ("Really?! Yes.", 2), ("No end", 1),
        ("It costs 3.50 dollars. Cheap!", 2), ('He said "stop." Then he left.', 2), ("1. First item.\n2. Second.", 2),
        ('"Why?" he asked.', 1), ("Wait... what happened?", 1), ("", 0), ("J. R. Tolkien wrote it.", 1),
    ],
)  # fmt: skip
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


@pytest.mark.slow
def test_words_are_split_as_nltk_splits_them() -> None:
    """Of one sentence; nltk's tokeniser needs no downloaded data for that."""
    tokenizer = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer()
    draw = random.Random(3)
    pieces = ["NASA", "it's", "DON'T", "I'M", "U.S.", "a-b", "(SEE", "HERE)", "WOW!", "3,500", "well,", "A/B",
              "\"YES\"", "MR.", "x:", "10:30", "THEY'LL", "--", "AND...", "[NOTE]", "100%", "C#"]  # fmt: skip
    for _ in range(300):
        text = " ".join(draw.choices(pieces, k=8)) + " end"
        found, wanted = treebank_words(text), [token for token in tokenizer.tokenize(text) if token not in ("``", "''")]
        assert [token for token in found if token != '"'] == wanted, text


@pytest.mark.parametrize(
    ("kinds", "given", "said"),
    [
        (["punctuation:no_coma"], [{}], "no kind of instruction 'punctuation:no_coma'. Did you mean"),
        (["startend:end_checker"], [{"end_phrase": None}], "needs the argument 'end_phrase'"),
        (["startend:quotation"], [], "needs lists of the same length"),
        ("startend:quotation", [{}], "needs lists of the same length"),
        (
            ["punctuation:no_comma"],
            ["x"],
            "the arguments of 'punctuation:no_comma' are 'x'; names and values are needed",
        ),
        (
            ["length_constraints:number_words"],
            [{"relation": "at least", "num_words": "many"}],
            "cannot be checked with",
        ),
        (["keywords:existence"], [{"keywords": ["("]}], "cannot be checked with {'keywords': ['(']}: missing )"),
    ],
)
def test_what_is_no_instruction_is_named(tmp_path: Path, kinds: Any, given: Any, said: str) -> None:
    import json

    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "p", "instruction_id_list": kinds, "kwargs": given}))
    task = {"name": "t", "kind": "instructions", "data": "x.jsonl"}
    with pytest.raises(UsageError, match=f"task 't', instructions: .*x.jsonl:1.*{re.escape(said)}"):
        read_sets(Suite(upstream=[task], folder=tmp_path))


def test_shares_of_prompts_and_of_instructions(tmp_path: Path) -> None:
    import json

    kinds, given = ["punctuation:no_comma", "startend:quotation"], [{"x": None}, {}]
    row = json.dumps({"prompt": "p", "instruction_id_list": kinds, "kwargs": given})
    (tmp_path / "x.jsonl").write_text("\n".join([row] * 4))
    (one,) = read_sets(Suite(upstream=[{"name": "t", "kind": "instructions", "data": "x.jsonl"}], folder=tmp_path))
    score = mark(one, ['"yes"', '"yes, no"', 'Sure\n"yes"', "a, b"])
    assert score.scores.tolist() == [1, 0, 0, 0]
    assert score.figures == {"prompt_loose": 50.0, "instruction_strict": 50.0, "instruction_loose": 62.5}
    assert score.details["strict"][1] == [False, True]
