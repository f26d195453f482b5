"""What a generated answer scores against its references, each answer by itself. Pure functions, results in [0, 1]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ktmerge.eval.normalisation import NORMALISATIONS, one_line, vqa, vqa_punctuation, vqa_words

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def exact_match(prediction: str, references: Sequence[str], normalise: str) -> float:
    """1 if the prediction equals one of the references, both normalised."""
    normal = NORMALISATIONS[normalise]
    said = normal(prediction)
    return float(any(said == normal(reference) for reference in references))


def f1(prediction: str, references: Sequence[str], normalise: str) -> float:
    """Harmonic mean of precision and recall of words, best reference (arXiv 1606.05250); 1 if both have no words."""
    normal = NORMALISATIONS[normalise]
    said = normal(prediction).split()
    return max(_word_f1(said, normal(reference).split()) for reference in references)


def _word_f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def vqa_accuracy(prediction: str, references: Sequence[str], normalise: str = "none") -> float:
    """The official VQA accuracy: mean over people of min(1, matches among the *other* people's answers / 3).

    Texts are normalised only where people differ, as the official evaluation does. 1, 2, 3, 4 matches of ten give 0.3,
    0.6, 0.9, 1 (arXiv 1505.00468, evaluation code). ``normalise`` plays no part.
    """
    said = one_line(prediction)
    people = [one_line(reference) for reference in references]
    if len(set(people)) > 1:
        said = vqa(said)
        people = [vqa_words(vqa_punctuation(one)) for one in people]
    matches = [one == said for one in people]
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(people)


def vqa_simple(prediction: str, references: Sequence[str], normalise: str = "none") -> float:
    """min(1, matching people / 3), everything normalised as VQA does; gives 1/3, 2/3, 1 for 1, 2, 3 matches.

    Many harnesses print this as VQA accuracy; it is not the official number.
    """
    said = vqa(prediction)
    return min(1.0, sum(vqa(reference) == said for reference in references) / 3)


def relaxed_accuracy(prediction: str, references: Sequence[str], normalise: str = "none") -> float:
    """1 if within 5 % of a number, else if equal but for case (ChartQA, arXiv 2203.10244 section 5.1).

    A percent sign divides by 100. A reference of 0 leaves no relative error and is compared as text.
    """
    return float(any(_relaxed(prediction.strip(), reference.strip()) for reference in references))


def _relaxed(said: str, wanted: str) -> bool:
    a, b = _number(said), _number(wanted)
    if a is not None and b:
        return abs(a - b) / abs(b) <= RELAXED_TOLERANCE
    return said.lower() == wanted.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if value - value == 0 else None  # nan and infinity are words here


def anls(prediction: str, references: Sequence[str], normalise: str = "none") -> float:
    """Best over references of 1 - edit distance / longest length, 0 below 0.5 (arXiv 1905.13648, eq. 1).

    The distance is between lower-case texts with single spaces, the length that of the texts as they are, in capitals:
    so does the published evaluation code.
    """
    return max(_anls(prediction, reference) for reference in references)


def _anls(prediction: str, reference: str) -> float:
    longest = max(len(prediction.upper()), len(reference.upper()))
    if not longest:
        return 1.0
    a, b = (" ".join(text.lower().split()) for text in (prediction, reference))
    similarity = 1 - edit_distance(a, b) / longest
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of single characters.

    All rows of a column of the usual table at once, as bits of whether a value is one more or one less than the one
    above it (Hyyrö 2003, after Myers 1999): long answers cost milliseconds.
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    every, last = (1 << len(a)) - 1, 1 << len(a) - 1
    more, less, distance = every, 0, len(a)
    for letter in b:
        equal = places.get(letter, 0)
        diagonal = (((equal & more) + more) ^ more) | equal | less
        up, down = less | ~(diagonal | more) & every, more & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & every, down << 1 & every
        more, less = down | ~(diagonal | up) & every, up & diagonal
    return distance


ANSWER: dict[str, Callable[[str, Sequence[str], str], float]] = {
    "exact_match": exact_match,
    "f1": f1,
    "vqa": vqa_accuracy,
    "vqa_simple": vqa_simple,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
}
