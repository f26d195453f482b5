"""The survey's table of ways to tune: E, F, O, Avg and H of each, with intervals over items and means over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from findings import DRAWS, MEASURES, span
from parts import BASE, read, sides_of
from tradeoff import Array, Items, Sides, interval
from tuned import Place, chosen, trial, trials
from tunings import FULL, Tuning, tunings
from worlds.world import REPORT

from ktmerge.drawing import GREY, drawn, new_figure, styles, to_file

COLUMNS = ("way", "trained", "U", "D", "E", "F", "O", "Avg", "H", "H minus full", "H by seed", "chosen", "seconds")


@dataclass(frozen=True)
class Row:
    """One way on one world, means over seeds; arrays hold the estimate and its bootstrap resamples.

    Attributes:
        tuning: None of the base.
        value: learning rate, or lambda of a blend.
        trained: share of the parameters that were trained.
        seconds: of training.
        raw: U, D and Avg, the mean over all sets of both sides.
        gains: E, F, O and H.
        harmonics: H of each seed.
    """

    tuning: Tuning | None
    value: float
    trained: float
    seconds: float
    raw: Mapping[str, Array]
    gains: Mapping[str, Array]
    harmonics: Sequence[float]


@dataclass(frozen=True)
class Table:
    """All ways of a world that were tried to the end on the same seeds.

    Attributes:
        missing: names of the others.
        planned: how many seeds there should be.
    """

    parts: Sequence[Place]
    planned: int
    rows: Sequence[Row]
    missing: Sequence[str]

    @classmethod
    def of(cls, parts: Sequence[Place]) -> Table | None:
        """The table on as many seeds as all ways are tried on, or as far as the first goes; None without a full one."""
        every = tunings(parts[0].name)
        done = {one.name: _done(parts, one) for one in every}
        if not done[FULL]:
            return None
        count = max(1, min(done.values()))
        used = parts[:count]
        sides = [sides_of(part, REPORT, DRAWS) for part in used]
        there = [one for one in every if done[one.name] >= count]
        rows = [_base(used, sides), *(_row(used, sides, one) for one in there)]
        return cls(used, len(parts), rows, [one.name for one in every if one not in there])

    def text(self) -> str:
        """As a section in Markdown."""
        world, count = self.parts[0].world, len(self.parts)
        first = f"### {self.parts[0].name}: {world.model}, tuned on {', '.join(self.parts[0].experts)}"
        seeds = f"{count} seed{'s' if count > 1 else ''}" + (f" of {self.planned}" if count < self.planned else "")
        lines = [first, f"{seeds}; upstream: {', '.join(world.upstream)}; scores are {world.measure}."]
        if count < self.planned or self.missing:
            missing = f" Not there yet: {', '.join(self.missing)}." if self.missing else ""
            lines.append(f"**Partial**: made before all runs were done.{missing}")
        return "\n\n".join([*lines, self._grid(), self._verdict()])

    def _grid(self) -> str:
        full = self.full
        cells = [list(COLUMNS), ["---"] * len(COLUMNS), *(list(_cells(row, full)) for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)

    @property
    def full(self) -> Row:
        """The full fine-tune."""
        return next(row for row in self.rows if row.tuning is not None and row.tuning.name == FULL)

    def _verdict(self) -> str:
        """Which ways are told apart from the full fine-tune by H, and which are not."""
        found: dict[str, list[str]] = {"better": [], "worse": [], "alike": []}
        for row in self.rows:
            if row.tuning is not None and row is not self.full:
                _, low, high = interval(row.gains["H"] - self.full.gains["H"])
                found["better" if low > 0 else "worse" if high < 0 else "alike"].append(row.tuning.name)
        words = {"better": "Above the full fine-tune", "worse": "Below it", "alike": "Not told apart from it"}
        return "\n".join(f"* {words[key]} in H: {', '.join(names) or 'none'}." for key, names in found.items())


def to_csv(tables: Sequence[Table]) -> str:
    """Every number of the tables, one row for each world and way."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbers = [f"{key}{end}" for key in ("U", "D", "Avg", *MEASURES, "H_minus_full") for end in ("", "_low", "_high")]
    writer.writerow(["world", "way", "kind", "upstream_data", "seeds", "value", "trained_share", "seconds", *numbers])
    for table in tables:
        for row in table.rows:
            way = row.tuning
            arrays = [*row.raw.values(), *row.gains.values(), row.gains["H"] - table.full.gains["H"]]
            writer.writerow(
                [table.parts[0].name, way.name if way else BASE, way.kind if way else "", way.uses if way else "",
                 len(table.parts), f"{row.value:g}", f"{row.trained:.4f}", f"{row.seconds:.1f}",
                 *(f"{number:.4f}" for array in arrays for number in interval(array))]
            )  # fmt: skip
    return text.getvalue()


def picture(tables: Sequence[Table], kind: str) -> bytes:
    """E over F of every way and value on the first seed, one panel for each of two tables, chosen values filled."""
    with drawn():
        figure = new_figure(900, 420)
        panels = list(zip(figure.subplots(1, 2).flat, tables, strict=False))
        ways = {row.tuning.name: row.tuning for _, table in panels for row in table.rows if row.tuning is not None}
        looks, labels = styles(ways, BASE), {}
        for axes, table in panels:
            part = table.parts[0]
            sides = sides_of(part, REPORT)
            for name in (row.tuning.name for row in table.rows if row.tuning is not None):
                points = [one["points"][0] for one in trials(part, ways[name], ways[name].values(part.world.name))]
                places = [sides.gains(point[REPORT]) for point in points]
                look, value = looks[name], chosen(part, ways[name])
                at = next(number for number, point in enumerate(points) if point["value"] == value)
                axes.plot(
                    [place["F"][0] for place in places], [place["E"][0] for place in places], color=look.colour,
                    linewidth=0.7, marker=look.marker, markersize=5, markerfacecolor="none", markeredgewidth=0.7,
                )  # fmt: skip
                (labels[name],) = axes.plot(
                    places[at]["F"][0], places[at]["E"][0], look.marker, color=look.colour, markersize=5
                )
            (mark,) = axes.plot(0, 0, "+", color=GREY)
            axes.set_title(part.name)
            axes.set_xlabel("F: upstream, points above the base")
            axes.set_ylabel("E: downstream, points above the base")
        labels[BASE] = mark
        figure.legend(list(labels.values()), list(labels), loc="center right", fontsize=7)
        figure.tight_layout(rect=(0, 0, 0.85, 1))
        return to_file(figure, kind)


def _done(parts: Sequence[Place], tuning: Tuning) -> int:
    """How many seeds, from the first on, a way was tried on; on the first, with all values."""
    value = chosen(parts[0], tuning)
    if value is None:
        return 0
    there = [trial(part, tuning, value) is not None for part in parts]
    return there.index(False) if False in there else len(there)


def _row(parts: Sequence[Place], sides: Sequence[Sides], tuning: Tuning) -> Row:
    value = chosen(parts[0], tuning)
    found = [trial(part, tuning, value) or {} for part in parts if value is not None]
    items = [one["points"][0][REPORT] for one in found]
    return Row(
        tuning=tuning,
        value=value or 0.0,
        trained=float(np.mean([one["trained"] / one["of"] for one in found])),
        seconds=float(np.mean([one["seconds"] for one in found])),
        **_measured(parts, sides, items),
    )


def _base(parts: Sequence[Place], sides: Sequence[Sides]) -> Row:
    return Row(None, 0.0, 0.0, 0.0, **_measured(parts, sides, [_items(part) for part in parts]))


def _items(part: Place) -> Items:
    document = read(part, BASE)
    return {} if document is None else document["points"][0][REPORT]


def _measured(parts: Sequence[Place], sides: Sequence[Sides], items: Sequence[Items]) -> dict[str, Any]:
    """Means over seeds of what `Row` holds."""
    gains = [one.gains(some) for one, some in zip(sides, items, strict=True)]
    raw = [_raw(part, one, some) for part, one, some in zip(parts, sides, items, strict=True)]
    return {
        "raw": {key: np.mean([one[key] for one in raw], axis=0) for key in raw[0]},
        "gains": {key: np.mean([one[key] for one in gains], axis=0) for key in MEASURES},
        "harmonics": [float(one["H"][0]) for one in gains],
    }


def _raw(part: Place, sides: Sides, items: Items) -> dict[str, Array]:
    up, down = sides.raw(items)
    count = len(part.world.upstream)
    return {"U": up, "D": down, "Avg": (count * up + len(part.experts) * down) / (count + len(part.experts))}


def _cells(row: Row, full: Row) -> Iterator[str]:
    way = row.tuning
    label = BASE if way is None else way.name if way.uses == "–" else f"{way.name} (upstream {way.uses})"
    values = [f"{row.raw[key][0]:.1f}" for key in ("U", "D")]
    values += [span(row.gains[key], 1, signed=True) for key in ("E", "F", "O")]
    values += [f"{row.raw['Avg'][0]:.1f}", span(row.gains["H"], 1)]
    compared = "" if row is full else span(row.gains["H"] - full.gains["H"], 1, signed=True)
    seeds = "–".join(dict.fromkeys(f"{end(row.harmonics):.1f}" for end in (min, max)))
    if way is None:
        return iter([label, "", *values, compared, seeds, "", ""])
    kind = "rate" if way.blend is None else "lambda"
    return iter([label, f"{row.trained:.1%}", *values, compared, seeds, f"{kind} {row.value:g}", f"{row.seconds:.0f}"])
