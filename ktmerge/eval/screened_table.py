"""What was measured without labels as a text table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from ktmerge.eval.table import NOTHING, Column, fitting

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from ktmerge.eval.screened import Screened
    from ktmerge.eval.summary import Estimate

_HEADINGS = {
    "to_base": ("KL to base", 4),
    "to_experts": ("KL to experts", 4),
    "J": ("J", 4),
    "behind": ("J behind best", 4),
    "disagreement": ("disagreement %", 1),
}
"""By number of a model, its heading and digits."""


class ScreenedTable:
    """Models as rows, or as columns where the terminal is narrow; only columns that something was measured for."""

    def __init__(self, screened: Screened) -> None:
        self._screened = screened

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        models, numbers = self._screened.models, self._screened.numbers
        columns = [
            Column(heading, "", [_told(getattr(numbers[name], key), digits) for name in models])
            for key, (heading, digits) in _HEADINGS.items()
            if any(getattr(numbers[name], key) is not None for name in models)
        ]
        yield from fitting(console, options, models, columns, "model")
        yield from (Text(note, style="dim") for note in self._screened.notes())


def _told(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return NOTHING
    value, low, high = (f"{number:.{digits}f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
