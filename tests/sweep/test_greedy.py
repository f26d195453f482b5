"""Greedy soups: which experts are kept, by made-up scores and by a tiny model's; killed, resumed, rebuilt."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from ktmerge.errors import UsageError
from ktmerge.recipes.load import load_recipe
from ktmerge.sweep.greedy import Members, Merit, merit, walk
from ktmerge.sweep.soups import Soups
from ktmerge.sweep.space import told

EXPERTS = ["a", "b", "c", "d", "e"]


def better_or_equal(one: tuple[float, float], other: tuple[float, float], limit: float | None) -> bool:
    """Of two (kept, O): both keep enough, and the first has no less O; or it breaks the limit less."""
    if limit is None or min(one[0], other[0]) >= limit:
        return one[1] >= other[1]
    short = max(0.0, limit - one[0]), max(0.0, limit - other[0])
    return short[0] < short[1] or (short[0] == short[1] and one[1] >= other[1])


class Drawn:
    """Made-up scores of soups, (kept, O), drawn when first asked for; None: it failed."""

    def __init__(self, seed: int) -> None:
        self._luck = np.random.default_rng(seed)
        self.table: dict[Members, tuple[float, float] | None] = {}

    def __call__(self, members: Members) -> tuple[float, float] | None:
        if members not in self.table:
            drawn = float(self._luck.integers(90, 101)), float(self._luck.integers(0, 6)) + 2 * len(members)
            self.table[members] = None if self._luck.random() < 0.1 else drawn
        return self.table[members]


@pytest.mark.parametrize("limit", [None, 95.0])
def test_a_soup_is_that_of_the_paper_on_made_up_scores(limit: float | None) -> None:
    sizes = set()
    for seed in range(300):
        score = Drawn(seed)
        tried: dict[Members, Merit | None] = {}
        while wanted := walk(EXPERTS, tried).wanted:
            for members in wanted:
                assert members not in tried
                found = score(members)
                tried[members] = None if found is None else merit(*found, -np.inf if limit is None else limit)
        done = walk(EXPERTS, tried)

        left = [name for name in EXPERTS if score(frozenset([name])) is not None]
        order: list[str] = []
        while left:
            first = left[0]
            for name in left[1:]:
                if not better_or_equal(score(frozenset([first])), score(frozenset([name])), limit):  # type: ignore[arg-type]
                    first = name
            order.append(first)
            left.remove(first)
        soup: list[str] = []
        for name in order:
            new = score(frozenset([*soup, name]))
            if not soup or (new is not None and better_or_equal(new, score(frozenset(soup)), limit)):  # type: ignore[arg-type]
                soup.append(name)
        assert done.ranked == tuple(order)
        assert done.soup == frozenset(soup)
        assert [step.expert for step in done.steps if step.kept] == soup
        assert set(tried) == set(score.table)
        assert len(tried) <= 2 * len(EXPERTS) - 1
        sizes.add(len(soup))
    assert sizes >= {1, 2, 3, 4}


def test_rounding_decides_nothing() -> None:
    assert merit(99.0 + 1e-13, 3.0, 99.0) == merit(100.0, 3.0 - 1e-13, 99.0)
    assert merit(98.0, 9.0, 99.0) < merit(99.0, 1.0, 99.0)


def test_a_point_says_who_is_in(soup_recipe: Path) -> None:
    recipe = load_recipe(soup_recipe)
    soups = Soups(recipe, ["linear"])
    point = soups.point_of(frozenset(["right", "other"]))
    made = soups.recipe_at(point)
    assert list(made.experts) == ["other", "right"]
    assert made.blend is not None
    assert made.blend.method == "linear"
    assert told(point) == "other + right"
    alone = recipe.model_copy(update={"experts": {"left": recipe.experts["left"]}})
    with pytest.raises(UsageError, match="has one expert"):
        Soups(alone)
    with pytest.raises(UsageError, match="of one method"):
        Soups(recipe, ["linear", "soup"])
    with pytest.raises(UsageError, match="takes 1 expert, not 3"):
        Soups(recipe, ["trim"])


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"ranges": ["blend.lambda=0:1"]}, "turns no numbers"),
        ({"trials": 9}, "--trials"),
        ({"screen": "full"}, "--screen"),
    ],
)
def test_what_a_greedy_soup_has_no_use_for_is_refused(soup_recipe: Path, tmp_path: Path, more, complaint) -> None:  # type: ignore[no-untyped-def]
    from ktmerge import api

    with pytest.raises(UsageError, match=complaint):
        api.sweep(soup_recipe, tmp_path / "o", sampler="greedy", **more)
    assert not (tmp_path / "o").exists()


class Stopping:
    """Says nothing, and is interrupted as soon as something is said that begins so."""

    def __init__(self, at: str) -> None:
        self._at = at

    def task(self, *told: object):  # type: ignore[no-untyped-def]
        from ktmerge.progress import SILENT

        return SILENT.task("", None)

    def note(self, text: str) -> None:
        if text.startswith(self._at):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_soup_is_made_stopped_gone_on_with_and_rebuilt(soup_recipe: Path, tmp_path: Path) -> None:
    from ktmerge import api
    from ktmerge.checkpoints.checkpoint import Checkpoint

    out = tmp_path / "found"
    with pytest.raises(KeyboardInterrupt):
        api.sweep(soup_recipe, out, sampler="greedy", progress=Stopping("trial 3"))
    outcome = api.sweep(soup_recipe, out, sampler="greedy", resume=True)
    document = json.loads((out / "result.json").read_text())
    assert [one.number for one in outcome.candidates] == list(range(5))
    assert [(step["soup"], step["kept"]) for step in document["steps"][1:]] == [
        (document["ranked"][:2], True), (document["ranked"], False),
    ]  # fmt: skip
    assert set(document["ranked"][:2]) == {"left", "right"}
    assert document["chosen"] == 3
    assert list(yaml.safe_load((out / "chosen.yaml").read_text())["experts"]) == ["left", "right"]
    assert "greedy soup by O = E + F" in document["statement"][0]
    assert "better in O" in document["cautions"][0]
    digests = {one["trial"]: one["digest"] for one in document["finalists"]}
    assert len(set(digests.values())) == 5
    api.blend(api.trial_recipe(out, 4), tmp_path / "trial-4")
    assert Checkpoint.open(tmp_path / "trial-4").content_digest() == digests[4]
    api.blend(out / "chosen.yaml", tmp_path / "chosen")
    assert Checkpoint.open(tmp_path / "chosen").content_digest() == digests[3]


@pytest.mark.slow
def test_a_killed_greedy_sweep_is_gone_on_with_by_two_workers(soup_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    command = [
        sys.executable, "-m", "ktmerge", "sweep", str(soup_recipe), "--sampler", "greedy", "--keep-upstream", "0.2",
        "--out", str(out), "--json",
    ]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = out / "journal.log"
    while running.poll() is None and not (journal.exists() and journal.read_text().count('"round 0"') >= 3):
        time.sleep(0.02)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    done = subprocess.run([*command, "--resume", "--workers", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sorted(tuple(sorted(step["soup"])) for step in found["steps"][1:]) == [
        ("left", "other", "right"),
        ("left", "right"),
    ]
    assert len({json.dumps(one["point"]) for one in found["candidates"]}) == len(found["candidates"]) == 5
    assert found["rule"].endswith("what keeps less than 20 % of base upstream comes last")
