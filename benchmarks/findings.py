"""What the sweeps found: rows for the table, the CSV and the picture, with intervals over items and seeds' means."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from parts import BASE, Part, Point, read, sides_of
from sweep import area, chosen, kept_front
from tradeoff import Array, Sides, hypervolume, interval
from worlds.world import REPORT, SELECT

from ktmerge.drawing import GREY, drawn, new_figure, styles, to_file
from ktmerge.merge.catalogue import NO_DATA, data_of_recipe
from ktmerge.merge.registry import methods as registered
from ktmerge.recipes.schema import Blend

DRAWS = 1000
WISE = "linear"
"""With one expert its way by lambda is the WiSE line; with several it is that of their mean."""
RIVALS = (WISE, "task_arithmetic", "ties", "dare_ties")
MEASURES = ("E", "F", "O", "H")
GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Row:
    """One method on one part, means over seeds; arrays hold the estimate and its bootstrap resamples.

    Attributes:
        area: hypervolume on the report split of the front that was chosen on the selection split.
        selected: hypervolume on the selection split: what may decide between methods.
        gains: E, F, O and H at the point chosen there.
        worst: largest loss on an upstream set there.
        seeds: area of each seed.
        way: what was swept, and the value chosen, by seed.
        reach: for each d of `GRID`, the most u kept by a point of the front with at least that d; mean over seeds.
    """

    name: str
    data: str
    area: Array
    selected: float
    gains: Mapping[str, Array]
    worst: float
    seeds: Sequence[float]
    way: str
    reach: Array
    refused: Sequence[str]


def rows(parts: Sequence[Part], methods: Sequence[str]) -> Iterator[Row]:
    """A row for every method that has points on all seeds of a part."""
    data = {name: data_of_recipe(Blend(method=name)) for name in registered()}
    select = [sides_of(part, SELECT) for part in parts]
    report = [sides_of(part, REPORT, DRAWS) for part in parts]
    for name in methods:
        found = [read(part, name) for part in parts]
        if any(not one or not one["points"] for one in found):
            continue
        each = [_one(s, r, one["points"]) for s, r, one in zip(select, report, found, strict=True) if one]
        yield Row(
            name=name,
            data=data.get(name, NO_DATA),
            area=np.mean([one.area for one in each], axis=0),
            selected=float(np.mean([one.selected for one in each])),
            gains={key: np.mean([one.gains[key] for one in each], axis=0) for key in MEASURES},
            worst=float(np.mean([one.worst for one in each])),
            seeds=[float(one.area[0]) for one in each],
            way=_turned([(one.way, one.value) for one in each]),
            reach=np.mean([one.reach for one in each], axis=0),
            refused=[text for one in found if one for text in one.get("refused", ())],
        )


@dataclass(frozen=True)
class _One:
    area: Array
    selected: float
    gains: Mapping[str, Array]
    worst: float
    way: str
    value: float
    reach: Array


def _one(select: Sides, report: Sides, points: Sequence[Point]) -> _One:
    best = chosen(select, kept_front(select, points))
    places = [report.normalised(point[REPORT]) for point in kept_front(select, points)]
    mean = report.resamples.mean
    drops = [mean(name, best[REPORT][name])[0] - mean(name, report.base[name])[0] for name in report.upstream]
    return _One(
        area=hypervolume(np.array(places)),
        selected=area(select, points),
        gains=report.gains(best[REPORT]),
        worst=float(min(drops)),
        way=best["way"],
        value=best["value"],
        reach=np.array([max((u[0] for u, d in places if d[0] >= at), default=0.0) for at in GRID]).clip(min=0),
    )


def ends(parts: Sequence[Part]) -> Iterator[tuple[str, dict[str, Array], float]]:
    """Base and full fine-tunes: name, E/F/O/H and worst drop, means over seeds."""
    report = [sides_of(part, REPORT, DRAWS) for part in parts]
    for name in (BASE, *parts[0].experts):
        items = [part["points"][0][REPORT] for part in (read(part, name) for part in parts) if part]
        gains = [sides.gains(one) for sides, one in zip(report, items, strict=True)]
        drops = [
            min(sides.resamples.mean(s, one[s])[0] - sides.resamples.mean(s, sides.base[s])[0] for s in sides.upstream)
            for sides, one in zip(report, items, strict=True)
        ]
        yield name, {key: np.mean([one[key] for one in gains], axis=0) for key in MEASURES}, float(np.mean(drops))


def table(found: Sequence[Row], parts: Sequence[Part]) -> str:
    """All rows by area, then base and experts, in Markdown; methods that came out the same stand in one row."""
    wise = next(row.area for row in found if row.name == WISE)
    columns = ["method", "data", "hypervolume", "minus linear", "seeds", "E", "F", "O", "H", "worst set", "chosen"]
    lines = [columns, ["---"] * len(columns)]
    for names, row in _alike(found):
        lines.append(
            [", ".join(f"`{name}`" for name in names), "–" if row.data == NO_DATA else row.data, span(row.area, 3),
             "" if WISE in names else span(row.area - wise, 3, signed=True),
             f"{min(row.seeds):.3f}–{max(row.seeds):.3f}", *_gains(row.gains), f"{row.worst:+.1f}", row.way]
        )  # fmt: skip
    for name, gains, worst in ends(parts):
        label = "base" if name == BASE else f"full fine-tune on {name}"
        lines.append([label, "", "0", "", "", *_gains(gains), f"{worst:+.1f}", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _alike(found: Sequence[Row]) -> Iterator[tuple[list[str], Row]]:
    """Rows by area; with the names of all methods whose areas are the same in every draw."""
    groups: dict[bytes, list[Row]] = {}
    for row in sorted(found, key=lambda row: (-row.area[0], row.name)):
        groups.setdefault(np.round(row.area, 9).tobytes() + row.data.encode(), []).append(row)
    for some in groups.values():
        yield [row.name for row in some], next((row for row in some if row.name == WISE), some[0])


def absent(parts: Sequence[Part], methods: Sequence[str]) -> str:
    """Which methods could not be swept, and why; empty if there are none."""
    lines = []
    for name in methods:
        for document in (read(part, name) for part in parts):
            if document is not None and not document["points"]:
                lines.append(f"* `{name}` is missing: {(document['refused'] or ['no point'])[0]}")
                break
    return "\n".join(lines)


def verdict(found: Sequence[Row]) -> str:
    """Whether the rule without data that looked best on the selection split beats its rivals on the report split."""
    by_name = {row.name: row for row in found}
    free = [row for row in found if row.data == NO_DATA and row.name not in RIVALS]
    best = max(free, key=lambda row: row.selected)
    lines = []
    for rival in (by_name[name] for name in RIVALS if name in by_name):
        estimate, low, high = interval(best.area - rival.area)
        says = "beats" if low > 0 else "loses to" if high < 0 else "is not told apart from"
        lines.append(
            f"* `{best.name}`, the best without data on the selection split, {says} `{rival.name}`: "
            f"{best.area[0]:.3f} against {rival.area[0]:.3f}, difference {estimate:+.3f} ({low:+.3f} to {high:+.3f})."
        )
    return "\n".join(lines)


def to_csv(found: Mapping[str, Sequence[Row]]) -> str:
    """Every number of the tables, one row for each part and method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["part", "method", "data", "hypervolume", "low", "high", "minus_linear", "minus_low", "minus_high"]
        + [f"{key}{end}" for key in MEASURES for end in ("", "_low", "_high")]
        + ["worst_set", "chosen"]
    )
    for part, some in found.items():
        wise = next(row.area for row in some if row.name == WISE)
        for row in sorted(some, key=lambda row: row.name):
            numbers = [*interval(row.area), *interval(row.area - wise)]
            numbers += [number for key in MEASURES for number in interval(row.gains[key])]
            writer.writerow(
                [part, row.name, row.data, *(f"{number:.4f}" for number in numbers), f"{row.worst:.3f}", row.way]
            )
    return text.getvalue()


def picture(found: Mapping[str, Sequence[Row]], kind: str) -> bytes:
    """Upstream kept over downstream gained, one panel a part: linear, rivals, the best two with and without data."""
    with drawn():
        figure = new_figure(760, 620)
        for axes, (title, some) in zip(figure.subplots(2, 2).flat, found.items(), strict=False):
            ordered = sorted(some, key=lambda row: -row.area[0])
            others = [row for row in ordered if row.name not in RIVALS]
            free = [row.name for row in others if row.data == NO_DATA]
            best = [row.name for row in others if row.data != NO_DATA][:2] + free[:2]
            looks = styles([WISE, "ties", "dare_ties", *best], WISE)
            for row in ordered:
                if (look := looks.get(row.name)) is not None:
                    axes.step(
                        GRID, row.reach, where="pre", color=look.colour, linewidth=1.2,
                        label=f"{row.name}{'' if row.data == NO_DATA else ' (data)'} {row.area[0]:.3f}",
                    )  # fmt: skip
            axes.plot([0, 1], [1, 0], color=GREY, linestyle=":", linewidth=0.8)
            axes.set_xlim(-0.03, 1.05)
            axes.set_ylim(-0.03, 1.05)
            axes.set_title(title)
            axes.set_xlabel("downstream: 0 base, 1 own expert")
            axes.set_ylabel("upstream: 1 base, 0 experts")
            axes.legend(fontsize=7)
        figure.tight_layout()
        return to_file(figure, kind)


def _turned(points: Sequence[tuple[str, float]]) -> str:
    """Ways and the values chosen, from the least to the most of the seeds."""
    found: dict[str, list[float]] = {}
    for way, value in points:
        found.setdefault(way, []).append(value)
    spans = {way: dict.fromkeys((f"{min(values):.3g}", f"{max(values):.3g}")) for way, values in found.items()}
    return ", ".join(f"{way} {' to '.join(span)}" for way, span in spans.items())


def _gains(gains: Mapping[str, Array]) -> list[str]:
    return [span(gains[key], 1, signed=key != "H") for key in MEASURES]


def span(values: Array, digits: int, *, signed: bool = False) -> str:
    """An estimate and its interval."""
    estimate, low, high = interval(values)
    sign = "+" if signed else ""
    return f"{estimate:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"
