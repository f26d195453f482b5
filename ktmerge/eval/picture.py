"""The pictures of a comparison as SVG: gain against forgetting, the score on every set, losses while tuning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from ktmerge.drawing import FONT, GREY, INK, SMALL, WIDTH, Style, drawn, loss_figure, new_figure, styles, to_svg
from ktmerge.eval.labels import Box, Label, along, place, square

if TYPE_CHECKING:
    from ktmerge.eval.results import PathPoint, Results
    from ktmerge.eval.scores import TaskInfo
    from ktmerge.eval.summary import Estimate


def tradeoff(
    results: Results,
    paths: Mapping[str, Sequence[PathPoint]] | None = None,
    tips: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
) -> str | None:
    """E against F: every model with its 95 % intervals, lines of equal O, and the ways of blend coefficients.

    Args:
        results: scores with upstream and downstream sets.
        paths: named polylines, e.g. ``{"wise-ft": results.path({0.0: "base", 0.5: "half", 1.0: "tuned"})}``.
        tips: what more to say of a model where the pointer rests on it, beside its numbers.
        links: where in the page a model's point leads.

    Returns:
        an ``<svg>`` element; None if the suite has only one side, or there is nothing but the base.
    """
    if len(results.models) < 2:
        return None
    points: list[tuple[str, Estimate, Estimate]] = []
    for name, one in results.summary.models.items():
        if one.E is None or one.F is None:
            return None
        points.append((name, one.F, one.E))
    looks = styles(results.models, results.base)
    with drawn():
        figure = new_figure(WIDTH, 350)
        axes: Any = figure.add_axes((0.11, 0.125, 0.79, 0.855))
        _limits(axes, points, paths or {})
        _equal_overall(axes)
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
        for number, way in enumerate((paths or {}).values()):
            line = ("solid", (0, (4, 2)), (0, (1, 1.5)))[number % 3]
            axes.plot([p.F for p in way], [p.E for p in way], color=GREY, linewidth=1.2, linestyle=line, zorder=2)
            axes.plot([p.F for p in way], [p.E for p in way], "o", color=GREY, markersize=2.5, zorder=2)
        for number, (name, F, E) in enumerate(points):
            _point(axes, F, E, looks[name], f"point-{number}")
        axes.set_xlabel("F: change on upstream sets, in points (left of 0: forgotten)")
        axes.set_ylabel("E: gain on downstream sets, in points")
        _label_all(axes, points, paths or {}, results.base)
        names = ", ".join(f"{name} E {E.value:+.1f} F {F.value:+.1f}" for name, F, E in points)
        svg = to_svg(figure, "tradeoff", f"Gain E against upstream change F: {names}")
    told = [
        "\n".join(filter(None, (f"{name}: E {E.value:+.1f}, F {F.value:+.1f}", (tips or {}).get(name))))
        for name, F, E in points
    ]
    return _pointed(svg, told, [(links or {}).get(name) for name, *_ in points])


def _pointed(svg: str, tips: Sequence[str], links: Sequence[str | None]) -> str:
    """Points that say more where the pointer rests on them, and lead to where their model is told of."""
    for number, (tip, link) in enumerate(zip(tips, links, strict=True)):
        mark = f'<g id="tradeoff-point-{number}">'
        title = f"<title>{escape(tip)}</title>"
        if link is None:
            svg = svg.replace(mark, f"{mark}{title}", 1)
            continue
        begin = svg.index(mark)
        end = _closing(svg, begin)
        label = escape(tip.replace("\n", "; "), {'"': "&quot;"})
        opened = f'<a href="#{link}" aria-label="{label}">'
        svg = f"{svg[:begin]}{opened}{mark}{title}{svg[begin + len(mark) : end]}</a>{svg[end:]}"
    # A picture that holds links is no single image to a screen reader.
    return svg.replace('role="img"', 'role="group"', 1) if any(links) else svg


def _closing(svg: str, begin: int) -> int:
    """Where the group that begins at ``begin`` has ended."""
    depth = 0
    for found in re.finditer(r"<g\b|</g>", svg[begin:]):
        depth += 1 if found[0] == "<g" else -1
        if depth == 0:
            return begin + found.end()
    raise ValueError("a group is left open")


def score_pictures(results: Results) -> list[str]:
    """Every model's score on every set, with standard errors; sets as rows, upstream above downstream.

    As many pictures as it takes for each to fit on a page of paper, all on one scale.
    """
    names, tasks = list(results.models), results.tasks
    columns = max(1, min(len(names), int(WIDTH / (max(_size(name, FONT)[0] for name in names) + 28))))
    headings = [text for task in tasks for text in (task.name, task.side)]
    left = min(0.4, (max(_size(text, FONT)[0] for text in headings) + 14) / WIDTH)
    legend = 15.0 * -(-len(names) // columns)
    fitting = max(1, int((TALLEST - _MARGINS - legend) / _block(names)))
    pictures = -(-len(tasks) // fitting)
    each = -(-len(tasks) // pictures)
    parts = [tasks[start : start + each] for start in range(0, len(tasks), each)]
    with drawn():
        return [_scores(results, part, number, columns, left, legend) for number, part in enumerate(parts)]


TALLEST = 660.0
"""Points: what fits on a page of paper below a heading."""
_STEP, _GAP, _MARGINS = 9.0, 13.0, 44.0


def _block(names: Sequence[str]) -> float:
    """Height of a set's row in points."""
    return _STEP * len(names) + _GAP


def _scores(results: Results, tasks: Sequence[TaskInfo], number: int, columns: int, left: float, legend: float) -> str:
    names, looks, block = list(results.models), styles(results.models, results.base), _block(list(results.models))
    height = _MARGINS + legend + block * len(tasks)
    figure = new_figure(WIDTH, height)
    axes: Any = figure.add_axes((left, 34 / height, 0.97 - left, 1 - (_MARGINS + legend) / height))
    handles: list[Any] = []
    for i, task in enumerate(tasks):
        top = -i * block
        if i % 2 == 0:
            axes.axhspan(top - block, top, color=GREY, alpha=0.09, linewidth=0)
        axes.text(
            -0.02, top - block / 2, f"{task.name}\n{task.side}", transform=axes.get_yaxis_transform(),
            ha="right", va="center",
        )  # fmt: skip
        base = results.scores[results.base][task.name].mean
        axes.plot([base, base], [top - block + 3, top - 3], color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
        for j, name in enumerate(names):
            mean, stderr = results.scores[name][task.name].mean, results.stderr(name, task)
            bar = axes.errorbar(
                mean, top - _GAP / 2 - (j + 0.5) * _STEP, xerr=stderr or 0.0, color=looks[name].colour,
                marker=looks[name].marker, markersize=5, linewidth=1.1,
            )  # fmt: skip
            handles += [bar[0]] if i == 0 else []
    axes.set_ylim(-block * len(tasks), 0)
    axes.set_xlim(_reach(results))
    axes.set_yticks([])
    axes.grid(axis="x")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_xlabel("score, 0-100; bars: one standard error; dashed: the base")
    labels = [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib hides those with _
    figure.legend(
        handles, labels, loc="upper center", ncols=columns, fontsize=FONT,
        handletextpad=0.2, columnspacing=1.2, borderaxespad=0,
    )  # fmt: skip
    said = f"Scores of {', '.join(names)} on {', '.join(task.name for task in tasks)}"
    return to_svg(figure, f"scores-{number}", said)


def _reach(results: Results) -> tuple[float, float]:
    """From the lowest to the highest score with its standard error, and a little beyond."""
    shown = [(model, task) for model in results.models for task in results.tasks]
    scores = [(results.scores[model][task.name].mean, results.stderr(model, task) or 0.0) for model, task in shown]
    ends = [mean + sign * stderr for mean, stderr in scores for sign in (-1, 1)]
    room = 0.045 * max(max(ends) - min(ends), 1.0)
    return min(ends) - room, max(ends) + room


def loss_picture(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """Losses while tuning, one panel a run.

    Args:
        training: per run its log: records with ``step`` and any of ``loss``, ``eval_..._loss``.

    Returns:
        an ``<svg>`` element; None if there is nothing to draw.
    """
    with drawn():
        figure = loss_figure(training)
        return None if figure is None else to_svg(figure, "losses", f"Losses while tuning {', '.join(training)}")


def _limits(
    axes: Any, points: Sequence[tuple[str, Estimate, Estimate]], paths: Mapping[str, Sequence[PathPoint]]
) -> None:
    """Show every point with its interval, every way and the origin, with room for labels."""
    way = [point for points_ in paths.values() for point in points_]
    for setter, low_high, on_way in (
        (axes.set_xlim, [v for _, F, _ in points for v in (F.low, F.high, F.value)], [p.F for p in way]),
        (axes.set_ylim, [v for _, _, E in points for v in (E.low, E.high, E.value)], [p.E for p in way]),
    ):
        values = [*low_high, *on_way, 0.0]
        span = max(max(values) - min(values), 1.0)
        setter(min(values) - 0.09 * span, max(values) + 0.09 * span)


def _equal_overall(axes: Any) -> None:
    """Faint diagonals E + F = O, named at the right edge."""
    from matplotlib.ticker import MaxNLocator

    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for overall in MaxNLocator(7).tick_values(bottom + left, top + right):
        axes.plot(
            [left, right], [overall - left, overall - right], color=GREY, alpha=0.45, linewidth=0.7,
            linestyle=(0, (1, 3)), zorder=0, scalex=False, scaley=False,
        )  # fmt: skip
        at_edge = overall - right
        if bottom <= at_edge <= top:
            axes.annotate(
                f"O {overall:+g}" if overall else "O 0", (right, at_edge), xytext=(3, 0), textcoords="offset points",
                fontsize=SMALL, va="center", annotation_clip=False, alpha=0.8,
            )  # fmt: skip


def _point(axes: Any, F: Estimate, E: Estimate, style: Style, name: str) -> None:
    drawn_point, *_ = axes.errorbar(
        F.value, E.value,
        xerr=[[max(0.0, F.value - F.low)], [max(0.0, F.high - F.value)]],
        yerr=[[max(0.0, E.value - E.low)], [max(0.0, E.high - E.value)]],
        color=style.colour, ecolor=style.colour, elinewidth=0.9, marker=style.marker, markersize=6.5, zorder=3,
    )  # fmt: skip
    drawn_point.set_gid(name)


def _label_all(
    axes: Any,
    points: Sequence[tuple[str, Estimate, Estimate]],
    paths: Mapping[str, Sequence[PathPoint]],
    base: str,
) -> None:
    """Name the models and the coefficients along the ways; thin lines lead to labels that had to go far."""
    pixel = axes.transData.transform
    spots = [pixel((F.value, E.value)) for _, F, E in points]
    obstacles = [square(x, y, 9) for x, y in spots]
    for _, F, E in points:
        obstacles += along([pixel((F.low, E.value)), pixel((F.high, E.value))], 2)
        obstacles += along([pixel((F.value, E.low)), pixel((F.value, E.high))], 2)
    texts = [
        (name, FONT, "bold" if name != base else "normal", *spot)
        for (name, *_), spot in zip(points, spots, strict=True)
    ]
    for name, way in paths.items():
        ends = [pixel((p.F, p.E)) for p in way]
        obstacles += along(ends, 3)
        near = [_near(x, y, spots) for x, y in ends]
        texts += [
            (text, SMALL, "normal", x, y)
            for (x, y), text in zip(ends, _coefficients(name, way, near), strict=True)
            if text
        ]
    labels = [Label(x, y, *_size(text, size, weight)) for text, size, weight, x, y in texts]
    (left, bottom), (right, top) = axes.get_window_extent().min, axes.get_window_extent().max
    for (text, size, weight, x, y), box in zip(
        texts, place(labels, obstacles, Box(left, bottom, right, top)), strict=True
    ):
        anchor = axes.transData.inverted().transform((box.left, box.bottom))
        axes.text(*anchor, text, fontsize=size, fontweight=weight, va="bottom", zorder=5)
        nearest = (min(max(x, box.left), box.right), min(max(y, box.bottom), box.top))
        if (nearest[0] - x) ** 2 + (nearest[1] - y) ** 2 > 13**2:
            end = axes.transData.inverted().transform(nearest)
            start = axes.transData.inverted().transform((x, y))
            axes.plot(*zip(start, end, strict=True), color=INK, alpha=0.5, linewidth=0.5, zorder=4)


def _near(x: float, y: float, spots: Sequence[Any]) -> bool:
    return any((x - a) ** 2 + (y - b) ** 2 < 5**2 for a, b in spots)


def _coefficients(name: str, way: Sequence[PathPoint], at_model: Sequence[bool]) -> list[str]:
    """What stands at each point of a way: its coefficient, but nothing at an end that has a model's own label.

    The way's name stands at the last point that has no such label.
    """
    ends = (0, len(way) - 1)
    found = ["" if at_model[i] and i in ends else f"{point.coefficient:g}" for i, point in enumerate(way)]
    free = [i for i in range(len(way)) if not at_model[i]]
    if free:
        found[free[-1]] = f"{name} {found[free[-1]]}"
    return found


def _size(text: str, size: float, weight: str = "normal") -> tuple[float, float]:
    """Width and height of a text in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(size=size, weight=weight)
    widest = TextPath((0, 0), text, prop=font).get_extents().width
    tallest = TextPath((0, 0), "Ag", prop=font).get_extents().height
    return float(widest) + 3, float(tallest) + 2
