"""Figures: colours, fonts, and the same bytes for the same data, as SVG text or a file. Knows losses, but no scores."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Paul Tol's bright and vibrant schemes: told apart by the colour-blind, legible on white and on black.
_COLOURS = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#EE7733", "#009988", "#66AADD", "#BBAA33")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
INK = "#010203"  # stands for the text colour of the page, which may be dark on light or the reverse
GREY = "#888888"
FONT, SMALL = 9.0, 7.5
WIDTH = 420.0  # points: legible on a telephone, where a page is about as wide
FILES = ("png", "svg", "pdf")
"""Kinds of files a figure can be written as, by their suffix."""
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": FONT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.unicode_minus": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Style:
    """How one model looks in every picture and table."""

    colour: str
    marker: str


def styles(names: Iterable[str], base: str) -> dict[str, Style]:
    """A colour and a marker for each model; the base is grey. Colours come back after eight, with other markers."""
    others = [name for name in names if name != base]
    count = len(_COLOURS)
    found = {
        name: Style(_COLOURS[i % count], _MARKERS[(i + i // count) % len(_MARKERS)]) for i, name in enumerate(others)
    }
    return {base: Style(GREY, "o"), **found}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` x ``height`` points, apart from matplotlib's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


@contextmanager
def drawn() -> Iterator[None]:
    """Draw in here: in one style, whatever the user's own matplotlib settings are, and without remarks about fonts."""
    from matplotlib import rc_context, rcdefaults

    ours: dict[Any, Any] = _SETTINGS
    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    fonts.setLevel(logging.ERROR)
    try:
        with rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a glyph missing here may well be in the reader's fonts
            rcdefaults()
            with rc_context(ours):
                yield
    finally:
        fonts.setLevel(level)


def loss_figure(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """Losses while tuning, one panel a run; None if there is nothing to draw. Call it inside `drawn`.

    Args:
        training: per run its log: records with ``step`` and any of ``loss``, ``eval_..._loss``.
    """
    curves = {name: found for name, log in training.items() if (found := _curves(log))}
    if not curves:
        return None
    height = 165.0 * len(curves)
    figure = new_figure(WIDTH, height)
    for i, (name, lines) in enumerate(curves.items()):
        bottom = 1 - (i + 1) / len(curves) + 30 / height
        axes: Any = figure.add_axes((0.11, bottom, 0.86, 1 / len(curves) - 50 / height))
        looks = styles(["loss", *(key for key in lines if key != "loss")], "loss")
        for key, (steps, values) in lines.items():
            marker = "" if key == "loss" else looks[key].marker
            axes.plot(
                steps, values, label=_curve_name(key), color=looks[key].colour, marker=marker, markersize=4,
                linewidth=1.2,
            )  # fmt: skip
        axes.set_title(name, fontsize=FONT, loc="left", pad=3)
        axes.grid(axis="y")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["right", "top"]].set_visible(False)
        axes.legend(fontsize=SMALL, loc="best")
        if i == len(curves) - 1:
            axes.set_xlabel("step", labelpad=1)
    return figure


def _curves(log: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for record in log:
        step = record.get("step")
        for key, value in record.items():
            is_loss = key == "loss" or (key.startswith("eval_") and key.endswith("loss"))
            if is_loss and isinstance(step, int | float) and isinstance(value, int | float):
                steps, values = lines.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return lines


def _curve_name(key: str) -> str:
    middle = key.removeprefix("eval_").removesuffix("loss").strip("_")
    return "training" if key == "loss" else {"up": "upstream", "down": "downstream"}.get(middle, middle or "evaluation")


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one ``<svg>`` element that scales with its place and speaks to screen readers.

    Args:
        figure: a finished figure.
        name: prefix of every id in it, so that several figures can stand in one page.
        description: what the picture shows, in a sentence.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', lambda found: found[1] + name + "-", svg)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, 'Segoe UI', Roboto, Helvetica, sans-serif", svg)
    opening = f'<svg role="img" aria-labelledby="{name}-title" '
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', lambda found: opening + found[1], svg, count=1)
    svg = re.sub(r'height="[^"]*pt"', "", svg, count=1)
    return svg.replace(">", f'><title id="{name}-title">{escape(description)}</title>', 1).strip()


def to_file(figure: Figure, kind: str) -> bytes:
    """The figure as the content of a file, on white.

    Args:
        figure: a finished figure.
        kind: one of `FILES`.
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with rc_context({"svg.hashsalt": "ktmerge"}):
        figure.savefig(buffer, format=kind, dpi=160, facecolor="white", metadata=undated)
    return buffer.getvalue()
