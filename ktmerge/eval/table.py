"""Scores as text tables for a terminal; they fit themselves to its width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ktmerge.eval.partition import FORMULAS as PARTITION_FORMULAS
from ktmerge.eval.partition import Share
from ktmerge.eval.significance import holm
from ktmerge.eval.summary import COMPARED, FORMULAS, Estimate, ModelSummary

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from ktmerge.eval.results import Results

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A heading over one cell per model; ``group`` is upstream, downstream or empty."""

    heading: str
    group: str
    cells: list[str]


class ScoreTable:
    """Models as rows; each set's score, then E, F, O, H with intervals, kept, worst. Turned on its side or split into
    several tables where the terminal is too narrow; numbers are never cut."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names, columns = list(self._results.models), score_columns(self._results)
        yield from fitting(console, options, names, columns, "model")
        yield from _extras(console, options, self._results)
        yield from _figures(console, options, self._results)
        yield from _shares(console, options, self._results)
        yield from (Text(line, style="dim") for line in _footer(self._results, columns))
        yield from (Text(caution, style="dim") for caution in self._results.cautions)
        yield from (Text(f"warning: {warning}", style="yellow") for warning in self._results.warnings)


class DifferencesTable:
    """A - B for every two models, with paired intervals; those that exclude 0 are marked."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        pairs = self._results.pairs()
        if not pairs:
            return
        compared = [self._results.difference(a, b).numbers for a, b in pairs]
        columns = [
            Column(key, "", [with_interval(numbers[key], mark=True) for numbers in compared])
            for key in COMPARED
            if all(key in numbers for numbers in compared)
        ]
        yield from fitting(console, options, [f"{a} - {b}" for a, b in pairs], columns, "difference")
        yield Text("* the 95 % interval of the paired difference excludes 0", style="dim")
        yield from _mcnemar(console, options, self._results, pairs)
        if len(pairs) > 3:
            yield Text(f"{len(pairs)} comparisons: about one in twenty excludes 0 by chance.", style="dim")


def score_columns(results: Results) -> list[Column]:
    """The columns of the score table; those that no model has a number for are left out."""
    scores = [
        Column(task.name, task.side, [f"{results.scores[name][task.name].mean:.1f}" for name in results.models])
        for task in results.tasks
    ]
    base = list(results.models).index(results.base)
    summaries = list(results.summary.models.values())
    numbers = [
        Column(key, "", ["0.0" if i == base else with_interval(getattr(one, key)) for i, one in enumerate(summaries)])
        for key in ("E", "F", "O")
    ]
    numbers += [
        Column("Avg", "", [plain(one.avg) for one in summaries]),
        Column("H", "", [with_interval(one.H, signed=False) for one in summaries]),
        Column("kept %", "", [plain(one.retention) for one in summaries]),
        Column(
            "gain share %", "", [NOTHING if i == base else plain(one.gain_share) for i, one in enumerate(summaries)]
        ),
        Column("worst upstream", "", [NOTHING if i == base else worst(one) for i, one in enumerate(summaries)]),
    ]
    return scores + [column for column in numbers if any(cell not in (NOTHING, "0.0") for cell in column.cells)]


def with_interval(estimate: Estimate | None, signed: bool = True, mark: bool = False) -> str:
    """``+3.1 [+1.0, +5.2]``; with ``mark`` a star where the interval excludes 0."""
    if estimate is None:
        return NOTHING
    form = "{:+.1f}" if signed else "{:.1f}"
    value, low, high = (form.format(_no_minus_zero(number)) for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]{'*' if mark and estimate.excludes_zero else ''}"


def plain(estimate: Estimate | None) -> str:
    return NOTHING if estimate is None else f"{_no_minus_zero(estimate.value):.1f}"


def worst(summary: ModelSummary) -> str:
    if summary.worst is None:
        return NOTHING
    return f"{_no_minus_zero(summary.worst.difference.value):+.1f} {summary.worst.task}"


def _no_minus_zero(number: float) -> float:
    return 0.0 if abs(number) < 0.05 else number


def fitting(
    console: Console, options: ConsoleOptions, names: list[str], columns: list[Column], corner: str
) -> Iterator[RenderableType]:
    """The first layout that fits: models as rows, models as columns, or models as rows in several tables."""
    for table in (_upright(names, columns, corner), _sideways(names, columns, corner)):
        if _fits(console, options, table):
            yield table
            return
    rest = columns
    while rest:
        fitting = [n for n in range(1, len(rest) + 1) if _fits(console, options, _upright(names, rest[:n], corner))]
        together = fitting[-1] if fitting else 1
        yield Padding(_upright(names, rest[:together], corner), (0, 0, 1, 0))
        rest = rest[together:]


def _fits(console: Console, options: ConsoleOptions, table: Table) -> bool:
    return Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width


def _upright(names: list[str], columns: list[Column], corner: str) -> Table:
    table = _table()
    table.add_column(corner, no_wrap=True)
    for column in columns:
        table.add_column(_heading(column), justify=_justify(column), no_wrap=True)
    for i, name in enumerate(names):
        table.add_row(Text(name), *[Text(column.cells[i]) for column in columns])
    return table


def _sideways(names: list[str], columns: list[Column], corner: str) -> Table:
    table = _table()
    table.add_column("" if corner == "difference" else "set", no_wrap=True)
    for name in names:
        table.add_column(Text(name), justify="right", no_wrap=True)
    before = columns[0].group if columns else ""
    for column in columns:
        if column.group != before:
            table.add_section()
            before = column.group
        label = Text(column.heading) + (Text(f" {ARROWS[column.group]}", style="dim") if column.group else Text())
        table.add_row(label, *[Text(cell) for cell in column.cells])
    return table


ARROWS = {"upstream": "up", "downstream": "down"}


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _heading(column: Column) -> Text:
    return Text(column.heading) + (Text(f"\n{ARROWS[column.group]}", style="dim") if column.group else Text())


def _justify(column: Column) -> Literal["left", "right"]:
    return "left" if column.heading == "worst upstream" else "right"


def _extras(console: Console, options: ConsoleOptions, results: Results) -> Iterator[RenderableType]:
    """Perplexity per byte of the text sets, if there are any."""
    texts = [task for task in results.tasks if task.kind == "text"]
    if not texts:
        return
    columns = [
        Column(task.name, "", [_perplexity(results, name, task.name) for name in results.models]) for task in texts
    ]
    yield Padding(Text("perplexity per byte of the text sets (lower is better)", style="dim"), (1, 0, 0, 0))
    yield from fitting(console, options, list(results.models), columns, "model")


def _shares(console: Console, options: ConsoleOptions, results: Results) -> Iterator[RenderableType]:
    """What became of the items that the reference changed, if there is one."""
    found = [results.partition(name) for name in results.models]
    columns = [
        Column(f"{key} %", "", [NOTHING if one is None else of_total(getattr(one, key)) for one in found])
        for key in PARTITION_FORMULAS
    ]
    if not any(cell != NOTHING for column in columns for cell in column.cells):
        return
    yield Padding(Text(f"items that '{results.reference}' changed, or might have", style="dim"), (1, 0, 0, 0))
    yield from fitting(console, options, list(results.models), columns, "model")
    yield from (Text(line, style="dim") for line in PARTITION_FORMULAS.values())


def of_total(share: Share) -> str:
    return NOTHING if share.percent is None else f"{share.percent:.1f} of {share.total}"


def _figures(console: Console, options: ConsoleOptions, results: Results) -> Iterator[RenderableType]:
    """Numbers of whole sets beside the scores: unread answers, corpus BLEU, macro F1."""
    columns = [
        Column(f"{task.name} {name}", "", [_figure(results, model, task.name, name) for model in results.models])
        for task in results.tasks
        for name in results.scores[results.base][task.name].figures
    ]
    if columns:
        yield Padding(Text("shown beside the scores (0-100; unread: percent of answers)", style="dim"), (1, 0, 0, 0))
        yield from fitting(console, options, list(results.models), columns, "model")


def _figure(results: Results, model: str, task: str, name: str) -> str:
    value = results.scores[model][task].figures.get(name)
    return NOTHING if value is None else f"{value:.1f}"


def _mcnemar(
    console: Console, options: ConsoleOptions, results: Results, pairs: Sequence[tuple[str, str]]
) -> Iterator[RenderableType]:
    """McNemar's p for every pair on every set of right and wrong answers, adjusted for how many there are."""
    tested = [(pair, results.mcnemar(*pair)) for pair in pairs]
    cells = [(pair, task) for pair, found in tested for task in found]
    if not cells:
        return
    adjusted = dict(zip(cells, holm([found[task].p for _, found in tested for task in found]), strict=True))
    columns = [
        Column(task.name, task.side, [f"{adjusted[pair, task.name]:.3f}" if (pair, task.name) in adjusted else NOTHING
                                      for pair, _ in tested])
        for task in results.tasks
        if any(task.name in found for _, found in tested)
    ]  # fmt: skip
    said = f"p by McNemar's exact test on items right or wrong, adjusted (Holm) for {len(cells)} tests"
    yield Padding(Text(said, style="dim"), (1, 0, 0, 0))
    yield from fitting(console, options, [f"{a} - {b}" for a, b in pairs], columns, "difference")


def _perplexity(results: Results, model: str, task: str) -> str:
    value = results.scores[model][task].extras().get("perplexity_per_byte")
    return NOTHING if value is None else f"{value:.3f}"


def _footer(results: Results, columns: Sequence[Column]) -> list[str]:
    shown = {column.heading for column in columns}
    keys = {"E": "E", "F": "F", "O": "O", "avg": "Avg", "H": "H", "retention": "kept %", "gain_share": "gain share %"}
    keys["worst"] = "worst upstream"
    lines = [FORMULAS[key] for key, heading in keys.items() if heading in shown]
    if "H" in shown:
        lines.append(f"{FORMULAS['means']}. All scores are on 0-100.")
    items = ", ".join(f"{task.name} {len(task.rows) or 'totals only'}" for task in results.tasks)
    said = f"{results.drawn}, {results.bootstrap} resamples, seed {results.seed}"
    lines.append(f"[95 % interval]: paired bootstrap over {said}.")
    lines.append(f"items: {items}")
    return lines
