"""What README and docs tell people to type is what ktmerge understands."""

from __future__ import annotations

import ast
import csv
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import ktmerge
from ktmerge.commands import command_line
from ktmerge.eval.summary import ModelSummary, summarise

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """The lines of a page's code, fenced or indented, that call ``ktmerge``."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.split("\n") if re.match(r"(    )?ktmerge [a-z-]+", line)]


@cache
def whole() -> Any:
    """Every command, built once: reading a line changes none."""
    return command_line()


def parse(line: str) -> None:
    """Read a command line as ``ktmerge`` does, and do nothing; click's own error if it does not understand."""
    group: Any = whole()
    words = shlex.split(line.partition(" >")[0], comments=True)[1:]
    context = group.make_context("ktmerge", [], resilient_parsing=True)
    while hasattr(group, "resolve_command"):
        name, group, words = group.resolve_command(context, words)
        context = group.make_context(name, list(words), parent=context, resilient_parsing=hasattr(group, "commands"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        parse(line)


def test_the_readme_has_commands() -> None:
    assert len(commands(PAGES[0].read_text(encoding="utf-8"))) > 8


def test_examples_in_help_are_understood() -> None:
    def epilogs(group: Any) -> list[str]:
        below = [line for one in getattr(group, "commands", {}).values() for line in epilogs(one)]
        return [*below, *([group.epilog] if group.epilog else [])]

    examples = [text.partition(": ")[2] for text in epilogs(whole())]
    assert len(examples) > 30
    for line in examples:
        parse(line)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_tables_have_the_numbers_that_were_measured() -> None:
    """Of methods as in results.csv, of speed as in benchmarks.md; who measures again has both to write."""
    rows = [re.findall(r"[^|]+", line) for line in PAGES[0].read_text(encoding="utf-8").splitlines()]
    with (ROOT / "docs/results.csv").open(encoding="utf-8") as file:
        measured = {
            (row["part"].replace("one", "1"), row["method"]): row["hypervolume"] for row in csv.DictReader(file)
        }
    (head,) = [[cell.strip() for cell in row] for row in rows if row[:2] == [" method ", " needs "]]
    methods = [(method, row[2:]) for row in rows if len(row) == 6 for method in re.findall("`(.*?)`", row[0])]
    assert len(methods) == 7
    for method, cells in methods:
        for part, cell in zip(head[2:], cells, strict=True):
            assert f"{float(measured[part, method]):.3f}" == cell.strip(), f"{method}, {part}"
    benchmarks = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    table = benchmarks[: benchmarks.index("The floor took")].splitlines()
    speeds = [row for row in rows if row and row[-1].endswith(" x ")]
    assert len(speeds) == 3
    for name, *cells in [row[1:] for row in speeds]:
        (line,) = [line for line in table if line.startswith(f"|{name.rstrip()}") and "one threshold" not in line]
        assert all(number in line for cell in cells for number in re.findall(r"[0-9.]+", cell)), name


def test_the_readmes_python_names_what_is_there() -> None:
    block = re.search(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.S)
    assert block is not None
    tree = ast.parse(block[1])
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)} - {"print"}
    assert called == {"ktmerge.finetune", "ktmerge.load_recipe", "ktmerge.blend", "ktmerge.evaluate"}
    assert all(callable(getattr(ktmerge, name.partition(".")[2])) for name in called)

    class Results:
        summary = summarise(
            {name: {"a": [1.0, 0.0], "b": [0.0, 1.0]} for name in ("base", "blended")},
            {"a": "upstream", "b": "downstream"}, totals={}, base="base", reference=None, bootstrap=10, seed=0,
        )  # fmt: skip

    printed = ast.unparse(next(node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "O"))
    assert isinstance(Results.summary.models["blended"], ModelSummary)
    assert eval(printed, {"results": Results}).value == 0  # noqa: S307 - our own README
