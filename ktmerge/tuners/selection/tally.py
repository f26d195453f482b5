"""How much was chosen where: counts by part, layer and kind of tensor, as a table and as a drawing.

Loads no torch; it asks masks for their sums only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktmerge.checkpoints.parts import Parts
from ktmerge.drawing import FONT, GREY, INK, drawn, new_figure, to_svg

_LAYER = re.compile(r"^(?P<tower>\w+)\.layers\[(?P<number>\d+)\]$")
_SMALL = 7.0
_CELL, _ROW, _LEFT, _TOP, _BOTTOM, _BETWEEN = 20.0, 15.0, 150.0, 26.0, 24.0, 20.0
"""Points."""
_FEWEST_COLUMNS = 8


@dataclass(frozen=True)
class Cell:
    """The tensors of one kind in one layer or part: elements that move at the end, that ever moved, that there are."""

    part: str
    kind: str
    selected: int
    touched: int
    total: int


def tally(masks: Mapping[str, Any], touched: Mapping[str, Any], parts: Parts) -> list[Cell]:
    """Count masks by part and kind, in the order of the masks.

    Args:
        masks: what moves at the end of the run, by tensor name.
        touched: what moved at any time, likewise.
        parts: of the model the names are of.
    """
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, mask in masks.items():
        part = parts.of(name)
        found = counts[part, _kind(name, part)]
        found[0] += int(mask.sum())
        found[1] += int(touched[name].sum())
        found[2] += int(mask.numel())
    return [Cell(part, kind, *found) for (part, kind), found in counts.items()]


def rows(cells: list[Cell]) -> list[dict[str, Any]]:
    """By part and layer, for the record: counts and share."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for cell in cells:
        for place, count in enumerate((cell.selected, cell.touched, cell.total)):
            found[cell.part][place] += count
    return [
        {"part": part, "selected": one, "touched": ever, "of": all_, "share": round(one / max(1, all_), 6)}
        for part, (one, ever, all_) in found.items()
    ]


def drawing(cells: list[Cell], title: str) -> str:
    """A heat map for every tower, layer by kind, and one column of the parts without layers; as SVG.

    A cell's colour is the share of its elements that were chosen at any time; white is not trained.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    panels = _panels(cells)
    heights = [_ROW * len(grid.kinds) for grid in panels]
    columns = max(_FEWEST_COLUMNS, *(len(grid.columns) for grid in panels))
    page = (_LEFT + _CELL * columns + 10, sum(heights) + len(panels) * (_TOP + _BETWEEN) + _BOTTOM)
    highest = max([cell.touched / max(1, cell.total) for cell in cells], default=1.0)
    scale, colours = Normalize(0.0, highest or 1.0), colormaps["viridis_r"]
    with drawn():
        figure = new_figure(*page)
        top = page[1]
        for grid, height in zip(panels, heights, strict=True):
            top -= _TOP + height
            width = _CELL * len(grid.columns)
            axes: Any = figure.add_axes((_LEFT / page[0], top / page[1], width / page[0], height / page[1]))
            _panel(axes, grid, scale, colours)
            top -= _BETWEEN
        caption = f"{title}: per cent of the elements chosen, up to {highest:.1%}"
        figure.text(8 / page[0], 10 / page[1], caption, fontsize=_SMALL, color=INK)
        return to_svg(figure, "selection", f"{title}: share of elements chosen, by layer and kind of tensor")


@dataclass(frozen=True)
class _Grid:
    name: str
    columns: list[str]
    kinds: list[str]
    shares: dict[tuple[str, str], float]


def _panels(cells: list[Cell]) -> list[_Grid]:
    grids: dict[str, _Grid] = {}
    for cell in cells:
        found = _LAYER.match(cell.part)
        name, column = (found["tower"], found["number"]) if found else ("other parts", "")
        kind = cell.kind if found else f"{cell.part}: {cell.kind}"
        grid = grids.setdefault(name, _Grid(name, [], [], {}))
        if column not in grid.columns:
            grid.columns.append(column)
        if kind not in grid.kinds:
            grid.kinds.append(kind)
        grid.shares[kind, column] = cell.touched / max(1, cell.total)
    return list(grids.values())


def _panel(axes: Any, grid: _Grid, scale: Any, colours: Any) -> None:
    axes.set_xlim(0, len(grid.columns))
    axes.set_ylim(len(grid.kinds), 0)
    axes.set_title(grid.name, fontsize=FONT, fontweight="bold", loc="left")
    for (kind, column), share in grid.shares.items():
        left, top = grid.columns.index(column), grid.kinds.index(kind)
        colour = colours(scale(share))
        axes.add_patch(_box(left, top, colour))
        dark = sum(colour[:3]) < 1.5
        shown = "0" if share == 0 else f"{100 * share:.0f}" if share >= 0.01 else "<1"
        axes.text(
            left + 0.5, top + 0.5, shown, fontsize=6, ha="center", va="center_baseline", color="white" if dark else INK
        )
    axes.set_xticks([i + 0.5 for i in range(len(grid.columns))], grid.columns, fontsize=_SMALL)
    axes.set_yticks([i + 0.5 for i in range(len(grid.kinds))], grid.kinds, fontsize=_SMALL)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color(GREY)


def _box(left: int, top: int, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, top), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.5)


def _kind(name: str, part: str) -> str:
    """What is left of a name below its layer, without 'weight'."""
    found = _LAYER.match(part)
    rest = name.partition(f".{found['number']}.")[2] if found else name.rpartition(".")[0].rpartition(".")[2] or name
    return rest.removesuffix(".weight") or rest
