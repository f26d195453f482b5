"""What is kept of one part of one world: scores of its models, and of methods, as JSON beside the models."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from paths import COARSE, FINE, knob_of, line
from tradeoff import Resamples, Sides
from worlds import WORLDS
from worlds.world import REPORT, SELECT, Scores, World, measure

from ktmerge.merge.registry import find_method, methods
from ktmerge.merge.settings import blend_setting
from ktmerge.recipes.schema import Blend

Point = dict[str, Any]
"""``way``, ``value``, ``blend``, and item scores of every set: ``select`` and, of points on the front, ``report``."""

BASE = "base"
WORDS = ("summary", "source", "formula", "cost", "description")
"""Keywords of a method or a parameter that do not change what it does."""


@dataclass(frozen=True)
class Part:
    """Which experts of a world are merged.

    Attributes:
        kind: single, multi, or tuners, where the one task is learned in many ways.
        experts: the tasks; also the downstream sets.
    """

    world: World
    kind: str
    seed: int
    folder: Path

    @property
    def experts(self) -> tuple[str, ...]:
        return self.world.tasks if self.kind == "multi" else self.world.tasks[:1]

    @property
    def sets(self) -> tuple[str, ...]:
        return (*self.world.upstream, *self.experts)

    @property
    def models(self) -> Path:
        """Where base and experts lie."""
        world = self.folder / self.world.name / str(self.seed)
        return world / "tuning" if self.kind == "tuners" else world

    @property
    def given(self) -> tuple[str, ...]:
        """The models that are there beforehand."""
        return (BASE,) if self.kind == "tuners" else (BASE, *self.experts)

    def file(self, name: str) -> Path:
        """Where the points of a method, or of a model, are kept."""
        return self.models / self.kind / f"{name.replace(':', '-')}.json"

    def statistics(self, name: str) -> str:
        """Where what was measured in a model lies."""
        return str(self.models / "statistics" / name)

    def digest(self) -> str:
        """Changes with the models and with what they are asked."""
        settings = [(self.models / name / "settings.json").read_text() for name in self.given]
        return hashlib.sha256(json.dumps([settings, self.world.items]).encode()).hexdigest()


def part_of(world: str, kind: str, seed: int, folder: Path) -> Part:
    """The part of that name."""
    return Part(WORLDS[world], kind, seed, folder)


def score_models(part: Part) -> None:
    """Measure base and experts on training data, and score them on both splits."""
    for name in part.given:
        measured_on = "upstream" if name == BASE else name
        measure(part.world, part.models / name, measured_on, Path(part.statistics(name)))
        if kept(part, name) is None:
            model = part.world.load(part.models / name)
            scores = {split: plain(part.world.score(model, split, part.sets)) for split in (SELECT, REPORT)}
            keep(part, name, {"points": [{"way": "", "value": 0.0, **scores}]})


def read(part: Part, name: str) -> dict[str, Any] | None:
    """What was kept of a method or model; item scores as arrays."""
    document = kept(part, name)
    for point in document["points"] if document else ():
        for split in {SELECT, REPORT} & point.keys():
            point[split] = {one: np.asarray(values) for one, values in point[split].items()}
    return document


def sides_of(part: Part, split: str, draws: int = 0) -> Sides:
    """The two sides of a part, normalised between its base and its experts if it has some."""
    models = {name: read(part, name) for name in part.given}
    items = {name: document["points"][0][split] for name, document in models.items() if document}
    sizes = {name: len(values) for name, values in items[BASE].items()}
    experts = {name: items[name] for name in part.given if name != BASE}
    return Sides(part.world.upstream, part.experts, items[BASE], experts, Resamples.of(sizes, draws))


def plain(scores: Scores) -> dict[str, list[float]]:
    """Item scores as JSON has them."""
    return {name: [round(float(value), 3) for value in values] for name, values in scores.items()}


def kept(part: Part, name: str) -> dict[str, Any] | None:
    """What was kept of a method or model, if it is of the same inputs and code."""
    try:
        document: dict[str, Any] = json.loads(part.file(name).read_text())
    except (OSError, ValueError):
        return None
    return document if document.get("inputs") == _inputs(part, name) else None


def keep(part: Part, name: str, document: Mapping[str, Any]) -> None:
    """Keep it, the whole file or nothing."""
    path = part.file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps({"inputs": _inputs(part, name), **document}))
    os.replace(temporary, path)


@cache
def _inputs(part: Part, name: str) -> str:
    """Changes with the models, with what they are asked, and with the method's own code."""
    stages = {
        use.stage
        for pipeline in (blend_setting(Blend(method=name)).pipelines.values() if name in methods() else ())
        for use in pipeline.uses
    }
    files = {file for stage in stages if (file := inspect.getsourcefile(stage.apply)) is not None}
    code = [_code(Path(file)) for file in sorted(files)]
    knob = knob_of(find_method(name)) if name in methods() else None
    return hashlib.sha256(
        json.dumps([part.digest(), code, COARSE, FINE, line(1.0).values, str(knob)]).encode()
    ).hexdigest()


@cache
def _code(path: Path) -> str:
    """What a module does: without comments, docstrings and the words that methods say of themselves."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
        if isinstance(node, ast.Call):
            node.keywords = [word for word in node.keywords if word.arg not in WORDS]
    return ast.dump(tree)
