"""The commands: each parses, calls one function, prints. No logic, and nothing heavy before a command needs it."""

# ruff: noqa: I001 - the order of the imports is the order of `ktmerge --help`: that of the work
from functools import cache
from typing import Any

from typer.main import get_command

from ktmerge.commands import tuning, blending, scoring, sweeping, running, looking, recipes, sharing, deltas, suites
from ktmerge.commands.app import app

__all__ = [
    "app",
    "blending",
    "command_line",
    "deltas",
    "looking",
    "recipes",
    "running",
    "scoring",
    "sharing",
    "suites",
    "sweeping",
    "tuning",
]


@cache
def command_line() -> Any:
    """All commands, to be called with a list of arguments. Typer reads their signatures, so it is made once."""
    return get_command(app)
