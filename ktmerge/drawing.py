"""Figures: colours, fonts, and the same bytes for the same data, as SVG text or a file. Knows nothing of scores."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
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
FONT = 9.0
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
