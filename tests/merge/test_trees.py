"""Blends of models kept as a tree of checkpoints, as VILA is: the output is such a tree, each folder loadable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loadable import assert_loads_whole
from merge_models import Tensors, llama_tensors, read, same_bytes, tuned, write

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import UsageError
from ktmerge.merge import blend
from ktmerge.merge.planning import plan_blend

WHOLE = {"method": "linear", "lambda": 1}


def tree(folder: Path, seed: int | None = None) -> Path:
    """Write a VILA-like tree: a Llama and a SigLIP as transformers saves them, and a projector of two layers."""
    import transformers as t

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llm = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=48, num_key_value_heads=1, **small))
        tower = t.SiglipVisionModel(t.SiglipVisionConfig(image_size=16, patch_size=8, **small))
        projector = {"layers.1.weight": torch.randn(16, 16), "layers.1.bias": torch.randn(16)}
        for model in () if seed is None else (llm, tower):
            torch.manual_seed(seed or 0)
            for parameter in model.parameters():
                parameter.data += 0.01 * torch.randn(parameter.shape)
    llm.bfloat16().save_pretrained(folder / "llm", max_shard_size="5KB")
    tower.save_pretrained(folder / "vision_tower")
    write(folder / "mm_projector", projector if seed is None else tuned(projector, 0.01, seed), {"model_type": "v2l"})
    config = {"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"], "llm_cfg": {}, "vision_tower_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "llm" / "tokenizer_config.json").write_text("{}")
    return folder


def read_tree(folder: Path) -> Tensors:
    return {
        f"{one.name}.{name}": values for one in folder.iterdir() if one.is_dir() for name, values in read(one).items()
    }


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trees")
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        tree(folder / name, seed)
    return folder


def test_the_output_is_the_same_tree(trees: Path, tmp_path: Path, recipe_in: Any) -> None:
    blend(recipe_in(trees, {"a": ("a", 1.0)}, WHOLE), tmp_path / "out", device="cpu")
    stored, expert = read_tree(tmp_path / "out"), read_tree(trees / "a")
    assert stored.keys() == expert.keys() == Checkpoint.open(tmp_path / "out").tensors.keys()
    assert all(same_bytes(values, expert[name]) for name, values in stored.items())

    def files(root: Path) -> set[str]:
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}

    assert files(tmp_path / "out") == files(trees / "base") | {"ktmerge.json", "ktmerge.lock.yaml", "README.md"}
    assert (tmp_path / "out" / "llm" / "model.safetensors.index.json").exists()
    for name in ("llm", "vision_tower"):
        assert_loads_whole(tmp_path / "out" / name)


def test_parts_are_those_of_the_whole_model(trees: Path, tmp_path: Path, recipe_in: Any) -> None:
    rules = [
        {"part": "vision", "keep": "base"},
        {"part": "connector", "keep": "b"},
        {"part": "llm.layers[1]", "keep": "a"},
    ]
    recipe = recipe_in(trees, {"a": ("a", 1.0), "b": ("b", 1.0)}, {"method": "ties", "where": rules})
    blend(recipe, tmp_path / "out", device="cpu")
    stored, sources = read_tree(tmp_path / "out"), {name: read_tree(trees / name) for name in ("base", "a", "b")}
    for name, values in stored.items():
        if name.startswith("vision_tower."):
            assert same_bytes(values, sources["base"][name])
        elif name.startswith("mm_projector."):
            assert same_bytes(values, sources["b"][name])
        elif ".layers.1." in name:
            assert same_bytes(values, sources["a"][name])


def test_each_folder_says_the_type_it_is_written_in(trees: Path, tmp_path: Path, recipe_in: Any) -> None:
    recipe = recipe_in(trees, {"a": ("a", 1.0)}, WHOLE, output={"dtype": "float32"})
    blend(recipe, tmp_path / "out", device="cpu")
    assert json.loads((tmp_path / "out" / "llm" / "config.json").read_text())["dtype"] == "float32"
    blend(recipe, tmp_path / "out", device="cpu", overwrite=True)
    assert {values.dtype for values in read(tmp_path / "out" / "llm").values()} == {torch.float32}


def test_folders_without_a_config_above_them_are_no_tree(tmp_path: Path, recipe_in: Any) -> None:
    for name in ("one", "two"):
        write(tmp_path / "runs" / name, llama_tensors(), {})
    with pytest.raises(UsageError, match=r"has no weights of its own; did you mean one of its folders \(one, two\)"):
        plan_blend(recipe_in(tmp_path, {"a": ("runs/one", 1.0)}, WHOLE, base="runs"))


def test_a_tree_and_a_file_do_not_answer_to_each_other(trees: Path, recipe_in: Any) -> None:
    with pytest.raises(UsageError, match=r"lacks \d+ of the base's tensors"):
        plan_blend(recipe_in(trees, {"a": ("base/llm", 1.0)}, WHOLE))
