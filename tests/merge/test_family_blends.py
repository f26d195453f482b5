"""Blends of real tiny models of every family: every tensor is there, and the output loads whole."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loadable import assert_loads_whole
from merge_models import read, same_bytes
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))

from test_families import FAMILIES, MOE, TEXT, VIT, save_under_memory_names

from ktmerge.merge import blend, blend_into
from ktmerge.merge.planning import plan_blend

WHOLE = {"method": "linear", "lambda": 1}
CONVERTED: dict[str, Any] = {
    "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=4)),
    "qwen3-moe": lambda t: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**TEXT, **MOE, head_dim=8)),
    "nemotron-h": lambda t: t.NemotronHForCausalLM(
        t.NemotronHConfig(
            vocab_size=99,
            hidden_size=16,
            layers_block_type=["linear_attention", "full_attention", "moe"],
            head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            ssm_state_size=4,
            mamba_num_heads=4,
            mamba_head_dim=8,
            n_groups=2,
            n_routed_experts=4,
            moe_intermediate_size=12,
            moe_shared_expert_intermediate_size=12,
        )
    ),
}
"""Families whose experts are stacked in memory and saved one by one; Nemotron's have no gate."""
OTHERS: dict[str, Any] = {
    "vit": lambda t: t.ViTForImageClassification(t.ViTConfig(**VIT, num_labels=3)),
    "marian": lambda t: t.MarianMTModel(
        t.MarianConfig(
            vocab_size=99,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_attention_heads=2,
            decoder_ffn_dim=24,
            max_position_embeddings=16,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    ),
}
"""Families with other names, or more tensors, in memory."""
BERT = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CUT: dict[str, Any] = {
    "nomic-bert": lambda t: t.NomicBertModel(t.NomicBertConfig(**BERT)),
    "gte": lambda t: t.GteModel(t.GteConfig(**BERT)),
    "jina-v3": lambda t: t.JinaEmbeddingsV3Model(t.JinaEmbeddingsV3Config(**BERT)),
    "dinov2 swiglu": lambda t: t.Dinov2Model(t.Dinov2Config(**{**VIT, "num_hidden_layers": 1}, use_swiglu_ffn=True)),
    "granite-moe": lambda t: t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    ),
}
"""Families whose matrices are apart in memory and lie in one another in the file, or the other way round."""
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
    """Each expert, blended with nothing else, gives the tuned model under the base's names; so it does in place."""
    wanted = read(folder / ("a" if base == "base" else "b"))
    for name in experts:
        out = folder / f"{name} over {base}"
        recipe = recipe_in(folder, {"x": (name, 1.0)}, WHOLE, base=base)
        blend(recipe, out, device="cpu")
        stored = read(out)
        assert stored.keys() == read(folder / base).keys()
        if base == "base":
            assert all(same_bytes(values, wanted[key]) for key, values in stored.items())
            assert_loads_whole(out)
    if base == "base":
        live = load(folder / "base")
        blend_into(live, recipe)
        blended = load(out).state_dict()
        assert all(same_bytes(values, blended[key]) for key, values in live.state_dict().items())


def load(folder: Path) -> Any:
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, local_files_only=True)


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
def test_experts_published_the_other_way_round(tmp_path: Path, recipe_in: Any) -> None:
    """Qwen3-VL's mixtures: published as [E, in, out], saved by transformers as [E, out, in]."""
    families(tmp_path, FAMILIES["qwen3-vl-moe"][0])
    wanted = read(tmp_path / "a")
    for name in ("base", "a"):
        file = tmp_path / name / "model.safetensors"
        turned = {
            key: values.transpose(1, 2).contiguous() if is_stack(key) else values
            for key, values in read(tmp_path / name).items()
        }
        (tmp_path / f"turned {name}").mkdir()
        save_file(turned, tmp_path / f"turned {name}" / file.name, {"format": "pt"})
        shutil.copy(tmp_path / name / "config.json", tmp_path / f"turned {name}")
    assert any(map(is_stack, wanted))
    for base, expert in (("turned base", "a"), ("base", "turned a"), ("turned base", "turned a")):
        out = tmp_path / f"{expert} over {base}"
        recipe = recipe_in(tmp_path, {"x": (expert, 1.0)}, WHOLE, base=base)
        blend(recipe, out, device="cpu")
        turned = base.startswith("turned")
        for key, values in read(out).items():
            assert same_bytes(values.transpose(1, 2) if turned and is_stack(key) else values, wanted[key])
        assert_loads_whole(out)
        live, blended = load(tmp_path / base), load(out).state_dict()
        blend_into(live, recipe)
        assert all(same_bytes(values, blended[key]) for key, values in live.state_dict().items())


def is_stack(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_families_whose_names_in_memory_are_others(family: str, tmp_path: Path, recipe_in: Any) -> None:
    families(tmp_path, OTHERS[family])
    check(tmp_path, recipe_in, "base", "a")


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "family", [name if name == "nomic-bert" else pytest.param(name, marks=pytest.mark.slow) for name in CUT]
)
def test_families_that_are_cut_and_joined_on_loading(family: str, tmp_path: Path, recipe_in: Any) -> None:
    families(tmp_path, CUT[family])
    check(tmp_path, recipe_in, "base", "a")


@pytest.mark.every(2)
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", pytest.param("nemotron-h", marks=pytest.mark.slow)])
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
