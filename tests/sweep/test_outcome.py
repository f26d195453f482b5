"""What is said of a sweep's end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from ktmerge.recipes.load import parse_recipe
from ktmerge.sweep.candidates import Candidate, Final
from ktmerge.sweep.outcome import SHOWN, Outcome
from ktmerge.sweep.rounds import ItemScores, ScoredSet
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.worker import Worker


def outcome_of(held_out: dict[str, ItemScores], groups: Sequence[int], seed: int = 0) -> Outcome:
    """Of a sweep with these items, of ``keep`` upstream and ``learn`` downstream, that chose and that report."""
    sets = {"keep": ScoredSet("upstream", groups), "learn": ScoredSet("downstream", groups)}
    candidate = Candidate(3, {"blend.lambda": 0.5}, {}, 100.0, 1.0, None, [])
    settings = SimpleNamespace(bootstrap=100, bootstrap_seed=seed, limit=99.0, wanted_gain=90.0, seeds=1)
    return Outcome(
        settings=cast(SweepSettings, settings),
        sampler="grid", study="s", candidates=[candidate], failed={},
        finals=[Final(candidate, held_out[SHOWN], 100.0, 1.0, None)], base=held_out["base"], sets=sets,
        chosen=candidate, nearest=candidate, held_out=held_out, held_out_sets=sets,
    )  # fmt: skip


def test_an_expert_may_be_called_chosen(tmp_path: Path) -> None:
    experts = {"chosen": {"model": "c"}}
    recipe = parse_recipe(
        {"ktmerge": 1, "base": "b", "experts": experts, "blend": {"method": "linear"}}, "recipe", tmp_path
    )
    worker: Any = SimpleNamespace(
        _settings=SimpleNamespace(recipe=recipe), _recipe=lambda shown: recipe, _score_held_out=print,
        _tasks=SimpleNamespace(share=lambda tasks: {name: name for name in tasks}),
    )  # fmt: skip
    asked = Worker._report(worker, cast(Candidate, SimpleNamespace(number=3)))
    assert cast(Any, asked) == {"base": "report base", "chosen": "report expert chosen", SHOWN: "report 3"}
    learned = {"base": 0.0, "chosen": 1.0, SHOWN: 0.5}
    outcome = outcome_of({name: {"keep": [1.0] * 8, "learn": [one] * 8} for name, one in learned.items()}, range(8))
    assert outcome.confirmed.gain_share is not None
    assert outcome.confirmed.gain_share.value == 50


def test_intervals_are_over_whole_texts() -> None:
    luck = np.random.default_rng(0).random((2, 12))
    texts = {
        name: {task: (luck[i] < chance).astype(float) for i, task in enumerate(("keep", "learn"))}
        for name, chance in (("base", 0.3), ("spam", 0.9), (SHOWN, 0.7))
    }
    whole, cut = (
        outcome_of(
            {name: {task: np.repeat(own, times).tolist() for task, own in one.items()} for name, one in texts.items()},
            np.repeat(range(12), times).tolist(),
        )
        for times in (1, 5)
    )
    assert whole.confirmed == cut.confirmed
    assert whole.standings == cut.standings
    assert np.allclose(whole.uncertain()[1][0].error, cut.uncertain()[1][0].error)
    assert cut.statement()[0].endswith(
        "on 60 upstream and 60 downstream selection items, those of one text or image together."
    )
    assert "on 12 upstream and 12 downstream held-out items: upstream" in whole.statement()[1]
    assert whole.confirmed != outcome_of(whole.held_out, range(12), seed=1).confirmed
    assert whole.cautions() == []
    (caution,) = outcome_of(whole.held_out, [0] * 4 + [1] * 8).cautions()
    assert caution.startswith("Fewer than 10 items, texts or images (keep, learn)")
