"""What a writer takes over from a run that died: which remains are its own, and what it says about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktmerge.checkpoints.journal import Entry, Remains, read_journal


class Inheritance:
    """Chooses among the temporary folders that dead runs left beside an output.

    Args:
        pin: what this run is.
        wanted: whether to go on with one; otherwise none fits.
    """

    def __init__(self, pin: Mapping[str, Any], wanted: bool) -> None:
        self._pin = dict(pin)
        self._wanted = wanted
        self._taken: Remains | None = None
        self._others: list[Remains] = []

    @property
    def is_taken(self) -> bool:
        """Whether there was something to go on with."""
        return self._taken is not None

    def fits(self, folder: Path) -> bool:
        """Whether this run goes on with what is in ``folder``."""
        remains = read_journal(folder)
        if remains is None:
            return False
        if self._wanted and self._taken is None and remains.pin == self._pin:
            self._taken = remains
            return True
        self._others.append(remains)
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
            return [f"starting from the beginning: {self._why_not()}"]
        done = max((len(remains.entries) for remains in self._others), default=0)
        if done:
            return [f"removed what an interrupted run left ({done} finished tensors); --resume goes on with such"]
        return ["removed what an interrupted run left"] if removed else []

    def _why_not(self) -> str:
        if not self._others:
            return "no interrupted run of this output left anything finished"
        theirs = self._others[0].pin
        differing = [key for key in self._pin if theirs.get(key) != self._pin[key]]
        return f"what an interrupted run left differs in {', '.join(differing) or 'kind'}; it is removed"
