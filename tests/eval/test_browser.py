"""The report in a real browser: no errors, nothing from outside, accessible by day and by night, search that finds."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktmerge.eval.page import render
from ktmerge.eval.results import Generation, Results
from ktmerge.eval.scores import TaskInfo, TaskScore

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
    "--virtual-time-budget=20000",
]  # fmt: skip


@pytest.fixture
def page(make_results: Callable[..., Results]) -> str:
    names = ("base", "tuned", "half")
    made = make_results({name: {"up_a": [1, i > 0, 0, 1], "down_b": [0, i, i, 0]} for i, name in enumerate(names)})
    prompts, references = ["capital of Peru", "capital of Mali"], ["Lima", "Bamako"]
    made.tasks.append(TaskInfo("say", "downstream", "generate", "exact_match", "g", "h", [0, 1], prompts, references))
    for name, answers in zip(names, (["Lima", "x"], ["x", "Bamako"], ["Lima", "Bamako"]), strict=True):
        right = [float(one == other) for one, other in zip(answers, references, strict=True)]
        made.scores[name]["say"] = TaskScore(np.array(right), {"outputs": answers})
    shown = Generation("Say hello", {name: f"hello from {name}" for name in names})
    return render(made, recipes={"r": "ktmerge: 1\n"}, generations=[shown], commands=["ktmerge demo"],
                  training={"tuned": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]})  # fmt: skip


def opened(page: str, script: str, folder: Path, *flags: str) -> tuple[Any, str]:
    """What a script run inside the page finds, as JSON, and what the browser complained of."""
    report = (
        "const report = (value) => { const node = document.createElement('script'); node.type = 'application/json';"
        "node.id = 'found'; node.textContent = JSON.stringify(value); document.body.append(node); };"
    )
    path = folder / "page.html"
    path.write_text(page.replace("</body>", f"<script>{report}{script}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<script type="application/json" id="found">(.*?)</script>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    complaints = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(found[1])), complaints


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_without_errors_or_requests(page: str, tmp_path: Path, scheme: str) -> None:
    import axe_core_python

    axe = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    script = (
        f"</script><script>{axe}</script><script>"
        "axe.run(document).then((found) => report({"
        "violations: found.violations.map((one) => [one.id, one.nodes.map((node) => node.html.slice(0, 200))]),"
        "passes: found.passes.length, requests: performance.getEntriesByType('resource').map((one) => one.name),"
        "dark: matchMedia('(prefers-color-scheme: dark)').matches}));"
    )
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    found, complaints = opened(page, script, tmp_path, *flags)
    assert found["dark"] == (scheme == "dark")
    assert found["violations"] == []
    assert found["passes"] > 20
    assert found["requests"] == []
    assert complaints == ""


@needs_browser
def test_search_finds(page: str, tmp_path: Path) -> None:
    script = """
    const items = () => [...document.querySelectorAll('.item:not([hidden])')];
    const shown = () => items().map((node) => node.getAttribute('aria-label'));
    const field = document.querySelector('form.search input'), kind = document.querySelector('form.search select');
    const all = shown();
    field.value = 'PERU'; field.dispatchEvent(new Event('input'));
    const peru = shown();
    field.value = ''; kind.value = 'gained'; kind.dispatchEvent(new Event('change'));
    report({all, peru, gained: shown(), said: document.querySelector('form.search output').textContent,
            hidden: document.querySelector('form.search').hidden,
            wide: document.documentElement.scrollWidth <= innerWidth});
    """
    found, complaints = opened(page, script, tmp_path, "--window-size=380,800")
    assert found["peru"] == ["say, item 1"]
    assert set(found["gained"]) < set(found["all"])
    assert "say, item 1" not in found["gained"]
    assert found["said"] == f"{len(found['gained'])} of {len(found['all'])} items"
    assert not found["hidden"]
    assert found["wide"], "the page scrolls sideways on a telephone"
    assert complaints == ""


@needs_browser
def test_on_paper(make_results: Callable[..., Results], tmp_path: Path) -> None:
    """The rules for paper, seen on a screen as wide as a page of it."""
    sets = {f"up_with_quite_a_long_name_{i}": [1.0, 0.0, 1.0] for i in range(12)} | {"down": [0.0, 1.0, 0.0]}
    names = ("base", "tuned", "half", "quarter")
    made = make_results({name: {task: [*own[i % 3 :], *own[: i % 3]] for task, own in sets.items()}
                         for i, name in enumerate(names)})  # fmt: skip
    on_paper = render(made).replace("@media print", "@media all")
    assert "@media all" in on_paper
    found, _ = opened(
        on_paper,
        """
        const shown = (node) => node.getBoundingClientRect().height > 0;
        const height = (node) => node.getBoundingClientRect().height;
        report({
            controls: [...document.querySelectorAll("nav, form.search")].filter(shown).length,
            paired: shown(document.querySelector("details.paired table")),
            tallest: Math.max(...[...document.querySelectorAll("figure")].map(height)),
            over: [...document.querySelectorAll("table")].map((node) => node.scrollWidth - innerWidth),
            paper: getComputedStyle(document.body).backgroundColor, width: innerWidth});
        """,
        tmp_path,
        "--window-size=718,1000",
        "--blink-settings=preferredColorScheme=0",
    )
    assert found["width"] == 718
    assert (found["controls"], found["paired"], found["paper"]) == (0, True, "rgb(255, 255, 255)")
    assert found["tallest"] < 950, "a figure is taller than a page"
    assert max(found["over"]) <= 0, "a table is cut off"
