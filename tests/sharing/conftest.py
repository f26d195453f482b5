"""Models, a recipe over them, and its bundle."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))  # the servers beside these tests

from hub_server import TOKEN, Handler, State, served

from ktmerge import api

SUITE = """# what to keep, what to learn
ktmerge_suite: 1
name: two-sides
upstream:
  - {name: general, kind: text, data: data/general.jsonl}
downstream:
  - {name: sums, kind: generate, data: data/sums.jsonl, prompt: "{{ q }}", answer: "{{ a }}"}
"""
RECIPE = """# half of what spam learned
ktmerge: 1
name: half-of-spam
description: half of it
base: base
experts:
  spam: {model: spam, weight: 0.5}
blend: {method: linear}
eval: {suite: suite.yaml}
"""


def write_model(folder: Path, seed: int) -> None:
    """A Llama of three tensors."""
    numbers = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (32, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8)}
    shapes["model.norm.weight"] = (8,)  # type: ignore[assignment]
    folder.mkdir(parents=True)
    tensors = {key: numbers.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))


@pytest.fixture(scope="session")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``spam``, ``recipe.yaml``, ``suite.yaml``, and the bundle ``r.ktr`` of them. Read-only."""
    folder = tmp_path_factory.mktemp("sharing")
    write_model(folder / "base", 0)
    write_model(folder / "spam", 1)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "suite.yaml").write_text(SUITE)
    api.pack(folder / "recipe.yaml", folder / "r.ktr")
    return folder


@pytest.fixture
def place(packed_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ``packed_once`` that a test may change, and works in."""
    folder = tmp_path / "work"
    shutil.copytree(packed_once, folder)
    monkeypatch.chdir(folder)
    return folder


@dataclass
class Hub:
    """A running hub."""

    address: str
    state: State


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the real one, with a token that it accepts."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    state = State()
    with served(Handler, state=state) as address:
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr("ktmerge.sharing.retrying._FIRST", 0.01)
        yield Hub(address, state)


Ktmerge = Callable[..., int]


@pytest.fixture
def ktmerge() -> Ktmerge:
    """The command line in this process; the exit code."""
    from ktmerge.cli import _exit_code

    return lambda *arguments: _exit_code(list(map(str, arguments)))
