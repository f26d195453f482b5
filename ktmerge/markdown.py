"""Pieces of Markdown from texts that a stranger may have chosen."""

from __future__ import annotations

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every cell on one line and without markup."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell(text) for text in texts)} |" for texts in lines)


def block(language: str, text: str) -> str:
    """A fenced block, whatever fences stand in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}{fence}"


def line(text: str) -> str:
    """Text on one line, without markup that a page would run."""
    return " ".join(text.split()).replace("<", "&lt;")


def cell(text: str) -> str:
    """Such a line inside a table."""
    return line(text).replace("|", "\\|")
