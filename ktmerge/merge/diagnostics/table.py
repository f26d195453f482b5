"""An inspection as tables for people: at most 120 characters wide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ktmerge.merge.diagnostics.commonality import COHERENCE
from ktmerge.merge.diagnostics.measures import ALL, QUANTILES, Effective, Movement, Spread

if TYPE_CHECKING:
    from ktmerge.merge.diagnostics.inspection import Inspection

Table = tuple[list[str], list[list[str]], str]

_LABEL = 24
_NONE = "–"


def tables(found: Inspection, *, layers: bool) -> Iterator[Table]:
    """Columns, rows and title of each table."""
    yield _contents(found)
    if found.models:
        parts = found.layers if layers else list(found.contents)
        parts = [part for part in [*parts, ALL] if found.effective(part) is not None]
        yield _movements(found, parts)
        yield from _pairs(found, parts)
        if found.common:
            yield _common(found, parts)
    rows = [[name, what, line] for name, one in found.differences.items() for what, line in one.lines()]
    if not found.models:  # headers alone were read
        same = [name for name, one in found.differences.items() if not any(one.lines())]
        rows += [[name, "all", "nothing that headers and files show"] for name in same]
    if rows:
        yield ["model", "about", "differs from the base in"], _once(rows, 2), "beside the weights"


def _contents(found: Inspection) -> Table:
    rows = [
        [part, str(one.tensors), f"{one.parameters / 1e6:.2f}", f"{one.nbytes / 1e6:.1f}", ", ".join(one.dtypes)]
        for part, one in {**found.contents, ALL: found.total()}.items()
    ]
    return ["part", "tensors", "million", "MB", "types"], rows, "the base"


def _movements(found: Inspection, parts: list[str]) -> Table:
    """One row for each part and model, so that models stand below one another."""
    columns = ["part", "N_eff", "model", "moved by", "changed", "median", "90 %", "99 %", "largest"]
    rows = []
    for part in parts:
        for model, label in _labels(found).items():
            moved, spread = found.movement(model, part), found.spread(model, part)
            if moved is not None and spread is not None:
                rows.append([part, str(found.effective(part)), label, *_moved(moved, spread)])
    title = (
        "how far they moved: norm of the change / norm of the base; share of elements; ulps of the base's type\n"
        "N_eff: how many models changed a tensor at all"
    )
    return columns, _once(rows, 2), title


def _moved(moved: Movement, spread: Spread) -> list[str]:
    if not moved.changed:
        return [_NONE] * 6
    steps = [*(spread.quantile(share) for share in QUANTILES.values()), spread.largest]
    return [percent(moved.relative, 2), percent(moved.share, 1), *map(_count, steps)]


def _pairs(found: Inspection, parts: list[str]) -> Iterator[Table]:
    """One row for each part and two models."""
    rows = []
    labels = _labels(found)
    for part in parts:
        for first, second in found.pairs:
            pair = found.pair(first, second, part)
            if pair is not None and pair.cosine is not None:
                conflict = _NONE if pair.conflict is None else percent(pair.conflict, 1)
                rows.append([part, f"{labels[first]}, {labels[second]}", f"{pair.cosine:.3f}", conflict])
    if rows:
        title = "every two: cosine of their changes; share of opposite signs where both changed (unrelated: 50 %)"
        yield ["part", "models", "cosine", "opposite"], _once(rows, 1), title


def _common(found: Inspection, parts: list[str]) -> Table:
    """One row for each part with a matrix that two models changed."""
    rows = []
    for part in parts:
        one = found.commonality(part)
        if one is not None:
            spectrum = [f"{one.quantile(share):.2f}" for share in COHERENCE.values()]
            rows.append([part, str(Effective.of(one.counts)), str(len(one.counts)), percent(one.share, 1), *spectrum])
    title = (
        "what they have in common, in matrices that two or more changed: share of the changes' energy that is common\n"
        "coherence of the directions it is in, from least to most coherent: 1 all alike, 1/N unrelated, 0 cancelling"
    )
    return ["part", "N_eff", "maps", "common", "10 %", "median", "90 %"], rows, title


def shorten(name: str, most: int) -> str:
    """A long name without its middle."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[half + 1 - most :]}"


def _labels(found: Inspection) -> dict[str, str]:
    """What models are called where there is little room; unshortened where that would make two the same."""
    short = {name: shorten(name, _LABEL) for name in found.models}
    return short if len(set(short.values())) == len(short) else {name: name for name in found.models}


def _once(rows: list[list[str]], columns: int) -> list[list[str]]:
    """Leave out the first cells of a row that repeat those above them."""
    above: list[str] = []
    found = []
    for row in rows:
        same = 0
        while same < columns and above and row[same] == above[same]:
            same += 1
        found.append([""] * same + row[same:])
        above = row
    return found


def percent(share: float, digits: int) -> str:
    """Never 0 % for what is not 0."""
    if not math.isfinite(share):
        return "∞"
    text = f"{share:.{digits}%}"
    least = 10.0 ** (-2 - digits)
    return f"<{least:.{digits}%}" if 0 < share < least else text


def _count(steps: float) -> str:
    """Three digits, thousands as k."""
    if steps >= 2.0**32:
        return "4G+"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if steps >= 0.9995 * unit:
            return f"{steps / unit:.3g}{name}"
    return f"{steps:.3g}"
