"""Candidates screened: what is known is not scored again, and what is no number is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from ktmerge.progress import SILENT
from ktmerge.recipes.schema import Recipe
from ktmerge.sweep.ledger import ERROR, VOID, Ledger
from ktmerge.sweep.rounds import ScoredSet
from ktmerge.sweep.sampling import distributions, quietly
from ktmerge.sweep.screening import Screening, candidates_of
from ktmerge.sweep.space import Range
from ktmerge.sweep.storage import open_storage
from ktmerge.sweep.worker import Worker

BASE = {"keep": [1.0, 1.0], "learn": [0.0, 0.0]}
SETS = {"keep": ScoredSet("upstream", range(2)), "learn": ScoredSet("downstream", range(2))}
SETTINGS: dict[str, Any] = {"screen": "full", "limit": 90.0, "keep": 0.9, "sampler": "nsga2", "seeds": 1}
quietly()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(open_storage(str(tmp_path / "journal.log")), "s", 60)
    made.study.sampler = RandomSampler(seed=1)  # six draws of one and the same are none of the cases
    return made


def screening(ledger: Ledger, live: object, **settings: object) -> Any:
    """Of a space with two candidates."""

    def recipe_at(point: Any) -> Recipe:
        blend = {"method": "linear", "lambda": point["blend.lambda"]}
        return Recipe.model_validate({"ktmerge": 1, "experts": {"e": {"model": "e"}}, "blend": blend})

    space = SimpleNamespace(
        used=dict, recipe_at=recipe_at, ranges=[Range("blend.lambda", choices=(0.5, 1.0))], methods=()
    )
    given: Any = SimpleNamespace(**{**SETTINGS, **settings})
    rounds: Any = [None, None]
    made = Screening(given, space, ledger, live, rounds, BASE, SETS, SILENT)  # type: ignore[arg-type]
    return made, distributions(space)  # type: ignore[arg-type]


def test_a_candidate_is_scored_once_however_often_it_is_drawn(ledger: Ledger) -> None:
    scored: list[float | None] = []

    def score_blend(recipe: Recipe, *_: object) -> dict[str, list[float]]:
        assert recipe.blend is not None
        scored.append(recipe.blend.lambda_)
        return {"keep": [1.0], "learn": [float(recipe.blend.lambda_ or 0)]}

    made, ranges = screening(ledger, SimpleNamespace(score_blend=score_blend))
    for _ in range(6):
        trial = ledger.begin(6, ranges)
        assert trial is not None
        made.screen(trial)
    assert ledger.begin(6, ranges) is None
    assert sorted(map(str, scored)) == ["0.5", "0.5", "1.0", "1.0"]  # two rounds of each
    found = candidates_of(ledger)
    assert len(found) == 6
    for one in found:
        assert (one.first, one.second) == (100, 100 * one.point["blend.lambda"])
        assert [scores["learn"] for scores in one.rounds] == [[one.point["blend.lambda"]]] * 2


def test_what_computes_no_numbers_is_a_failed_candidate(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    made, ranges = screening(ledger, None, screen="divergence")
    monkeypatch.setattr(Screening, "_distances", lambda *_: (0.1, float("nan")))
    trial = ledger.begin(1, ranges)
    assert trial is not None
    made.screen(trial)
    (found,) = ledger.trials()
    assert "not finite" in found.user_attrs[ERROR]
    assert ledger.begin(1, ranges) is None


def test_a_worker_that_was_taken_for_dead_goes_on(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    declared: list[int] = []

    def score_blend(*_: object) -> dict[str, list[float]]:
        if not declared:  # it was silent for too long
            (one,) = ledger.trials()
            declared.append(one.number)
            ledger._storage.set_trial_user_attr(one._trial_id, VOID, "its worker died")
            ledger._storage.set_trial_state_values(one._trial_id, TrialState.FAIL)
        return {"keep": [1.0], "learn": [1.0]}

    made, ranges = screening(ledger, SimpleNamespace(score_blend=score_blend))
    monkeypatch.setattr("ktmerge.sweep.worker.Screening", lambda *_: made)
    settings = SimpleNamespace(screen="full", share=1)
    worker: Any = SimpleNamespace(
        _settings=settings, _rounds=[], _space=None, _ledger=ledger, _live=None, _base=None, _sets=None,
        _progress=SILENT, _ranges=ranges,
    )  # fmt: skip
    Worker._screen(worker, 1)
    (found,) = ledger.trials()
    assert found.state == TrialState.COMPLETE
    assert found.user_attrs["taken up from"] == declared[0]
