from __future__ import annotations

import logging
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import pytest

from ktmerge.drawing import styles
from ktmerge.eval.picture import TALLEST, loss_picture, score_pictures, tradeoff
from ktmerge.eval.results import PathPoint, Results

Make = Callable[..., Results]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def results(make_results: Make) -> Results:
    share = {"base": (8, 2), "tuned": (5, 9), "half": (7, 8), "<&>": (7, 6)}
    return make_results(
        {
            name: {"up_a": [1.0] * up + [0.0] * (10 - up), "down_b": [1.0] * down + [0.0] * (10 - down)}
            for name, (up, down) in share.items()
        }
    )


@pytest.fixture(scope="module")
def pictures(results: Results) -> tuple[str, str]:
    """The trade-off and the scores, drawn once."""
    drawn = tradeoff(results)
    assert drawn is not None
    (scores,) = score_pictures(results)
    return drawn, scores


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_tradeoff_names_models_axes_and_coefficients(results: Results) -> None:
    way = {
        "wise": [PathPoint(0.0, 0.0, 0.0), PathPoint(0.25, 20.0, -5.0), PathPoint(0.5, 60.0, -10.0)],
        "ties": [PathPoint(0.0, 0.0, 0.0), PathPoint(0.75, 60.0, -10.0), PathPoint(1.0, 70.0, -30.0)],
        "sum": [PathPoint(0.0, 0.0, 0.0), PathPoint(1.5, 40.0, -20.0)],
    }
    svg = tradeoff(results, way)
    assert svg is not None
    found = texts(svg)
    assert {"base", "tuned", "half", "<&>"} <= set(found)
    assert any("forgotten" in text for text in found)
    assert any(text.startswith("O +") for text in found)
    # nothing at ends that lie on a model; the way's name at its last point that has no model's label
    coefficients = {text for text in found if re.fullmatch(r"((wise|ties|sum) )?(0|0\.25|0\.5|0\.75|1|1\.5)", text)}
    assert coefficients - {"0"} == {"wise 0.25", "0.75", "sum 1.5"}  # the tick 0 is on both axes
    title = ET.fromstring(svg).find(f"{SVG}title")
    assert title is not None
    assert "tuned E +70.0 F -30.0" in (title.text or "")


def test_one_side_has_no_tradeoff(make_results: Make) -> None:
    assert tradeoff(make_results({"base": {"up_a": [1.0]}, "m": {"up_a": [0.0]}})) is None


@pytest.mark.slow
def test_pictures_are_the_same_bytes_whatever_the_users_settings(results: Results, pictures: tuple[str, str]) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert (tradeoff(results), *score_pictures(results)) == pictures
        assert mpl.rcParams["font.size"] == 30
    assert "20" not in pictures[0].partition("<defs>")[0].partition("viewBox")[0]  # no date


def test_pictures_scale_and_take_the_pages_colour(pictures: tuple[str, str]) -> None:
    for svg in pictures:
        root = ET.fromstring(svg)
        assert root.get("viewBox")
        assert root.get("width") is None
        assert root.get("height") is None
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "<metadata" not in svg


def test_ids_of_two_pictures_do_not_clash(pictures: tuple[str, str]) -> None:
    def ids(svg: str) -> set[str]:
        return {node.get("id", "") for node in ET.fromstring(svg).iter() if node.get("id")}

    assert not ids(pictures[0]) & ids(pictures[1])


def test_references_inside_a_picture_resolve(pictures: tuple[str, str]) -> None:
    for svg in pictures:
        ids = set(re.findall(r'id="([^"]+)"', svg))
        used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert used
        assert used <= ids


@pytest.mark.slow
def test_odd_names_are_drawn_as_they_are_and_without_remarks(
    make_results: Make, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, said = logging.Handler(), list[logging.LogRecord]()
    monkeypatch.setattr(listener, "emit", said.append)
    monkeypatch.setattr(logging.root, "handlers", [listener])
    names = ["base", "cost $x$ and $y$", "_hidden", "世界 🦊", "a" * 60, "<&>"]
    results = make_results({name: {"up_a": [1.0, 0.0], "down_b": [0.0, 1.0]} for name in names})
    way, (scores,) = tradeoff(results), score_pictures(results)
    assert way is not None
    assert texts(loss_picture({"$a$": [{"step": 1, "loss": 1.0}]}) or "")
    assert set(names) <= {text.strip() for text in texts(scores)}
    assert set(names) <= set(texts(way))
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert not said


def test_the_base_alone_has_no_tradeoff(make_results: Make) -> None:
    assert tradeoff(make_results({"base": {"up": [1.0, 0.0], "down": [0.0, 1.0]}})) is None


@pytest.mark.slow
def test_many_sets_take_as_many_pictures_as_fit_on_pages(make_results: Make) -> None:
    sets = {f"up_{i}": [1.0, i / 30] for i in range(15)} | {f"down_{i}": [0.0, i / 30] for i in range(15)}
    pictures = score_pictures(make_results({f"model {i}" if i else "base": sets for i in range(3)}))
    assert len(pictures) > 1
    found = [texts(svg) for svg in pictures]
    shown = [line for one in found for text in one for line in text.split() if line in sets]
    assert sorted(shown) == sorted(sets)
    heights = [float(ET.fromstring(svg).get("viewBox", "").split()[3]) for svg in pictures]
    assert max(heights) <= TALLEST
    scales = {tuple(text for text in one if re.fullmatch(r"-?\d+", text)) for one in found}
    assert len(scales) == 1, "all on one scale"
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in pictures]
    assert not ids[0] & ids[1]


def test_losses(results: Results) -> None:
    log: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0, "grad_norm": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_upstream_loss": 1.5, "eval_downstream_loss": 1.2},
    ]
    svg = loss_picture({"spam": log, "nothing": [{"step": 1}]})
    assert svg is not None
    assert {"spam", "training", "upstream", "downstream"} <= set(texts(svg))
    assert "nothing" not in texts(svg)
    assert loss_picture({}) is None


def test_each_model_has_its_own_look() -> None:
    names = [f"m{i}" for i in range(24)]
    looks = styles(["base", *names], "base")
    assert len({(look.colour, look.marker) for look in looks.values()}) == 25
