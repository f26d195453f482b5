"""What a writer takes over from a run that died: which remains are its own, and what it says about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.journal import Entry, Remains, read_journal

Departure = Callable[[Mapping[str, Any], Mapping[str, Any]], str]
"""How another's pin differs from one's own, in words; empty if it means the same bytes."""


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The keys in which two pins differ; empty if they are equal."""
    return "" if theirs == ours else ", ".join(key for key in ours if theirs.get(key) != ours[key]) or "kind"


class Inheritance:
    """Chooses among the temporary folders that dead runs left beside an output.

    Args:
        pin: what this run is.
        wanted: whether to go on with one; otherwise none fits.
        departure: tells pins apart.
    """

    def __init__(self, pin: Mapping[str, Any], wanted: bool, departure: Departure = differing) -> None:
        self._pin = dict(pin)
        self._wanted = wanted
        self._departure = departure
        self._taken: Remains | None = None
        self._most = 0
        self._why_not = ""

    @property
    def is_taken(self) -> bool:
        """Whether there was something to go on with."""
        return self._taken is not None

    def fits(self, folder: Path) -> bool:
        """Whether this run goes on with what is in ``folder``."""
        remains = read_journal(folder)
        if remains is None:
            return False
        if self._wanted and self._taken is None:
            departure = self._departure(remains.pin, self._pin)
            if not departure:
                self._taken = remains
                return True
            self._why_not = self._why_not or f"what an interrupted run left differs in {departure}; it is removed"
        self._most = max(self._most, len(remains.entries))
        return False

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The finished tensors of the folder taken over."""
        return {} if self._taken is None else self._taken.entries

    def notes(self, removed: int) -> list[str]:
        """What a person should know, at most a line: ``removed`` folders of dead runs are gone."""
        if self._taken is not None:
            return [f"going on with an interrupted run, which finished {len(self._taken.entries)} tensors"]
        if self._wanted:
            nothing = "no interrupted run of this output left anything finished"
            return [f"starting from the beginning: {self._why_not or nothing}"]
        if self._most:
            return [f"removed what an interrupted run left ({self._most} finished tensors); --resume goes on with such"]
        return ["removed what an interrupted run left"] if removed else []
