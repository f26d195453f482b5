"""The demo's order of steps, its packaged recipes, and that a second run keeps what the first one made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ktmerge.demo import demo
from ktmerge.demo.data import SETS
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.progress import SILENT, Step, Unit
from ktmerge.recipes.load import load_recipe, load_suite

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "then", "it", "sleeps"]


class Notes:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def task(self, description: str, total: float | None, unit: Unit = "items") -> Iterator[Step]:
        with SILENT.task(description, total, unit) as step:
            yield step


def test_the_packaged_recipes_are_ordinary_recipes(tmp_path: Path) -> None:
    demo._write_recipes(tmp_path)
    whole = load_recipe(tmp_path / "recipes" / "everything.yaml")
    assert whole.finetune is not None
    assert set(whole.finetune.experts) == {one.name for one in SETS if one.side == "downstream"}
    for job in whole.finetune.experts.values():
        assert job.data[0].startswith("../data/train/")
    for name, coefficients in demo.BLENDS.items():
        recipe = load_recipe(tmp_path / "recipes" / f"{name}.yaml")
        assert recipe.name == name
        assert recipe.blend is not None
        assert recipe.blend.lambda_ in coefficients
        assert set(recipe.experts) <= set(whole.experts)


def test_the_suites_score_every_set_on_its_own_split(tmp_path: Path) -> None:
    demo._write_recipes(tmp_path)
    for split in ("select", "report"):
        suite = load_suite(tmp_path / "suites" / f"{split}.yaml")
        assert {(task.name, suite.side(task.name)) for task in suite.tasks()} == {(one.name, one.side) for one in SETS}
        assert all(task.data == f"../data/{split}/{task.name}.jsonl" for task in suite.tasks())


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds something else"):
        demo.run_demo(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        demo.run_demo(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_little_space_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(KtmergeError, match=r"needs 6 GB .* 1\.0 GB are free"):
        demo.run_demo(tmp_path / "demo")


def small_data(out: Path) -> None:
    """The demo's sets in miniature."""

    def text(n: int) -> str:
        return " ".join(WORDS[(n * 7 + i) % len(WORDS)] for i in range(40))

    answers = {"verdicts": (" fresh", " rotten"), "languages": (" deu", " fra")}
    for split in ("train", "watch", "select", "report"):
        rows: dict[str, list[dict[str, object]]] = {
            "capitals": [
                {"country": f"L{n}", "options": ["a", "b", "c", "d"], "capital": "abcd"[n % 4]} for n in range(6)
            ],
            "products": [{"text": text(n), "opinion": ("positive", "negative")[n % 2]} for n in range(6)],
            "scripture": [{"text": text(n), "prompt": text(n)[:20], "completion": text(n)[20:]} for n in range(4)],
            "code": [{"text": text(n + 9)} for n in range(4)],
        }
        for name, pair in answers.items():
            rows[name] = [{"prompt": f"Text: {text(n)[:30]}\nAnswer:", "completion": pair[n % 2]} for n in range(32)]
        (out / split).mkdir(parents=True, exist_ok=True)
        for name, found in rows.items():
            if not (out / split / f"{name}.jsonl").exists():
                (out / split / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.mark.slow
def test_the_whole_demo_in_miniature_and_again(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "base_model", lambda cache, progress: tiny_llama)
    monkeypatch.setattr(demo, "write_data", lambda out, cache, progress: small_data(out))
    out = tmp_path / "demo"
    page = demo.run_demo(out, quick=True)
    assert page == out / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "dequantised from GGUF Q4_1" in text
    for one in SETS:
        assert one.package.licence.split(";")[0] in text
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert list(scores["models"]) == ["base", "verdicts", "languages", *demo.BLENDS]
    for name, coefficients in demo.BLENDS.items():
        written = load_recipe(out / "recipes" / f"{name}.yaml")
        assert written.blend is not None
        assert written.blend.lambda_ == coefficients[-1]
        assert (out / "blends" / name / "model.safetensors").is_file()

    made = [*out.rglob("*.safetensors"), out / "scores.json", out / "selection.json", out / "answers.json"]
    before = {path: path.stat().st_mtime_ns for path in made}
    notes = Notes()
    demo.run_demo(out, quick=True, progress=notes)
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert sum("kept" in note or "already" in note for note in notes.said) >= 6
