"""What the command line draws: progress bars on a terminal, tables, errors. Nothing here decides anything."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from ktmerge.errors import printable_lines
from ktmerge.progress import Step, Unit

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

    from ktmerge.tuners import PreviewSample

SHOW_AFTER_SECONDS = 2.0
WIDTH = 120
"""Characters a line of a table may have where there is no terminal to say so."""


def stdout() -> Console:
    """Where results go; words are never looked at for colours, which takes minutes with a stranger's endless word."""
    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else WIDTH
    return _console(soft_wrap=not terminal, width=width)


def stderr() -> Console:
    """Where progress, notes and errors go, so that results can be piped."""
    return _console(stderr=True, soft_wrap=True)


def _console(**settings: Any) -> Console:
    """A console by which no word steers the terminal, whoever chose it."""
    from rich.console import Console
    from rich.segment import Segment

    class Escaping(Console):
        def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for one in super().render(renderable, options):
                plain = one.control or one.text.isprintable()
                yield one if plain else Segment(printable_lines(one.text), one.style)

    return Escaping(highlight=False, emoji=False, **settings)


def _is_drawn_on(stream: TextIO) -> bool:
    """Whether there is a terminal, or a wish for colours; to load what draws takes a tenth of a short command."""
    return stream.isatty() or any(name in os.environ for name in ("FORCE_COLOR", "TTY_COMPATIBLE"))


class TerminalProgress:
    """Bars with bytes or steps and time left, shown once work takes over two seconds; only notes off a terminal."""

    def __init__(self) -> None:
        self._console = stderr() if _is_drawn_on(sys.stderr) else None
        self._bars: RichBars | None = None

    def note(self, text: str) -> None:
        if self._console is None:
            with suppress(OSError):  # whoever listened is gone, and a stop that is told of is still to save its work
                print(printable_lines(text), file=sys.stderr)
        else:
            self._console.print(text, markup=False)

    @contextmanager
    def task(self, description: str, total: float | None, unit: Unit = "items") -> Iterator[Step]:
        if self._console is None or not self._console.is_terminal:
            yield _Quiet()
            return
        outermost = self._bars is None
        if self._bars is None:
            self._bars = _bars(self._console)
        bar = _Bar(self._bars, description, total, unit)
        try:
            yield bar
        finally:
            bar.close()
            if outermost:
                self._bars.stop()
                self._bars = None


class _Quiet:
    def advance(self, amount: float = 1) -> None:
        pass


class _Bar:
    """One bar; it starts the display only when the work turns out to be long."""

    def __init__(self, bars: RichBars, description: str, total: float | None, unit: Unit) -> None:
        from time import monotonic

        self._bars, self._unit, self._total, self._done = bars, unit, total, 0.0
        self._clock, self._started = monotonic, monotonic()
        self._id: TaskID = bars.add_task(description, total=total, amount=self._amount())

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        self._bars.update(self._id, completed=self._done, amount=self._amount())
        if not self._bars.live.is_started and self._clock() - self._started > SHOW_AFTER_SECONDS:
            self._bars.start()

    def close(self) -> None:
        self._bars.remove_task(self._id)

    def _amount(self) -> str:
        if self._unit == "bytes":
            of = f"/{self._total / 1e9:.2f}" if self._total else ""
            return f"{self._done / 1e9:.2f}{of} GB"
        of = f"/{self._total:.0f}" if self._total else ""
        return f"{self._done:.0f}{of} {self._unit}"


def _bars(console: Console) -> RichBars:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


_LONG = re.compile(r"(\S{200})\S{200,}(\S{200})")
"""A name that would fill the screen: a stranger's file may have it."""

_ODD = re.compile(r"[^ -~\n]")
"""What may be no letter, such as what a terminal obeys: JSON has escapes for it."""


def fail(message: str) -> None:
    """Print an error, one ``error:`` line per problem."""
    console = stderr()
    for line in message.splitlines():
        console.print("[bold red]error:[/] " + _plain(_LONG.sub(r"\1...\2", line)))


def print_json(value: Any) -> None:
    """Print machine-readable output: indented, keys in the order given, never wrapped; nothing steers a terminal."""
    is_utf = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=not is_utf)
    sys.stdout.write(_ODD.sub(_escaped, text) + "\n")


def _escaped(odd: re.Match[str]) -> str:
    return odd[0] if odd[0].isprintable() else json.dumps(odd[0])[1:-1]


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print rows of text; columns whose cells are all numbers are right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=_plain(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(row[i][:1] in "0123456789-+.<∞–" for row in rows)
        table.add_column(_plain(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*[_plain(cell) for cell in row])
    stdout().print(table)


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Print ``key  value`` lines, aligned."""
    width = max((len(key) for key in pairs), default=0)
    say = partial(stdout().print, markup=False) if _is_drawn_on(sys.stdout) else print
    for key, value in pairs.items():
        say(f"{key:<{width}}  {printable_lines(value)}")


def print_markdown(text: str) -> None:
    """Print a text in Markdown, set for reading on a terminal, as it is elsewhere."""
    from rich.markdown import Markdown

    console = stdout()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        console.file.write(text)


def print_preview(samples: Sequence[PreviewSample]) -> None:
    """Print samples with the trained tokens in reverse video, or between ⟦ ⟧ where there are no colours."""
    from rich.text import Text

    console = stdout()
    for sample in samples:
        trained = sum(flag for _, flag in sample.tokens)
        left_out = "; longer than max_length, left out" if sample.dropped else ""
        shown = f"; {', '.join(sample.images)}" if sample.images else ""
        counts = f"{len(sample.tokens)} tokens, {trained} trained{shown}{left_out}"
        console.rule(_plain(f"{sample.where}: {counts}"), align="left")
        text = Text()
        inside = False
        for token, flag in sample.tokens:
            if console.is_terminal:
                text.append(token, style="reverse green" if flag else "dim")
                continue
            if flag != inside:
                text.append("⟦" if flag else "⟧")
                inside = flag
            text.append(token)
        if inside:
            text.append("⟧")
        console.print(text)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(printable_lines(text))
