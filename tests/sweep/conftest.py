"""A tiny base and an expert, and sets on which the base is always right upstream, and the expert downstream."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # the server beside these tests

from postgresql_server import missing, running

WORDS = ["fox", "dog", "capital", "France", "good", "bad", "yes", "no", "one", "two", "heaven", "earth", "first"]


@dataclass(frozen=True)
class World:
    """Where things are; ``suite`` keeps half of its rows for selection."""

    folder: Path
    base: Path
    expert: Path
    recipe: Path
    suite: Path


@pytest.fixture(scope="session")
def world(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("sweep")
    expert = folder / "expert"
    _write_expert(tiny_llama, expert)
    rows = [{"q": " ".join(np.random.default_rng(i).choice(WORDS, 4)), "a": 0} for i in range(120)]
    _write_right(tiny_llama, rows[:60], folder / "keep.jsonl")
    _write_right(expert, rows[60:], folder / "learn.jsonl")
    suite = {"ktmerge_suite": 1, "name": "tiny", "selection": 0.5} | {
        side: [
            {"name": name, "kind": "choice", "data": f"{name}.jsonl", "prompt": "{{ q }}", "answer": "{{ a }}",
             "choices": ["yes", "no", "two"]}
        ]
        for side, name in (("upstream", "keep"), ("downstream", "learn"))
    }  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    recipe = {
        "ktmerge": 1, "name": "tiny", "base": str(tiny_llama), "experts": {"e": {"model": "expert"}},
        "blend": {"method": "linear", "lambda": 0.5}, "eval": {"suite": "suite.yaml", "bootstrap": 100},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return World(folder, tiny_llama, expert, folder / "recipe.yaml", folder / "suite.yaml")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a database of a real server; tests without one are skipped, and say what is not there."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'ktmerge[postgresql]'")
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with running() as url:
        yield url


@pytest.fixture(scope="session")
def soup_recipe(world: World) -> Path:
    """A recipe of three: two like the expert but for what their average lacks, and one that goes elsewhere."""
    names = {"other": {7: 2.0}, "left": {3: 1.0, 5: 0.7}, "right": {3: 1.0, 5: -0.7}}
    for name, moves in names.items():
        _write_expert(world.base, world.folder / name, moves)
    recipe = yaml.safe_load(world.recipe.read_text())
    recipe |= {"name": "runs", "experts": {name: {"model": name} for name in names}, "blend": {"method": "soup"}}
    path = world.folder / "runs.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def _write_expert(base: Path, out: Path, moves: Mapping[int, float] = MappingProxyType({3: 1.0})) -> None:
    """The base with every weight moved by chance, by seed so many times as far as it is long."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        sizes = {name: values.float().std() for name, values in model.named_parameters()}
        for seed, size in moves.items():
            generator = torch.Generator().manual_seed(seed)
            for name, values in model.named_parameters():
                if values.ndim == 2:
                    values += torch.randn(values.shape, generator=generator).to(values.dtype) * sizes[name] * size
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)


def _write_right(model: Path, rows: list[dict[str, object]], path: Path) -> None:
    """Rows whose answer is what the model likes best."""
    import torch

    from ktmerge.eval import read_sets, score_model
    from ktmerge.eval.loading import load_model, load_tokenizer
    from ktmerge.recipes.suites import Suite

    task = {"name": "t", "kind": "choice", "data": path.name, "prompt": "{{ q }}", "choices": ["yes", "no", "two"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = Suite(upstream=[{**task, "answer": "{{ a }}"}], folder=path.parent)
    loaded = load_model(model, torch.device("cpu"), torch.float32)
    found = score_model(loaded, load_tokenizer(model), read_sets(suite))["t"].details["logprobs"]
    path.write_text(
        "".join(json.dumps({**row, "a": int(np.argmax(own))}) + "\n" for row, own in zip(rows, found, strict=True))
    )
