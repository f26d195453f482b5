"""Thousands of damaged headers, indexes, configurations and recipes: only ktmerge's own errors, and nothing written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import RECIPE, write_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import altered, damaged
from safetensors.torch import save_file

from ktmerge import api
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.opening import open_model
from ktmerge.errors import KtmergeError

QUICK = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))

FILES = ["model.safetensors.index.json", "config.json", "tokenizer.json"]
LIMIT = 2_000
"""Characters of a message: a person must be able to read it."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little models and a recipe; each test damages its copy of one file and puts it back."""
    folder = tmp_path_factory.mktemp("fuzz") / "work"
    write_models(folder, width=8, layers=2, shards=2)
    write_adapter(folder / "adapters" / "one")
    return folder


def write_adapter(folder: Path) -> None:
    """A DoRA of two matrices and of the embedding's tokens, with a norm stored whole."""
    layer, numbers = "base_model.model.model.layers.0", torch.Generator().manual_seed(0)
    shapes = {
        f"{layer}.self_attn.q_proj": (8, 8),
        f"{layer}.mlp.up_proj": (32, 8),
    }
    tensors = {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.rand(3, 8, generator=numbers),
        "base_model.model.model.norm.weight": torch.rand(8, generator=numbers),
    }
    for module, (outputs, inputs) in shapes.items():
        tensors[f"{module}.lora_A.weight"] = torch.rand(2, inputs, generator=numbers)
        tensors[f"{module}.lora_B.weight"] = torch.rand(outputs, 2, generator=numbers)
        tensors[f"{module}.lora_magnitude_vector"] = torch.rand(outputs, generator=numbers)
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, ".*up_proj": 2}, "use_dora": True,
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3}, "use_rslora": True, "modules_to_save": ["norm"],
        "trainable_token_indices": {"embed_tokens": [1, 30, 2]}, "base_model_name_or_path": "base",
        "ensure_weight_tying": True, "init_lora_weights": True, "fan_in_fan_out": False,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def survive(attempt: Callable[[], object]) -> bool:
    """Whether it went well; anything but one of ktmerge's own errors, in plain words, fails the test."""
    try:
        attempt()
    except KtmergeError as error:
        text = str(error)
        assert text
        assert all(line.isprintable() for line in text.splitlines()), repr(text)
        assert all(len(line) < LIMIT for line in text.splitlines()), text
        return False
    return True


def blend(folder: Path) -> None:
    """Blend; if that is refused, nothing is left."""
    with tempfile.TemporaryDirectory() as place:
        try:
            api.blend(folder / "recipe.yaml", Path(place) / "out", device="cpu")
        except KtmergeError:
            assert os.listdir(place) == []
            raise
        Checkpoint.open(Path(place) / "out")


def with_bytes(path: Path, content: bytes, attempt: Callable[[], object]) -> bool:
    """Try with other bytes in a file, and put the old ones back."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        return survive(attempt)
    finally:
        path.write_bytes(before)


def split(path: Path) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    return content[8:stop], content[stop:]


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def damaged_header(data: st.DataObject, models: Path) -> None:
    path = data.draw(st.sampled_from(sorted(models.glob("*/*.safetensors"))))
    header, weights = split(path)
    kind = data.draw(st.sampled_from(["bytes", "tree", "tree", "length", "file"]))
    if kind == "bytes":
        content = joined(data.draw(damaged(header)), weights)
    elif kind == "tree":
        content = joined(as_json(data.draw(altered(json.loads(header)))), weights)
    elif kind == "length":
        content = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + header + weights
    else:
        content = data.draw(damaged(path.read_bytes()))
    with_bytes(path, content, lambda: blend(models))


def damaged_json(data: st.DataObject, models: Path) -> None:
    """The index, the configuration and the tokenizer."""
    with_bytes(*_damaged_json(data, models), lambda: blend(models))


def _damaged_json(data: st.DataObject, models: Path) -> tuple[Path, bytes]:
    path = models / data.draw(st.sampled_from(["base", "a"])) / data.draw(st.sampled_from(FILES))
    if data.draw(st.booleans()):
        return path, as_json(data.draw(altered(json.loads(path.read_bytes()))))
    return path, data.draw(damaged(path.read_bytes()))


def inspected(data: st.DataObject, models: Path) -> None:
    """The same files, looked at."""

    def look() -> None:
        found = api.inspect(models / "base", [models / "a"], headers_only=data.draw(st.booleans()))
        json.dumps(found.to_json())
        assert found.tables()

    with_bytes(*_damaged_json(data, models), look)


def damaged_adapter(data: st.DataObject, models: Path) -> None:
    config, weights = models / "adapters/one/adapter_config.json", models / "adapters/one/adapter_model.safetensors"
    kind = data.draw(st.sampled_from(["config", "config", "header", "text", "file"]))
    if kind == "config":
        with_bytes(config, as_json(data.draw(altered(json.loads(config.read_bytes())))), lambda: fold(models))
    elif kind == "text":
        with_bytes(config, data.draw(damaged(config.read_bytes())), lambda: fold(models))
    elif kind == "header":
        header, values = split(weights)
        with_bytes(weights, joined(as_json(data.draw(altered(json.loads(header)))), values), lambda: fold(models))
    else:
        with_bytes(weights, data.draw(damaged(weights.read_bytes())), lambda: fold(models))


def fold(folder: Path) -> None:
    folded = open_model("base+adapters/one", folder, Checkpoint.open(folder / "base"))
    with folded.reader() as reader:
        for name, info in folded.tensors.items():
            assert reader.read(name).numel() == info.numel


PLAIN = yaml.safe_load(RECIPE)
RECIPES = [
    PLAIN,
    {
        **PLAIN,
        "blend": {"stages": {"transform": [{"trim": {"density": 0.2}}], "combine": {"elect": {}}}, "lambda": 0.5},
        "output": {"dtype": "float16", "rounding": "nearest"},
    },
    {
        **yaml.safe_load(RECIPE),
        "blend": {"method": "dare_ties", "density": 0.2, "lambda": 0.7},
    },
]


def damaged_recipe(data: st.DataObject, models: Path) -> None:
    recipe = data.draw(st.sampled_from(RECIPES))
    text = yaml.safe_dump(data.draw(altered(recipe))).encode()
    if data.draw(st.integers(0, 3)) == 0:
        text = data.draw(damaged(text))
    reference = models / "recipe.yaml"
    with_bytes(reference, text, lambda: api.check(str(reference)))
    if data.draw(st.integers(0, 3)) == 0:
        with_bytes(reference, text, lambda: blend(models))


KINDS = {
    "header": damaged_header,
    "json": damaged_json,
    "recipe": damaged_recipe,
    "inspect": inspected,
    "adapter": damaged_adapter,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_damaged_is_sound(recipe: dict[str, Any], models: Path) -> None:
    reference = models / "recipe.yaml"
    assert with_bytes(reference, yaml.safe_dump(recipe).encode(), lambda: blend(models))


def test_a_sound_adapter_is_folded(models: Path) -> None:
    assert survive(lambda: fold(models))


@pytest.mark.parametrize("kind", KINDS)
def test_only_our_own_errors(kind: str, models: Path) -> None:
    QUICK(given(st.data())(lambda data: KINDS[kind](data, models)))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_only_our_own_errors_thousands_of_times(kind: str, models: Path) -> None:
    LONG(given(st.data())(lambda data: KINDS[kind](data, models)))()
