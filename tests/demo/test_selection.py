"""Choosing a coefficient: what is scored in place equals what a written blend scores; nothing is scored twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktmerge.demo import selection
from ktmerge.demo.selection import Selection, at, rewrite, select
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.eval.results import PathPoint
from ktmerge.recipes.load import load_recipe, load_suite
from ktmerge.recipes.suites import Suite

PROSE = "The quick brown fox jumps over the lazy dog. "


def test_the_best_has_the_largest_sum_and_of_equals_the_smallest_coefficient() -> None:
    points = [PathPoint(0.0, 0, 0), PathPoint(0.8, 40, -10), PathPoint(0.4, 35, -5), PathPoint(0.6, 20, -1)]
    assert Selection(points).best == 0.4


def test_rewriting_changes_the_one_number() -> None:
    text = "# lambda: as chosen\nblend:\n  method: ties   # why\n  lambda: 0.6   # chosen\n  density: 0.5\n"
    assert rewrite(text, 0.8) == text.replace("0.6", "0.8")
    with pytest.raises(KtmergeError, match="0 lines"):
        rewrite("blend:\n  method: linear\n", 0.5)


@pytest.fixture(scope="module")
def expert(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny model that learned a sentence. Read-only."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer(PROSE * 2, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("learned") / "expert"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def workshop(tmp_path: Path, tiny_llama: Path, expert: Path) -> Path:
    """A recipe of the tiny model and the expert, and a suite."""
    (tmp_path / "recipe.yaml").write_text(
        f"ktmerge: 1\nname: back\nbase: {tiny_llama}\nexperts:\n  one: {{model: {expert}}}\n"
        "blend:\n  method: linear\n  lambda: 0.5\noutput: {dtype: float32}\n"
    )
    texts = [{"text": PROSE * 6} for _ in range(3)]
    asked = [{"n": n, "right": "yes" if n % 3 else "no"} for n in range(12)]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "suite.yaml").write_text(
        "upstream:\n  - {name: prose, kind: text, data: prose.jsonl, chunk_tokens: 32}\n"
        "downstream:\n  - {name: asked, kind: choice, data: asked.jsonl, prompt: 'Is {{ n }} good?',"
        " choices: ['yes', 'no'], answer: '{{ right }}'}\n"
    )
    return tmp_path


def path(workshop: Path, base: Path, suite: Suite | None = None) -> list[PathPoint]:
    recipe = load_recipe(workshop / "recipe.yaml")
    suite = suite or load_suite(workshop / "suite.yaml")
    found = select({"back": recipe}, {"back": (0.5, 1.0)}, suite, base, workshop / "selection.json")
    return found["back"].points


@pytest.mark.slow
def test_points_equal_the_scores_of_written_blends(workshop: Path, tiny_llama: Path) -> None:
    from ktmerge.eval import evaluate
    from ktmerge.merge import blend

    points = path(workshop, tiny_llama)
    recipe, suite = load_recipe(workshop / "recipe.yaml"), load_suite(workshop / "suite.yaml")
    models = {"base": tiny_llama}
    for point in points[1:]:
        name = f"at-{point.coefficient:g}"
        blend(at(recipe, point.coefficient), workshop / name)
        models[name] = workshop / name
    summary = evaluate(models, suite, bootstrap=100).summary.models
    assert points[0] == PathPoint(0.0, 0.0, 0.0)
    assert [point.coefficient for point in points] == [0.0, 0.5, 1.0]
    for point in points[1:]:
        written = summary[f"at-{point.coefficient:g}"]
        assert written.E is not None
        assert written.F is not None
        assert abs(point.E - written.E.value) < 1e-9
        assert abs(point.F - written.F.value) < 1e-9
    assert any(point.F for point in points[1:]), "the expert must differ, or nothing is tested"


@pytest.mark.slow
def test_nothing_is_scored_twice_unless_something_changed(
    workshop: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = path(workshop, tiny_llama)
    scored = selection._score_all
    calls: list[int] = []

    def counting(*arguments: object) -> dict[str, Selection]:
        calls.append(1)
        return scored(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(selection, "_score_all", counting)
    assert path(workshop, tiny_llama) == points
    assert calls == []
    (workshop / "selection.json").write_text('{"inputs": ')  # a run was killed, or someone wrote into it
    assert path(workshop, tiny_llama) == points
    assert calls == [1]
    lines = (workshop / "asked.jsonl").read_text().splitlines(keepends=True)
    (workshop / "asked.jsonl").write_text("".join(lines[:-1]))
    path(workshop, tiny_llama)
    assert calls == [1, 1]


def test_what_the_model_cannot_read_is_refused_before_anything_is_scored(workshop: Path, tiny_llama: Path) -> None:
    suite = (workshop / "suite.yaml").read_text().replace("chunk_tokens: 32", "chunk_tokens: 600")
    (workshop / "suite.yaml").write_text(suite)
    with pytest.raises(UsageError, match="chunk_tokens is 600, the model reads 512 tokens"):
        path(workshop, tiny_llama)
