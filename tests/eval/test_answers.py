"""Marks of single answers against values worked out by hand, and against definitions written once more."""

from __future__ import annotations

import random
from functools import cache

import pytest

from ktmerge.eval.answers import anls, edit_distance, exact_match, f1, relaxed_accuracy, vqa_accuracy, vqa_simple
from ktmerge.eval.captions import caption_words
from ktmerge.eval.normalisation import CONTRACTIONS, number, squad, vqa
from ktmerge.eval.overlap import overlap


@pytest.mark.parametrize(
    ("prediction", "reference", "normalise", "score"),
    [
        (" yes\n", "yes", "strip", 1.0),
        (" yes", "yes", "none", 0.0),
        ("yes", "yes", "none", 1.0),
        ("Yes", "yes", "strip", 0.0),
        (" YES ", "yes", "lower", 1.0),
        ("yes.", "yes", "lower", 0.0),
        ("The yes.", "yes", "squad", 1.0),
        ("", " ", "strip", 1.0),
        ("$1,200.00", "1200", "number", 1.0),
        ("100", "1", "number", 0.0),
        ("two dogs", "2 dogs", "vqa", 1.0),
    ],
)
def test_exact_match(prediction: str, reference: str, normalise: str, score: float) -> None:
    assert exact_match(prediction, [reference], normalise) == score
    assert exact_match(prediction, ["something else", reference], normalise) == score


def test_word_f1() -> None:
    assert f1("the black cat sat", ["a black cat", "x"], "squad") == pytest.approx(2 * (2 / 3 * 1) / (2 / 3 + 1))
    assert f1("cat cat", ["cat"], "strip") == pytest.approx(2 / 3), "a word counts as often as both have it"
    assert f1("", ["cat"], "strip") == 0
    assert f1("the", ["a"], "squad") == 1, "nothing left on both sides"


@pytest.mark.parametrize(("matches", "official", "simple"), [(0, 0, 0), (1, 0.3, 1 / 3), (2, 0.6, 2 / 3), (3, 0.9, 1)])
def test_vqa_leaves_one_out(matches: int, official: float, simple: float) -> None:
    people = ["dog"] * matches + [f"cat {i}" for i in range(10 - matches)]
    assert vqa_accuracy("Dog", people) == pytest.approx(official)
    assert vqa_simple("Dog", people) == pytest.approx(simple)


MARKS = ';/[]"{}()=+\\_-><@`,?!'
WORDS = ["two", "The", "a", "none", "dont", "couldn'tve", "Ten", "1,000", "3.5", "U.S.", "red", "hes", "Red", "an", "2",
         "o'clock", "oclock", "0", "somebody'd", "..."]  # fmt: skip
MENDED = {"dont": "don't", "couldn'tve": "couldn't've", "hes": "he's", "oclock": "o'clock", "somebody'd": "somebodyd"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}


def vqa_again(prediction: str, people: list[str]) -> float:
    """The evaluation of arXiv 1505.00468 written from its description, character by character."""

    def normal(text: str) -> str:
        digits = any(
            a.isdigit() and b == "," and c.isdigit() for a, b, c in zip(text, text[1:], text[2:], strict=False)
        )
        glued = {mark for mark in MARKS if digits or any(pair in text for pair in (f"{mark} ", f" {mark}"))}
        spaced = "".join(letter if letter not in MARKS else "" if letter in glued else " " for letter in text)
        bare, dots = [], 0
        for letter, after in zip(spaced, [*spaced[1:], ""], strict=True):
            if letter == "." and not after.isdigit() and dots < 32:
                dots += 1
            else:
                bare.append(letter)
        said = [DIGITS.get(word, word) for word in "".join(bare).lower().split()]
        return " ".join(MENDED.get(word, word) for word in said if word not in ("a", "an", "the"))

    if len(set(people)) > 1:
        prediction, people = normal(prediction), [normal(one) for one in people]
    n, k = people.count(prediction), len(people)
    return (n * min(1, (n - 1) / 3) + (k - n) * min(1, n / 3)) / k


def test_vqa_is_the_official_definition() -> None:
    draw = random.Random(11)
    hits = 0.0
    for _ in range(600):
        answers = ["".join(draw.choice(["", *MARKS, " "]) + word for word in draw.choices(WORDS, k=draw.randint(1, 2)))
                   for _ in range(3)]  # fmt: skip
        answers = [answer.strip() for answer in answers]
        people = draw.choices(answers, k=draw.choice([1, 3, 10]))
        said = draw.choice([*answers, answers[0].upper(), f"the {answers[0]}."])
        found = vqa_accuracy(said, people)
        assert found == pytest.approx(vqa_again(said, people)), (said, people)
        hits += found
    assert hits > 100


def test_vqa_normalises_only_where_people_differ() -> None:
    assert vqa_accuracy("dog", ["dog"] * 10) == 1
    assert vqa_accuracy("the dog", ["dog"] * 10) == 0, "the official evaluation compares as it is where all agree"
    assert vqa_accuracy("the dog", ["dog"] * 9 + ["cat"]) == 1
    assert vqa_accuracy("two", ["2"] * 4 + ["3"] * 6) == 1
    assert vqa_accuracy("a\nb", ["a b"] * 10) == 1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The two dogs, a cat", "2 dogs cat"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("3.5 m.", "3.5 m"),
        ("mid-air", "mid air"),
        ("U.S.A.", "usa"),
    ],
)
def test_the_normalisation_of_vqa(text: str, normal: str) -> None:
    assert vqa(text) == normal


def test_contractions_are_mended_from_any_missing_apostrophe() -> None:
    assert CONTRACTIONS["youre"] == "you're"
    assert {key for key, word in CONTRACTIONS.items() if word == "y'all'd've"} == {
        "yall'd've", "y'alld've", "y'all'dve",
    }  # fmt: skip
    assert "shell" not in CONTRACTIONS
    assert "were" not in CONTRACTIONS


def test_squad_and_number_normalisation() -> None:
    assert squad("The  cat's, a  hat!") == "cats hat"
    assert [number(text) for text in (" 3.50", "+7", "1,234", "12%", "5.", "Yes.", "0.0")] == [
        "3.5", "7", "1234", "12", "5", "yes", "0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "wanted", "score"),
    [
        ("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("-100", "100", 0), ("5%", "0.05", 1), ("5%", "5", 0),
        ("0.0", "0", 0), ("0", "0", 1), ("Yes", "yes", 1), ("nan", "NaN", 1), ("inf", "5", 0), ("ten", "10", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(said: str, wanted: str, score: float) -> None:
    assert relaxed_accuracy(said, [wanted]) == score


def test_anls() -> None:
    assert anls("Helo  world", ["hello world"]) == pytest.approx(1 - 1 / 11)
    assert anls("abcd", ["abxy"]) == 0.5, "0.5 itself counts"
    assert anls("abcd", ["axyz"]) == 0
    assert anls("", [""]) == 1
    assert anls("", ["x"]) == 0
    assert anls("cat", ["dog", "cats"]) == 0.75
    assert anls("ß", ["xß"]) == pytest.approx(2 / 3), "lengths are those of the capitals: XSS"


def test_the_edit_distance_is_levenshteins() -> None:
    @cache
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    source = random.Random(0)
    for _ in range(300):
        a, b = ("".join(source.choices("ab😀", k=source.randint(0, 8))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)
    assert edit_distance("ab" * 5000, "ba" * 5000) == 2
    assert edit_distance("x" * 10_000, "") == edit_distance("", "x" * 10_000) == 10_000


CAPTIONS = [
    ("a man rides a horse", ["a man riding a horse", "the man is on a horse", "a person rides a horse"]),
    ("two dogs run on grass", ["two dogs are running on the grass", "dogs run"]),
    ("a red bus", ["a double decker bus is red", "a red bus in the street", "a bus"]),
    ("", ["a kitchen with a stove"]),
]
SAID, WANTED = [said for said, _ in CAPTIONS], [own for _, own in CAPTIONS]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    found = overlap("sentence_bleu", SAID, WANTED)
    assert found.scores == pytest.approx([sacrebleu.sentence_bleu(*one).score / 100 for one in CAPTIONS])
    columns = [[own[i] if i < len(own) else None for own in WANTED] for i in range(3)]
    assert found.figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(SAID, columns).score)
    assert "tok:13a" in found.signature
    found = overlap("sentence_chrf", SAID, WANTED)
    assert found.scores == pytest.approx([sacrebleu.sentence_chrf(*one).score / 100 for one in CAPTIONS])
    assert found.figures["chrf"] == pytest.approx(sacrebleu.corpus_chrf(SAID, columns).score)


@pytest.mark.slow  # its library imports for more than a second
def test_rouge_takes_the_best_reference() -> None:
    pytest.importorskip("rouge_score")
    said, wanted = ["the cat sat down"], [["a dog", "the cat lay down"]]
    assert overlap("rouge1", said, wanted).scores == pytest.approx([3 / 4])
    assert overlap("rouge2", said, wanted).scores == pytest.approx([1 / 3])
    assert overlap("rougeL", said, wanted).scores == pytest.approx([3 / 4])


def test_cider_is_the_published_definition() -> None:
    """CIDEr-D written from arXiv 1411.5726: clipped tf-idf cosines, n = 1 to 4, a penalty of length, times 10."""
    pytest.importorskip("pycocoevalcap")
    import math
    from collections import Counter

    said, wanted = SAID[:3], WANTED[:3]

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def weighted(text: str, n: int) -> dict[tuple[str, ...], float]:
        seen = lambda gram: sum(any(gram in grams(one, n) for one in own) for own in wanted)  # noqa: E731
        idf = {gram: math.log(len(wanted)) - math.log(max(1, seen(gram))) for gram in grams(text, n)}
        return {gram: count * idf[gram] for gram, count in grams(text, n).items()}

    def similarity(a: str, b: str, n: int) -> float:
        x, y = weighted(a, n), weighted(b, n)
        norm = math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))
        dot = sum(min(x[gram], y[gram]) * y[gram] for gram in x.keys() & y.keys())
        return (dot / norm if norm else dot) * math.exp(-((len(a.split()) - len(b.split())) ** 2) / 72)

    expected = [
        10 * sum(similarity(one, other, n) for n in (1, 2, 3, 4) for other in own) / 4 / len(own)
        for one, own in zip(said, wanted, strict=True)
    ]
    assert max(expected) > 0.5
    assert overlap("cider", said, wanted).scores == pytest.approx(expected, abs=1e-9)


def test_captions_lose_case_and_punctuation() -> None:
    assert caption_words('A man\'s "well-known" dog, 2 cats.') == "a man 's well-known dog 2 cats"
    assert caption_words("Two dogs (brown) can't sit. U.S. flags - $5 & up...") == (
        "two dogs -lrb- brown -rrb- ca n't sit u.s. flags $ 5 & up"
    )
    assert caption_words("It cannot be!") == "it can not be"
    assert [caption_words(text) for text in ("", " \n", ".", "a")] == ["", "", "", "a"]


def test_an_empty_caption_scores_nothing() -> None:
    pytest.importorskip("pycocoevalcap")
    wanted = [["a dog runs on grass"], ["two cats sleep here"], ["a red bus on a road"]]
    assert overlap("cider", ["a dog runs on grass", "", " ."], wanted).scores[1:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("caption", "words"),
    [  # what Stanford's tokeniser makes of them, without the marks that the evaluation leaves out
        ("Mr. Smith etc. on St. Mark's, A. and B.", "mr. smith etc. on st. mark 's a. and b"),
        ("a No. 7 bus. No.", "a no. 7 bus no"),
        ("A 'stop' sign {x}", "a stop sign -lcb- x -rcb-"),
        ("it’s a man’s hat… “yes”—no", "it 's a man 's hat yes no"),
        ("£5, 5¢ and ½ cup of 30°", "# 5 5 cents and 1/2 cup of 30 °"),
        ("x|y a=b c*d the '90s", "x | y a = b c * d the '90s"),
    ],
)
def test_caption_words_are_the_official_tokenisers(caption: str, words: str) -> None:
    assert caption_words(caption) == words
