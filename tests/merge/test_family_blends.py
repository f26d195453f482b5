"""Blends of real tiny models of every family: every tensor is there, and the output loads whole."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loadable import assert_loads_whole
from merge_models import read, same_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))

from test_families import FAMILIES, MOE, TEXT, VIT, save_under_memory_names

from ktmerge.merge import blend
from ktmerge.merge.planning import plan_blend

WHOLE = {"method": "linear", "lambda": 1}
CONVERTED: dict[str, Any] = {
    "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=4)),
    "qwen3-moe": lambda t: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**TEXT, **MOE, head_dim=8)),
}
"""Families whose experts are stacked in memory and saved one by one."""
OTHERS: dict[str, Any] = {"vit": lambda t: t.ViTForImageClassification(t.ViTConfig(**VIT, num_labels=3))}
FAST = ("llama tied", "qwen3-vl-moe")


def families(folder: Path, build: Any) -> None:
    """Save a model as transformers does (``base``), and tuned, as it does (``a``) and under its own names (``b``)."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(transformers)
        model.save_pretrained(folder / "base")
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "a")
    save_under_memory_names(model, folder / "b")


def check(folder: Path, recipe_in: Any, base: str, *experts: str) -> None:
    """Each expert, blended with nothing else, gives the tuned model under the base's names."""
    wanted = read(folder / ("a" if base == "base" else "b"))
    for name in experts:
        out = folder / f"{name} over {base}"
        blend(recipe_in(folder, {"x": (name, 1.0)}, WHOLE, base=base), out, device="cpu")
        stored = read(out)
        assert stored.keys() == read(folder / base).keys()
        if base == "base":
            assert all(same_bytes(values, wanted[key]) for key, values in stored.items())
            assert_loads_whole(out)


@pytest.mark.every(2)
@pytest.mark.parametrize("family", FAST)
def test_usual_families(family: str, tmp_path: Path, recipe_in: Any) -> None:
    families(tmp_path, FAMILIES[family][0])
    check(tmp_path, recipe_in, "base", "a", "b")


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FAST])
def test_many_families(family: str, tmp_path: Path, recipe_in: Any) -> None:
    families(tmp_path, FAMILIES[family][0])
    check(tmp_path, recipe_in, "base", "a", "b")


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_families_whose_names_in_memory_are_others(family: str, tmp_path: Path, recipe_in: Any) -> None:
    families(tmp_path, OTHERS[family])
    check(tmp_path, recipe_in, "base", "a")


@pytest.mark.every(2)
@pytest.mark.parametrize("family", CONVERTED)
def test_experts_stacked_and_single(family: str, tmp_path: Path, recipe_in: Any) -> None:
    families(tmp_path, CONVERTED[family])
    check(tmp_path, recipe_in, "base", "a", "b")
    (tmp_path / "stacked").mkdir()
    families(tmp_path / "stacked", CONVERTED[family])
    memory, single = tmp_path / "stacked" / "b", tmp_path / "a"
    # The same numbers, single in ``a``, stacked in ``b``: blended over the stacks, nothing moves.
    recipe = recipe_in(tmp_path, {"x": (str(single), 1.0)}, WHOLE, base=str(memory))
    plan = plan_blend(recipe)
    with plan.experts[0].checkpoint.reader() as shown:
        for name, values in read(memory).items():
            found = shown.read(plan.experts[0].alignment.mapping[name])
            assert same_bytes(found, values.reshape(-1)), name
            half = values.numel() // 3
            assert same_bytes(shown.read(plan.experts[0].alignment.mapping[name], half), values.reshape(-1)[half:])
