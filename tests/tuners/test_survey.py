"""The arithmetic behind benchmarks/tuners.py: which rate is taken, on which seeds, and what the table says of it."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.load import validate

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import survey
import tuned
from parts import keep
from tuned import Place
from tunings import BUDGETS, FISHER, FULL, LAMBDAS, TOGETHER, TUNINGS, UPSTREAM, Budget, Tuning, tuning_of, tunings
from worlds.text import TEXT
from worlds.vision import VISION
from worlds.world import REPORT, SELECT

ITEMS = 30
RATES = BUDGETS["text"].rates
SETS = ("press", "learned", "fiction", "scripture")


@pytest.mark.parametrize("way", [one for one in TUNINGS if one.blend is None], ids=lambda one: one.name)
def test_every_way_is_a_fine_tune(way: Tuning, tmp_path: Path) -> None:
    settings = {**way.settings, "learning_rate": RATES[0]}
    for key, value in settings.items():
        assert value != UPSTREAM or key == "replay"
        assert value != FISHER or key == "fisher"
    tasks = tuned.place_of(way.places[-1], 0, tmp_path).experts
    validate(FinetuneJob, {"data": [f"{task}.jsonl" for task in tasks], **settings}, way.name)


def test_names_are_told_apart_as_files(tmp_path: Path) -> None:
    part = tuned.place_of("vision", 0, tmp_path)
    files = {part.file(tuned._name(way, value)) for way in TUNINGS for value in way.values("vision")}
    assert len(files) == sum(len(way.values("vision")) for way in TUNINGS)
    assert all(file.parent == tmp_path / "vision" / "0" / "tuning" / "tuners" for file in files)


def test_only_models_that_see_have_their_parts_trained() -> None:
    assert "connector" in {one.name for one in tunings("vision")}
    assert "connector" not in {one.name for one in tunings("text")}


def test_the_base_that_sees_is_asked_and_measured_on_two_upstream_sets(tmp_path: Path) -> None:
    part = tuned.place_of("vision", 0, tmp_path)
    assert part.sets == ("garments", "turns", "animals")
    assert tuned.place_of("text", 0, tmp_path).sets == SETS
    asked: list[str] = []
    world = replace(VISION, calibration=lambda name: (asked.append(name) or (name, at) for at in range(1000)))
    found = list(tuned._taught(world).calibration("upstream"))
    assert found == [(name, at) for name in ("garments", "turns") for at in range(64)]
    assert len(list(tuned._taught(world).calibration("animals"))) == 128


def test_all_tasks_at_once_share_the_base_of_their_world_and_nothing_else(tmp_path: Path) -> None:
    one, all_ = (tuned.place_of(name, 0, tmp_path) for name in ("text", TOGETHER))
    assert all_.models == one.models
    assert (all_.file("base"), all_.runs) != (one.file("base"), one.runs)
    assert all_.sets == (*SETS, "code", "reviews")
    assert [way.name for way in tunings(TOGETHER)] == [FULL, "easy to hard", "common first"]


@pytest.fixture
def parts(tmp_path: Path) -> list[Place]:
    """Two seeds of the text world with their base scored: upstream 60, task 20."""
    found = [tuned.place_of("text", seed, tmp_path) for seed in (0, 1)]
    for part in found:
        (part.models / "base").mkdir(parents=True)
        (part.models / "base" / "settings.json").write_text(json.dumps({"seed": part.seed}))
        _keep(part, "base", 60, 20, 60, 20)
    return found


def _keep(
    part: Place, name: str, select_up: float, select_down: float, up: float, down: float, **facts: object
) -> None:
    def scores(upstream: float, downstream: float) -> dict[str, list[float]]:
        wave = np.linspace(-5, 5, ITEMS)
        return {one: list((downstream if one == "scripture" else upstream) + wave) for one in SETS}

    point = {"value": facts.pop("value", 0.0), SELECT: scores(select_up, select_down), REPORT: scores(up, down)}
    keep(part, name, {"points": [point], **facts})


def _try(part: Place, way: Tuning, value: float, select: tuple[float, float], report: tuple[float, float]) -> None:
    facts = {"trained": 10, "of": 40, "seconds": 3.0, "job": tuned._job(part, way, value), "value": value}
    _keep(part, tuned._name(way, value), *select, *report, **facts)


def test_the_rate_is_that_of_the_best_h_on_the_selection_split_of_the_first_seed(parts: list[Place]) -> None:
    full = tuning_of(FULL)
    assert tuned.chosen(parts[0], full) is None
    # H 40, 53.3, 48: on the report split the last would win
    for rate, select, report in zip(RATES, ((60, 30), (50, 57), (40, 60)), ((60, 31), (50, 50), (70, 70)), strict=True):
        assert survey.Table.of(parts) is None
        _try(parts[0], full, rate, select, report)
    assert tuned.chosen(parts[0], full) == RATES[1]
    assert tuned.specialist(parts[0]) == RATES[2]

    row = survey.Table.of(parts).full  # type: ignore[union-attr]
    assert row.value == RATES[1]
    assert {key: float(values[0]) for key, values in row.gains.items()} == pytest.approx(
        {"E": 30, "F": -10, "O": 20, "H": 50}
    )
    assert {key: float(values[0]) for key, values in row.raw.items()} == pytest.approx({"U": 50, "D": 50, "Avg": 50})
    assert row.trained == 0.25


def test_a_table_of_what_is_there_says_what_is_missing(parts: list[Place]) -> None:
    for way in (tuning_of(FULL), tuning_of("last:1")):
        for rate in RATES:
            _try(parts[0], way, rate, (50, 50), (50, 50))
    table = survey.Table.of(parts)
    assert table is not None
    assert len(table.parts) == 1
    assert [row.tuning and row.tuning.name for row in table.rows] == [None, FULL, "last:1"]
    text = table.text()
    assert "1 seed of 2" in text
    assert "**Partial**" in text
    assert "top:1" in text.partition("Not there yet")[2]
    assert "Not told apart from it in H: last:1." in text


@pytest.mark.slow
def test_a_second_seed_counts_once_every_way_has_it(parts: list[Place]) -> None:
    for way in tunings("text"):
        for part in parts:
            for value in way.values("text"):
                _try(part, way, value, (50, 50), (50, 40 if part.seed else 60))
    table = survey.Table.of(parts)
    assert table is not None
    assert (len(table.parts), table.missing) == (2, [])
    assert table.full.gains["E"][0] == pytest.approx(30)
    assert table.full.harmonics == pytest.approx([2 * 50 * 60 / 110, 2 * 50 * 40 / 90])
    assert "Partial" not in table.text()
    header, *lines = csv.reader(survey.to_csv([table]).splitlines())
    assert {len(line) for line in lines} == {len(header)}
    told = dict(zip(header, lines[1], strict=True))
    assert (told["way"], float(told["E"]), float(told["H_minus_full"])) == (FULL, 30, 0)


def test_a_trial_with_other_settings_does_not_count(parts: list[Place]) -> None:
    full = tuning_of(FULL)
    _try(parts[0], full, RATES[0], (50, 50), (50, 50))
    assert tuned.trial(parts[0], full, RATES[0]) is not None
    other = Tuning(FULL, "part", {"train": "llm"})
    assert tuned.trial(parts[0], other, RATES[0]) is None


@pytest.mark.slow
def test_ways_are_trained_blended_and_kept(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["one two three four", "add the numbers", "first and second", "return what was found"]
    ids = [torch.tensor(AutoTokenizer.from_pretrained(tiny_llama)(text)["input_ids"]) for text in texts]

    def train(folder: Path, seed: int) -> None:
        if not (folder / "base").exists():
            shutil.copytree(tiny_llama, folder / "base")
            (folder / "base" / "settings.json").write_text(json.dumps({"seed": seed}))

    def score(model: object, split: str, names: Sequence[str]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            logits = [float(model(input_ids=one[None]).logits.mean()) for one in ids]  # type: ignore[operator]
        return {name: 50 + np.array(logits) for name in names}

    def rows(names: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
        return [{"prompt": "", "completion": f"{texts[number % 4]} {number}"} for number in range(count)]

    def calibration(name: str) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for one in ids:
            yield {"input_ids": one[None]}, torch.ones(len(one), dtype=torch.bool)

    world = replace(
        TEXT, train=train, score=score, rows=rows, calibration=calibration, dress=lambda folder: None,
        load=lambda folder: AutoModelForCausalLM.from_pretrained(folder).eval(),
    )  # fmt: skip
    monkeypatch.setitem(BUDGETS, "text", Budget(RATES, steps=2, batch=16, first=(5e-4, 2, 16)))
    part = Place(world, "tuners", 0, tmp_path)
    tuned.prepare(part)
    base = (part.models / "base" / "model.safetensors").read_bytes()
    ways = [tuning_of(name) for name in (FULL, "LoRA r=8", "random 0.1", "replay 1/4", "EWC 0.1", "full, then linear")]
    for way in ways:
        for value in way.values("text"):
            tuned.try_one(part, way, value)
    found = {way.name: tuned.trials(part, way, way.values("text")) for way in ways}
    assert all(len(some) == len(way.values("text")) for way, some in zip(ways, found.values(), strict=True))
    assert found[FULL][0]["trained"] == found[FULL][0]["of"]
    assert found["random 0.1"][0]["trained"] == pytest.approx(found[FULL][0]["of"] / 10, rel=0.01)

    def scores(name: str, number: int) -> np.ndarray:
        return np.asarray(found[name][number]["points"][0][REPORT]["scripture"])

    rate = list(RATES).index(tuned.specialist(part))  # type: ignore[arg-type]
    assert scores("full, then linear", LAMBDAS.index(1.0)) == pytest.approx(scores(FULL, rate), abs=2e-3)  # lambda 1
    assert not np.allclose(scores(FULL, 0), scores(FULL, 2), atol=1e-3)

    changed = {file: file.stat().st_mtime_ns for file in (part.models / "tuners").iterdir()}
    tuned.prepare(part)
    tuned.try_one(part, ways[0], RATES[0])
    assert {file: file.stat().st_mtime_ns for file in (part.models / "tuners").iterdir()} == changed
    assert (part.models / "base" / "model.safetensors").read_bytes() == base
