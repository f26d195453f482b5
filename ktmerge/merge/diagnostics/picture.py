"""The heat map of an inspection: layer by kind of tensor, one panel a tuned model, from the input down to the head."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktmerge.drawing import FILES, FONT, GREY, INK, drawn, new_figure, to_file
from ktmerge.errors import UsageError
from ktmerge.merge.diagnostics.kinds import KINDS
from ktmerge.merge.diagnostics.table import percent, shorten

if TYPE_CHECKING:
    from ktmerge.merge.diagnostics.inspection import Inspection

COLUMN, GAP, BAR = 17.0, 5.0, 13.0
"""Points: width of a column; height between blocks, and of the bar of a part without layers."""
SMALL = 7.0
LEFT, TOP, BOTTOM, BETWEEN = 76.0, 46.0, 58.0, 16.0
WIDEST = 820.0
DECADES = 4
"""What is this many powers of ten below the largest has the palest colour."""
NARROW = 20
"""Where the largest is less than so many times the smallest, powers of ten alone would leave one label or none."""
UNCHANGED = "#e4e4e4"
_JOINED = ("q", "k", "v")

Box = tuple[float, float, float, float]
"""Left, top, width, height."""


@dataclass(frozen=True)
class Block:
    """What lies together: one part without layers, or the layers of a stack.

    Attributes:
        layers: their names in the inspection.
        numbers: of the layers; empty for a part.
    """

    name: str
    layers: list[str]
    numbers: list[int]
    height: float


@dataclass(frozen=True)
class Grid:
    """The rows and columns that all panels share.

    Attributes:
        blocks: from the input down to the head.
        kinds: of tensors, by layer.
        columns: kinds that have a column of their own.
    """

    blocks: list[Block]
    kinds: dict[str, list[str]]
    columns: list[str]

    @classmethod
    def of(cls, found: Inspection) -> Grid:
        """The grid of an inspection."""
        blocks = list(_blocks(found.layers))
        kinds = {layer: found.kinds(layer) for block in blocks if block.numbers for layer in block.layers}
        return cls(blocks, kinds, _columns(list(kinds.values())))

    @property
    def width(self) -> float:
        return max(len(self.columns) * COLUMN, 90.0)

    @property
    def height(self) -> float:
        return sum(block.height for block in self.blocks) + GAP * (len(self.blocks) - 1)


def require_drawable(path: Path, models: Collection[str], *, headers_only: bool) -> None:
    """Refuse, before anything is read, what `heat_map` could not draw.

    Raises:
        UsageError: the suffix stands for no kind of picture, or there is nothing to draw.
    """
    if path.suffix[1:].lower() not in FILES:
        raise UsageError(
            f"{path}: can't draw '{path.suffix}' files; end it in {', '.join(f'.{one}' for one in FILES)}."
        )
    if not models or headers_only:
        what = "needs their weights; leave --headers away" if models else "needs a tuned model to hold against the base"
        raise UsageError(f"{path}: the heat map shows how far tuned models moved; it {what}.")


def heat_map(found: Inspection, path: Path) -> bytes:
    """Relative norms ||tau|| / ||theta_0|| on a logarithmic colour scale; grey is unchanged, white is not there.

    Args:
        found: with at least one tuned model measured.
        path: the file it is for; its suffix, one of `ktmerge.drawing.FILES`, decides the kind.
    """
    from matplotlib.cm import ScalarMappable

    grid = Grid.of(found)
    width, height = grid.width, grid.height
    across = min(len(found.models), max(1, int((WIDEST - LEFT) / (width + BETWEEN))))
    down = -(-len(found.models) // across)
    page = LEFT + across * (width + BETWEEN), BOTTOM + down * (height + TOP + BETWEEN) - BETWEEN
    with drawn():
        *scale, clipped = _scale(found)
        figure = new_figure(*page)
        for number, model in enumerate(found.models):
            row, column = divmod(number, across)
            left, bottom = LEFT + column * (width + BETWEEN), BOTTOM + (down - row - 1) * (height + TOP + BETWEEN)
            place = left / page[0], bottom / page[1], width / page[0], height / page[1]
            axes: Any = figure.add_axes(place)
            _panel(axes, found, model, grid, scale, labelled=column == 0)
        bar: Any = figure.add_axes((LEFT / page[0], 31 / page[1], min(width * across, 260) / page[0], 8 / page[1]))
        _legend(figure, bar, ScalarMappable(*scale), clipped=clipped)
        return to_file(figure, path.suffix[1:].lower())


def _blocks(layers: Sequence[str]) -> Iterator[Block]:
    for name, group in groupby(layers, lambda layer: layer.partition("[")[0]):
        members = list(group)
        numbers = [int(layer.partition("[")[2].rstrip("]")) for layer in members if "[" in layer]
        each = min(11.0, max(5.0, 400 / len(members)))
        yield Block(name, members, numbers, each * len(numbers) if numbers else BAR)


def _columns(layers: Sequence[Sequence[str]]) -> list[str]:
    """The kinds there are; none for joined queries, keys and values where other layers have columns for each."""
    kinds = [kind for kind in KINDS if any(kind in layer for layer in layers)]
    if set(_JOINED) <= set(kinds) and not any({"qkv", *_JOINED} <= set(layer) for layer in layers):
        kinds = [kind for kind in kinds if kind != "qkv"]
    return kinds or ["all"]


def _places(kinds: Sequence[str], columns: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Kind, first column and number of columns of each cell of a layer."""
    for kind in kinds:
        if kind in columns:
            yield kind, columns.index(kind), 1
        elif free := [columns.index(one) for one in _JOINED if one not in kinds]:
            yield kind, free[0], len(free)


def _scale(found: Inspection) -> tuple[Any, Any, bool]:
    """Norm and colours of all panels, so that a colour means the same in each; whether some cells are below."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    cells = [moved.relative for cells in found.movements.values() for moved in cells.values()]
    positive = [value for value in cells if 0 < value < math.inf] or [1.0]
    most, least = max(positive), min(positive)
    lowest = max(least, most / 10**DECADES)
    return LogNorm(min(lowest, most / 10), most, clip=True), colormaps["viridis_r"], least < lowest


def _panel(axes: Any, found: Inspection, model: str, grid: Grid, scale: Sequence[Any], *, labelled: bool) -> None:
    """One model; the axes count points from the upper left corner."""
    width, columns = grid.width, grid.columns
    axes.set_xlim(0, width)
    axes.set_ylim(grid.height, 0)
    axes.axis("off")
    step, top = width / len(columns), 0.0
    axes.text(0, -30, shorten(model, int(width / (0.68 * FONT))), fontsize=FONT, fontweight="bold", va="bottom")
    for i, column in enumerate(columns):
        axes.text((i + 0.5) * step, -3, column, fontsize=SMALL, rotation=90, ha="center", va="bottom")
    cells: list[tuple[Box, float]] = []
    for block in grid.blocks:
        if block.numbers:
            each = block.height / len(block.layers)
            for i, layer in enumerate(block.layers):
                for what, first, span in _places(grid.kinds[layer], columns):
                    if (moved := found.movement(model, layer, what)) is not None:
                        cells.append(((first * step, top + i * each, span * step, each), moved.relative))
        elif (moved := found.movement(model, block.name)) is not None:
            cells.append(((0, top, width, block.height), moved.relative))
            dark = sum(_colours([moved.relative], scale)[0][:3]) < 1.5
            axes.text(
                width / 2, top + block.height / 2, percent(moved.relative, 2) if moved.changed else "",
                fontsize=SMALL, ha="center", va="center_baseline", color="white" if dark else INK,
            )  # fmt: skip
        if labelled:
            _label(axes, block, top)
        top += block.height + GAP
    _draw(axes, cells, scale)


def _draw(axes: Any, cells: Sequence[tuple[Box, float]], scale: Sequence[Any]) -> None:
    from matplotlib.collections import PolyCollection

    corners = [
        [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
        for (left, top, width, height), _ in cells
    ]
    colours = _colours([relative for _, relative in cells], scale)
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.4), autolim=False)


def _colours(values: Sequence[float], scale: Sequence[Any]) -> list[tuple[float, ...]]:
    from matplotlib.colors import to_rgba

    norm, colours = scale
    found = colours(norm([min(value, norm.vmax) for value in values]))
    return [tuple(colour) if value else to_rgba(UNCHANGED) for value, colour in zip(values, found, strict=True)]


def _label(axes: Any, block: Block, top: float) -> None:
    """The name of a part, or of a stack with the numbers of its layers."""
    middle = top + block.height / 2
    if not block.numbers:
        axes.text(-5, middle, block.name, fontsize=SMALL, ha="right", va="center_baseline")
        return
    each = block.height / len(block.numbers)
    every = 1 if each >= 9 else (2 if each >= 7 else 5)
    for i, number in enumerate(block.numbers):
        if number % every == 0:
            axes.text(-5, top + (i + 0.5) * each, str(number), fontsize=SMALL, ha="right", va="center_baseline")
    rotation = 90 if block.height > 50 else 0
    axes.text(-26, middle, block.name, fontsize=SMALL, ha="right", va="center", rotation=rotation)


def _legend(figure: Any, bar: Any, colours: Any, *, clipped: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn_bar = figure.colorbar(colours, cax=bar, orientation="horizontal", extend="min" if clipped else "neither")
    drawn_bar.outline.set_visible(False)
    if colours.norm.vmax < NARROW * colours.norm.vmin:
        bar.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    bar.xaxis.set_minor_formatter(NullFormatter())
    bar.tick_params(labelsize=SMALL)
    bar.set_xlabel("norm of the change / norm of the base; grey: unchanged", fontsize=SMALL, color=INK, loc="left")
    bar.tick_params(which="both", color=GREY)
