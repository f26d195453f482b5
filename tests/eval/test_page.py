"""The report: complete, well-formed, escaped, and in need of nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge import api
from ktmerge.errors import KtmergeError
from ktmerge.eval import Generation, PathPoint, render
from ktmerge.eval.results import Results
from ktmerge.eval.scores import TaskInfo, TaskScore

Make = Callable[..., Results]
EVIL = "</pre><script>alert(1)</script><img src=http://x.example/y onerror=alert(2)>&amp;'\""
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting; collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def results(make_results: Make) -> Results:
    right = {"base": (8, 2), "tuned": (5, 9), "half": (7, 8)}
    made = make_results(
        {
            name: {"up_a": [1.0] * up + [0.0] * (10 - up), "down_b": [1.0] * down + [0.0] * (10 - down)}
            for name, (up, down) in right.items()
        },
        warnings=[EVIL],
    )
    made.tasks.append(
        TaskInfo(
            "say", "downstream", "generate", "exact_match", "g", "h", list(range(4)),
            [f"question {i} {EVIL}" for i in range(4)], ["yes", "no", "yes", EVIL],
        )
    )  # fmt: skip
    outputs = {
        "base": ["yes", "x", "same", "a"],
        "tuned": ["no", "no", "same", EVIL],
        "half": ["yes", "no", "same", "b"],
    }
    for name, answers in outputs.items():
        hits = [float(a == b) for a, b in zip(answers, made.tasks[-1].references, strict=True)]
        made.scores[name]["say"] = TaskScore(np.array(hits), {"outputs": answers})
    made.scores["base"]["up_a"].details.update(nll=[1.0] * 10, bytes=[2] * 10)
    return made


def everything(results: Results) -> dict[str, Any]:
    return {
        "title": f"Title {EVIL}",
        "recipes": {f"recipe {EVIL}": f"base: x\n# {EVIL}\n"},
        "generations": [Generation(f"prompt {EVIL}", {"base": EVIL, "tuned": "", "half": "ok"}, EVIL)],
        "paths": {"way": [PathPoint(0, 0, 0), PathPoint(0.5, 20, -5), PathPoint(1, 50, -30)]},
        "training": {"tuned": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]},
        "notes": [f"note {EVIL}"],
    }


@pytest.fixture(scope="module")
def written(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with everything in it, in a folder of its own."""
    page = tmp_path_factory.mktemp("page") / "report.html"
    page.write_text(render(results, **everything(results)))
    return page


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def test_everything_is_in_it(written: Path, html: str) -> None:
    page = Page(html)
    for words in (
        "The blend 'half' gains", "Gain against forgetting", "The numbers that decide", "Raw scores", "Side by side",
        "While tuning", "How it was measured", "O = E + F", "200 resamples", "fine-tune", "untuned",
        "ppl/B", "upstream", "downstream", "up_a", "say", "expected:", "2026-01-02", "ktmerge 0.1.0", "data-up_a",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") == 3
    assert list(written.parent.iterdir()) == [written]


def test_it_needs_nothing_from_outside_and_runs_only_its_search(html: str) -> None:
    page = Page(html)
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert page.tags.count("script") == 1
    assert not {"fetch", "XMLHttpRequest", "import", "eval", "innerHTML"} & set(re.findall(r"\w+", own_script(html)))
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "poster", "data"):
            assert value.startswith("#"), (tag, name, value)
        assert not name.startswith("on"), (tag, name)
        assert "url(" not in value or "url(#" in value
    styles = "".join(re.findall(r"<style.*?</style>", html, flags=re.DOTALL))
    assert "@import" not in styles
    assert "url(" not in re.sub(r"url\(#", "", styles)


def own_script(html: str) -> str:
    """The page's one script."""
    (found,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    return str(found)


def test_texts_are_escaped_everywhere(html: str) -> None:
    assert "alert" not in own_script(html)
    assert html.count("<script") == 1
    assert "onerror" not in {name for _, name, _ in Page(html).attributes}
    assert Page(html).text.count("<script>alert(1)</script>") >= 8


@pytest.mark.slow
def test_items_where_models_differ_are_shown_losses_first(results: Results) -> None:
    html = render(results)
    text = Page(html).text
    assert "question 2" not in text  # all say the same
    assert text.index("question 0") < text.index("question 1")  # the base was right on 0
    assert "tuned: wrong" in text
    assert "half: right" in text


@pytest.mark.slow
def test_it_is_the_same_text_every_time(results: Results, html: str) -> None:
    assert render(results, **everything(results)) == html


@pytest.mark.slow
def test_a_single_model_or_side_still_makes_a_page(make_results: Make) -> None:
    Page(render(make_results({"base": {"up_a": [1.0, 0.0]}})))
    one_side = Page(render(make_results({"base": {"up_a": [1.0, 0.0]}, "m": {"up_a": [0.0, 0.0]}})))
    assert "Gain against forgetting" not in one_side.text
    assert "O overall" not in one_side.text


@pytest.mark.slow
def test_it_is_written_whole_or_not_at_all(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "scores.json")
    with pytest.raises(KtmergeError):
        api.report(tmp_path / "scores.json", tmp_path / "nowhere/report.html")
    (tmp_path / "r.html").write_text("old")
    api.report(tmp_path / "scores.json", tmp_path / "r.html", overwrite=True)
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("undrawn")
def test_a_report_on_a_score_file_tells_of_tunings_and_of_adapters(
    make_results: Callable[..., Results], tmp_path: Path
) -> None:
    from dataclasses import replace

    results = make_results({name: {"up": [1.0, 0.0], "down": [0.0, 1.0]} for name in ("base", "tuned", "over")})
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    paths = {"base": "/models/base", "tuned": str(tmp_path / "tuned"), "over": "/models/other+/models/lora"}
    models = {name: replace(one, path=paths[name]) for name, one in results.models.items()}
    replace(results, models=models).save(tmp_path / "scores.json")
    page = api.report(tmp_path / "scores.json", tmp_path / "page.html").read_text()
    assert "While tuning" in page
    assert "The fine-tune &#39;tuned&#39;" in page
    assert "ktmerge eval tuned=tuned over=other+lora --base base" in page
