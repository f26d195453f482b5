"""The suites that come with ktmerge, listed and shown."""

from __future__ import annotations

from dataclasses import dataclass

from ktmerge.api.inputs import text_of
from ktmerge.recipes import load_suite, ready


@dataclass(frozen=True)
class ListedSuite:
    """One ready suite.

    Attributes:
        upstream: names of its upstream sets.
        downstream: names of its downstream sets.
        data: what they are read from.
    """

    name: str
    upstream: list[str]
    downstream: list[str]
    data: list[str]


def list_suites() -> list[ListedSuite]:
    """Every ready suite, by name."""
    listed = []
    for name in ready.names():
        suite = load_suite(name)
        data = dict.fromkeys(str(getattr(task, "data", task.name)) for task in suite.tasks())
        upstream, downstream = ([task.name for task in side] for side in (suite.upstream, suite.downstream))
        listed.append(ListedSuite(name, upstream, downstream, list(data)))
    return listed


def show_suite(reference: str) -> str:
    """The text of a suite file, or of a ready suite by its name."""
    path, _ = ready.locate(reference)
    return text_of(path)
