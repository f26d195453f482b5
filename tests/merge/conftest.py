"""Little checkpoints of two families, their fine-tunes, and blends of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the oracles beside these tests

from merge_models import llama_tensors, llava_tensors, tuned, write

from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Recipe

torch.set_num_threads(1)

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe_in() -> MakeRecipe:
    """A recipe over folders: ``recipe_in(folder, experts, blend, **rest)``; experts as ``{name: (folder, weight)}``."""

    def make(
        folder: Path, experts: dict[str, tuple[str, float]], blend: dict[str, Any], base: str = "base", **rest: Any
    ) -> Recipe:
        document = {
            "ktmerge": 1,
            "base": base,
            "experts": {name: {"model": model, "weight": weight} for name, (model, weight) in experts.items()},
            "blend": blend,
            **rest,
        }
        return parse_recipe(document, "recipe", folder)

    return make


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in bfloat16 (``base``) and three fine-tunes (``a``, ``b``, ``c``; ``c`` left a layer frozen)."""
    folder = tmp_path_factory.mktemp("llamas")
    base = llama_tensors()
    config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 48, "dtype": "bfloat16"}
    write(folder / "base", base, config, files={"tokenizer.json": "{}", "tokenizer_config.json": '{"x": 1}'})
    for number, name in enumerate("abc"):
        frozen = (".layers.1.",) if name == "c" else ()
        write(folder / name, tuned(base, 3e-3, seed=number + 1, frozen=frozen), config)
    return folder


@pytest.fixture(scope="session")
def llavas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-shaped model in float32, sharded, and fine-tunes of it, each under other names.

    ``base`` and ``a`` as its publisher names tensors, ``b`` as transformers saves them now, ``c`` by its modules.
    """
    folder = tmp_path_factory.mktemp("llavas")
    base = llava_tensors("published")
    config = {
        "model_type": "llava",
        "tie_word_embeddings": False,
        "text_config": {"vocab_size": 40, "model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 16},
    }
    files = {"preprocessor_config.json": "{}", "processor_config.json": "{}", "tokenizer/special.txt": "<image>"}
    write(folder / "base", base, config, files=files, shards=3)
    weights = {name: base[name] for name in llava_tensors("published", buffers=False)}
    for seed, (name, naming) in enumerate({"a": "published", "b": "saved", "c": "modules"}.items(), 11):
        names = llava_tensors(naming, buffers=False)
        write(folder / name, dict(zip(names, tuned(weights, 2e-3, seed).values(), strict=True)), config)
    return folder
