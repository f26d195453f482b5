"""One way to tune, with one value, on one part of one world: trained by `ktmerge finetune`, scored, and kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from parts import BASE, Part, keep, plain, read, score_models, sides_of
from tunings import BUDGETS, FISHER, FULL, TOGETHER, UPSTREAM, Tuning, tuning_of
from worlds import WORLDS
from worlds.world import CALIBRATION, REPORT, SELECT, World

import ktmerge
from ktmerge.api.tuning import finetune
from ktmerge.recipes.load import parse_recipe
from ktmerge.tuners.selection.store import COUNTS

LENGTH = 80
"""Tokens of the longest sample, its end included."""
SETTINGS = "settings.json"
KIND = "tuners"
TAUGHT = {"vision": ("garments", "turns")}
"""Upstream sets of a world whose base knows the first alone, and so has no reason to read the question: it is taught
the others, too, before anything is tried."""


@dataclass(frozen=True)
class Place(Part):
    """Where the first task of a world is learned in many ways."""

    @property
    def name(self) -> str:
        """As `Tuning.places` has it."""
        return self.world.name

    @property
    def runs(self) -> Path:
        """Where tuned models lie."""
        return self.models / "runs"


class Together(Place):
    """Where all tasks of a world are learned at once."""

    @property
    def name(self) -> str:
        return TOGETHER

    @property
    def experts(self) -> tuple[str, ...]:
        return self.world.tasks

    @property
    def runs(self) -> Path:
        return self.models / f"{TOGETHER}-runs"

    def file(self, name: str) -> Path:
        return super().file(name).parent.with_name(TOGETHER) / super().file(name).name


def place_of(name: str, seed: int, folder: Path) -> Place:
    """The place of that name."""
    if name == TOGETHER:
        return Together(WORLDS["text"], KIND, seed, folder)
    return Place(TAUGHT_WORLDS[name], KIND, seed, folder)


def _taught(world: World) -> World:
    """A world with the upstream sets of `TAUGHT`."""
    upstream = TAUGHT.get(world.name)
    if upstream is None:
        return world

    def calibration(name: str) -> Iterator[tuple[Mapping[str, Any], Any]]:
        names = upstream if name == "upstream" else (name,)
        for one in names:
            yield from islice(world.calibration(one), CALIBRATION // len(names))

    return replace(world, upstream=upstream, calibration=calibration)


TAUGHT_WORLDS = {name: _taught(world) for name, world in WORLDS.items()}
"""The worlds, as ways to tune are tried in them."""


def prepare(part: Place) -> None:
    """Train the world's base, teach it what it lacks, write what `ktmerge finetune` reads, and score the base."""
    world = part.models.parent
    world.mkdir(parents=True, exist_ok=True)
    part.world.train(world, part.seed)
    budget = BUDGETS[part.world.name]
    rate, steps, batch = budget.first
    first = {"learning_rate": rate, **_common(part), "max_steps": steps, "batch_size": batch}
    settings = {"world": json.loads((world / BASE / SETTINGS).read_text()), **first}
    if part.world.name in TAUGHT:
        settings["upstream"] = list(part.world.upstream)
    mark = part.models / BASE / SETTINGS
    if not mark.is_file() or json.loads(mark.read_text()) != settings:
        shutil.rmtree(part.models, ignore_errors=True)
        bare = part.models / "bare"
        shutil.copytree(world / BASE, bare)
        part.world.dress(bare)
        finetune(bare, _upstream(part), part.models / BASE, overwrite=True, **first)
        mark.write_text(json.dumps(settings))
    score_models(part)


def _tasks(part: Place) -> list[Path]:
    """Files of what is learned, one for each task."""
    count = BUDGETS[part.world.name].samples // len(part.experts)
    return [_rows(part, name, (name,), count) for name in part.experts]


def _upstream(part: Place) -> Path:
    return _rows(part, "upstream", part.world.upstream, BUDGETS[part.world.name].upstream)


def _rows(part: Place, name: str, sets: Sequence[str], count: int) -> Path:
    """The file of so many samples of some sets, written unless it is there."""
    path = part.models / f"{name}-{count}.jsonl"
    if not path.is_file():
        rows = part.world.rows(sets, count, part.seed)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        os.replace(temporary, path)
    return path


def try_one(part: Place, tuning: Tuning, value: float) -> None:
    """Tune, or blend what was tuned, and score the result on both splits; what is kept stays.

    Args:
        part: whose task is learned.
        tuning: how.
        value: learning rate; of a blend, lambda.
    """
    if trial(part, tuning, value) is not None:
        return
    model, facts = _blended(part, tuning, value) if tuning.blend is not None else _trained(part, tuning, value)
    scores = {split: plain(part.world.score(model, split, part.sets)) for split in (SELECT, REPORT)}
    keep(
        part, _name(tuning, value), {"points": [{"value": value, **scores}], **facts, "job": _job(part, tuning, value)}
    )


def trial(part: Place, tuning: Tuning, value: float) -> dict[str, Any] | None:
    """What was kept of a way with a value: its one point, trained parameters and seconds; None if there is nothing."""
    document = read(part, _name(tuning, value))
    return document if document is not None and document["job"] == _job(part, tuning, value) else None


def trials(part: Place, tuning: Tuning, values: Sequence[float]) -> list[dict[str, Any]]:
    """What was kept with some values; empty unless all are there."""
    found = [one for value in values if (one := trial(part, tuning, value)) is not None]
    return found if len(found) == len(values) else []


def chosen(part: Place, tuning: Tuning, by: Sequence[str] = ("H", "E")) -> float | None:
    """The value with the best H on the selection split of this seed, of equals the most E; None if some were not tried.

    Args:
        part: the seed.
        tuning: the way.
        by: the gains to go by, the first that differs.
    """
    found = [one["points"][0] for one in trials(part, tuning, tuning.values(part.world.name))]
    if not found:
        return None
    sides = sides_of(part, SELECT)
    gains = [(sides.gains(point[SELECT]), float(point["value"])) for point in found]
    return max(gains, key=lambda one: [float(one[0][key][0]) for key in by])[1]


def specialist(part: Place) -> float | None:
    """The rate at which the full fine-tune gains most on its task: the one that is blended."""
    return chosen(part, tuning_of(FULL), by=("E", "H"))


def _trained(part: Place, tuning: Tuning, rate: float) -> tuple[Any, dict[str, Any]]:
    out = part.runs / _name(tuning, rate)
    out.parent.mkdir(exist_ok=True)
    report = finetune(part.models / BASE, _tasks(part), out, overwrite=True, **_with_files(part, tuning, rate))
    run = report.record["run"]
    model, trained = part.world.load(out), run["trained"]["parameters"]
    if (out / COUNTS).is_file():
        trained = json.loads((out / COUNTS).read_text())["selections"][-1]["selected"]
    if tuning.name != FULL:  # the full fine-tune is blended later
        shutil.rmtree(out)
    return model, {"trained": trained, "of": run["trained"]["of"], "seconds": run["seconds"]}


def _with_files(part: Place, tuning: Tuning, rate: float) -> dict[str, Any]:
    files = {UPSTREAM: str(_upstream(part)), FISHER: part.statistics(BASE)}
    settings = {key: files.get(value, value) if isinstance(value, str) else value
                for key, value in tuning.settings.items()}  # fmt: skip
    return {**settings, **_common(part), "learning_rate": rate}


def _common(part: Place) -> dict[str, Any]:
    budget = BUDGETS[part.world.name]
    return {
        "max_steps": budget.steps,
        "batch_size": budget.batch,
        "max_length": LENGTH,
        "show_samples": 0,
        "seed": part.seed,
    }


def _job(part: Place, tuning: Tuning, value: float) -> dict[str, Any]:
    """All that decides the result beside the world; what was kept of another job does not count."""
    if tuning.blend is None:
        return {**tuning.settings, **_common(part), "learning_rate": value, "samples": BUDGETS[part.world.name].samples}
    full = specialist(_first(part))
    return {**tuning.blend, "lambda": value, "full": full, "job": full and _job(part, tuning_of(FULL), full)}


def _blended(part: Place, tuning: Tuning, value: float) -> tuple[Any, dict[str, Any]]:
    rate = specialist(_first(part))
    expert = part.runs / _name(tuning_of(FULL), rate or 0.0)
    document = {
        "ktmerge": 1,
        "base": str(part.models / BASE),
        "experts": {part.experts[0]: {"model": str(expert)}},
        "blend": {**(tuning.blend or {}), "lambda": value},
        "seed": part.seed,
    }
    model = part.world.load(part.models / BASE)
    ktmerge.blend_into(model, parse_recipe(document, tuning.name, part.models), ktmerge.Pristine())
    full = trial(part, tuning_of(FULL), rate or 0.0) or {}
    return model, {key: full.get(key) for key in ("trained", "of", "seconds")}


def _first(part: Place) -> Place:
    """The seed on which values are chosen for all seeds."""
    return replace(part, seed=0)


def _name(tuning: Tuning, value: float) -> str:
    return f"{tuning.name} at {value:g}".replace(" ", "_").replace("/", "of")
