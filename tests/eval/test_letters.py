from __future__ import annotations

import pytest

from ktmerge.eval.letters import lettered, read_letter

CHOICES = ("red", "dark red", "blue", "none of these")


@pytest.mark.parametrize(
    ("said", "index"),
    [
        ("B", 1), (" b", 1), ("(C)", 2), ("**D**", 3), ("B. dark red", 1), ("B) dark red or C", 1), ("A\nbecause B", 0),
        ("The answer is (C).", 2), ("Answer: D", 3), ("I'd go for option B here", 1), ("Surely C!", 2),
        ("It is dark red.", 1), ("blue", 2), ("It is red", 0), ("A dark sky, so C", 2),
        ("", None), ("E", None), ("green", None), ("B or C", None), ("red or blue", None), ("A red one", 0),
        ("Blueish", None), ("I don't know", None),
    ],
)  # fmt: skip
def test_the_letter_meant(said: str, index: int | None) -> None:
    assert read_letter(said, CHOICES) == index


def test_choices_are_shown_by_letter() -> None:
    assert lettered(["x", "y"]) == "A. x\nB. y"
