"""The commands: each parses, calls one function, prints. No logic, and nothing heavy before a command needs it."""

# ruff: noqa: I001 - the order of the imports is the order of `ktmerge --help`: that of the work
from ktmerge.commands import tuning, blending, scoring, sweeping, running, looking, recipes, sharing, deltas, suites
from ktmerge.commands.app import app

__all__ = [
    "app",
    "blending",
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
