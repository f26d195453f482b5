"""The candidates of a sweep as a picture: what they keep against what they gain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ktmerge.drawing import GREY, INK, drawn, new_figure, styles, to_file
from ktmerge.sweep.outcome import Outcome
from ktmerge.sweep.pareto import front

WIDTH, HEIGHT = 460.0, 340.0
_PALE = 0.45


def pictures(outcome: Outcome) -> dict[str, bytes]:
    """The picture by kind of file."""
    with drawn():
        figure = _figure(outcome)
        return {kind: to_file(figure, kind) for kind in ("png", "svg")}


def _figure(outcome: Outcome) -> Any:
    looks = list(styles(["base", "finalist", "chosen"], "base").values())
    figure = new_figure(WIDTH, HEIGHT)
    axes: Any = figure.add_axes((0.11, 0.13, 0.86, 0.76))
    axes.grid(True)
    limit = outcome.settings.limit
    if outcome.settings.screen != "divergence" and outcome.sampler != "greedy":  # all soups are finalists
        _screened(axes, outcome)
    axes.plot(100, 0, marker="o", color=GREY, linestyle="", label="base")
    if math.isfinite(limit):
        axes.axvline(limit, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), label=f"limit: {limit:g} % of base")
    places = np.array([[one.retention, one.gain] for one in outcome.finals])
    on_front = sorted(front(places), key=lambda i: (places[i][0], -places[i][1]))
    axes.plot(places[on_front, 0], places[on_front, 1], color=looks[1].colour, linewidth=1.1, zorder=2)
    axes.plot(
        places[:, 0], places[:, 1], looks[1].marker, color=looks[1].colour, markersize=5.5, zorder=3,
        label="finalists, on all selection items",
    )  # fmt: skip
    _shown(axes, outcome, looks[2])
    axes.set_xlabel("upstream score kept, % of the base's")
    axes.set_ylabel("downstream gain, points")
    axes.legend(loc="best", fontsize=7.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.suptitle(outcome.rule(), fontsize=9, x=0.11, y=0.965, ha="left")
    return figure


def _screened(axes: Any, outcome: Outcome) -> None:
    """All candidates on the screening items; hollow: scored no further."""
    for stopped, face, label in ((False, GREY, "candidates, screened"), (True, "none", "stopped early")):
        points = [(one.first, one.second) for one in outcome.candidates if (one.stopped is not None) == stopped]
        if points:
            axes.plot(
                *zip(*points, strict=True), "o", markeredgecolor=GREY, markerfacecolor=face, markersize=4,
                alpha=_PALE, zorder=1, label=label,
            )  # fmt: skip
    if outcome.curves is not None:
        axes.plot(
            outcome.curves[:, 1], outcome.curves[:, 2], color=GREY, linewidth=1.0, linestyle=(0, (1, 1.5)), zorder=1,
            label="curve of the knob",
        )  # fmt: skip


def _shown(axes: Any, outcome: Outcome, look: Any) -> None:
    """The chosen candidate on the held-out items, with its intervals."""
    own = outcome.confirmed
    if own.retention is None or own.E is None:
        return
    axes.errorbar(
        own.retention.value, own.E.value,
        xerr=[[own.retention.value - own.retention.low], [own.retention.high - own.retention.value]],
        yerr=[[own.E.value - own.E.low], [own.E.high - own.E.value]],
        color=look.colour, marker=look.marker, markersize=6.5, linewidth=1.2, zorder=4,
        label=f"trial {outcome.shown.number} on held-out items, 95 %",
    )  # fmt: skip
