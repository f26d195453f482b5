"""What is said of a sweep's end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ktmerge.recipes.load import parse_recipe
from ktmerge.sweep.candidates import Candidate
from ktmerge.sweep.outcome import SHOWN, Outcome
from ktmerge.sweep.settings import SweepSettings
from ktmerge.sweep.worker import Worker


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
    outcome = Outcome(
        settings=cast(SweepSettings, SimpleNamespace(bootstrap=100)), sampler="grid", study="s", candidates=[],
        failed={}, finals=[], base={}, sides={"keep": "upstream", "learn": "downstream"}, chosen=None,
        nearest=cast(Candidate, None),
        held_out={name: {"keep": [1.0] * 8, "learn": [score] * 8} for name, score in learned.items()},
    )  # fmt: skip
    assert outcome.confirmed.gain_share is not None
    assert outcome.confirmed.gain_share.value == 50
