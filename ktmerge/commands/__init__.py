"""The commands: each parses, calls one function, prints. No logic, and nothing heavy before a command needs it."""

# ruff: noqa: I001 - the order of the imports is the order of `ktmerge --help`: that of the work
from collections.abc import Sequence
from copy import copy
from typing import Any

from typer import Typer
from typer.main import get_command, get_command_name

from ktmerge.commands import tuning, blending, scoring, sweeping, running, looking, recipes, sharing, deltas, suites
from ktmerge.commands.app import app, meant

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


def command_line(words: Sequence[str] = ()) -> Any:
    """The commands, to be called with a list of arguments.

    Typer reads the signatures of all that it is given, which takes longer than many a command.

    Args:
        words: the arguments: where they begin with a command's name, that is all there will be; else every command.
    """
    return get_command(_named(app, meant(words)))


def _named(commands: Typer, words: Sequence[str]) -> Typer:
    """Of ``commands`` the one that ``words`` begin with, or all if none is called so."""
    for command in commands.registered_commands:
        name = command.name or get_command_name(getattr(command.callback, "__name__", ""))
        if words and name == words[0]:
            return _with(commands, [command], [])
    for group in commands.registered_groups:
        if words and group.name == words[0] and group.typer_instance is not None:
            part = copy(group)
            part.typer_instance = _named(group.typer_instance, words[1:])
            return _with(commands, [], [part])
    return commands


def _with(commands: Typer, registered: list[Any], groups: list[Any]) -> Typer:
    part = copy(commands)
    part.registered_commands, part.registered_groups = registered, groups
    return part
