"""The letter a model means, read out of what it says. A rule, not a judge; what it cannot read is counted as unread."""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def lettered(choices: Sequence[str]) -> str:
    """The choices as the prompt shows them: ``A. first``, one a line."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def read_letter(text: str, choices: Sequence[str]) -> int | None:
    """Which of the choices ``text`` names, as an index; None where no rule below finds exactly one.

    In this order: the letter alone or at the beginning (``B``, ``(b)``, ``B. second``); after the word answer (``the
    answer is (B)``); the only capital letter of a choice that stands by itself (``A`` before a small word is an
    article); the full text of exactly one choice, and of no longer one around it.
    """
    last = LETTERS[len(choices) - 1]
    rules = (
        (rf"\s*[(\[*]*([A-{last}a-{last.lower()}])[)\]*.:,]*\s*$", 0),
        (rf"\s*[(\[*]*([A-{last}])(?:[)\]*.:,]+(?:\s|$)|\s*\n)", 0),
        (rf".*?\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*[(\[*]*([A-{last}])\b(?!')", re.DOTALL),
    )
    for rule, flags in rules:
        found = re.match(rule, re.sub(r"\b(Answer|Option|Choice)\b", lambda m: m[0].lower(), text), flags)
        if found:
            return LETTERS.index(found[1].upper())
    alone = {match[1] for match in re.finditer(rf"(?<![\w'])([A-{last}])(?![\w'])(?!(?<=[AI])\s+[a-z])", text)}
    if len(alone) == 1:
        return LETTERS.index(alone.pop())
    if alone:
        return None
    return _named(text, choices)


def _named(text: str, choices: Sequence[str]) -> int | None:
    lower = text.lower()
    wanted = [choice.strip().lower() for choice in choices]
    inside = [i for i, choice in enumerate(wanted) if re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", lower)]
    longest = [i for i in inside if not any(i != j and wanted[i] in wanted[j] for j in inside)]
    return longest[0] if len(longest) == 1 else None
