"""Where linear maps are: against what the modules of transformers compute, and names and shapes of published files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.matrices import MatrixLayout, matrix_layout

PHI3 = {"model_type": "phi3", "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 6}}
QWEN_VL = {
    "model_type": "qwen2_vl", "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vision_config": {"model_type": "qwen2_vl", "embed_dim": 40, "hidden_size": 96, "num_heads": 4},
}  # fmt: skip
MIXTRAL = {"model_type": "mixtral", "hidden_size": 96, "num_attention_heads": 6}
LLAMA4 = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": 96}}
GPT_OSS = {"model_type": "gpt_oss", "hidden_size": 96, "num_attention_heads": 6}
QWEN3_VL = {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text", "hidden_size": 96}}
ARIA = {"model_type": "aria", "text_config": {"model_type": "aria_text", "hidden_size": 96}}

# name, shape, config, whether inputs come first, outputs of each map
LAYOUTS: list[tuple[str, tuple[int, ...], dict[str, Any], bool, tuple[int, ...]]] = [
    ("model.layers.0.mlp.up_proj.weight", (64, 96), PHI3, False, (64,)),
    ("model.layers.0.self_attn.qkv_proj.weight", (160, 96), PHI3, False, (96, 32, 32)),
    ("model.layers.0.mlp.gate_up_proj.weight", (128, 96), PHI3, False, (64, 64)),
    ("model.layers.0.mlp.gate_up_proj.weight", (127, 96), PHI3, False, (127,)),
    ("model.layers.0.mlp.down_proj.weight", (96, 64), PHI3, False, (96,)),
    # head_dim of its own, as Qwen 3 and Gemma have
    ("model.layers.0.self_attn.qkv_proj.weight", (320, 96), {**PHI3, "head_dim": 32}, False, (192, 64, 64)),
    # a shape that heads and sizes do not explain stays one map
    ("model.layers.0.self_attn.qkv_proj.weight", (150, 96), PHI3, False, (150,)),
    ("model.layers.0.self_attn.qkv_proj.weight", (160, 96), {}, False, (160,)),
    ("vit.blocks.0.attn.qkv.weight", (120, 40), {}, False, (40, 40, 40)),
    ("visual.blocks.0.attn.qkv.weight", (120, 40), QWEN_VL, False, (40, 40, 40)),
    ("vision.attn.in_proj_weight", (120, 40), LLAVA, False, (40, 40, 40)),
    ("layers.0.attn.Wqkv.weight", (120, 40), {"model_type": "modernbert", "hidden_size": 40}, False, (40, 40, 40)),
    ("layers.0.mlp.Wi.weight", (128, 40), {"model_type": "modernbert", "hidden_size": 40}, False, (64, 64)),
    ("transformer.h.0.attn.query_key_value.weight", (120, 40), {"model_type": "bloom"}, False, (120,)),
    ("transformer.h.0.attn.qkv_proj.weight", (120, 40), {"model_type": "codegen"}, False, (120,)),
    # GPT-2: inputs first; the same names in a model that is none are plain
    ("transformer.h.0.attn.c_attn.weight", (40, 120), {"model_type": "gpt2", "n_embd": 40}, True, (40, 40, 40)),
    ("h.0.mlp.c_fc.weight", (40, 160), {"model_type": "gpt2"}, True, (160,)),
    ("h.0.attn.c_proj.weight", (40, 40), {"model_type": "gpt2"}, True, (40,)),
    ("wrapped.encoder.h.0.attn.c_proj.weight", (40, 40), {"decoder": {"model_type": "gpt2"}}, True, (40,)),
    ("transformer.h.0.attn.c_attn.weight", (120, 40), {"model_type": "qwen"}, False, (40, 40, 40)),
    ("lm_head.weight", (50, 40), {"model_type": "gpt2"}, False, (50,)),
    # stacks: Mixtral outputs first, Llama 4, Aria and gpt-oss inputs first, Qwen 3 VL both
    ("model.layers.0.mlp.experts.gate_up_proj", (4, 128, 96), MIXTRAL, False, (64, 64)),
    ("model.layers.0.mlp.experts.down_proj", (4, 96, 64), MIXTRAL, False, (96,)),
    ("model.layers.0.mlp.experts.down_proj", (4, 96, 96), MIXTRAL, False, (96,)),
    ("model.layers.0.feed_forward.experts.gate_up_proj", (4, 96, 128), LLAMA4, True, (64, 64)),
    ("model.layers.0.feed_forward.experts.down_proj", (4, 64, 96), LLAMA4, True, (96,)),
    ("model.layers.0.feed_forward.experts.down_proj", (4, 96, 96), LLAMA4, True, (96,)),
    ("model.layers.0.mlp.experts.gate_up_proj", (4, 96, 192), GPT_OSS, True, (192,)),
    ("model.layers.0.mlp.experts.down_proj", (4, 96, 96), GPT_OSS, True, (96,)),
    ("model.layers.0.mlp.experts.fc1.weight", (4, 96, 128), ARIA, True, (128,)),
    ("model.layers.0.mlp.experts.fc2.weight", (4, 64, 96), ARIA, True, (96,)),
    ("model.layers.0.mlp.experts.gate_up_proj", (4, 96, 128), QWEN3_VL, True, (64, 64)),
    ("model.layers.0.mlp.experts.gate_up_proj", (4, 128, 96), QWEN3_VL, False, (64, 64)),
    ("model.layers.0.mlp.experts.down_proj", (4, 64, 96), QWEN3_VL, True, (96,)),
    ("model.layers.0.mlp.experts.down_proj", (4, 96, 64), QWEN3_VL, False, (96,)),
    # odd shapes
    ("a.weight", (1, 1), {}, False, (1,)),
    ("a.qkv.weight", (3, 1), {}, False, (1, 1, 1)),
    ("a.gate_up_proj.weight", (2, 0), {}, False, (1, 1)),
    ("a.weight", (0, 5), {}, False, (0,)),
]


@pytest.mark.parametrize(
    ("name", "shape", "config", "transposed", "outputs"), LAYOUTS, ids=[f"{n}-{s}" for n, s, *_ in LAYOUTS]
)
def test_layouts(
    name: str, shape: tuple[int, ...], config: dict[str, Any], transposed: bool, outputs: tuple[int, ...]
) -> None:
    found = matrix_layout(name, shape, config)
    assert found == MatrixLayout(transposed, outputs)
    assert sum(outputs) == (shape[-1] if transposed else shape[-2])


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 5)])
def test_other_ranks_hold_no_maps(shape: tuple[int, ...]) -> None:
    assert matrix_layout("model.layers.0.mlp.up_proj.weight", shape, {}) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"num_attention_heads": "six"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 6, "hidden_size": None},
        {"text_config": None},
        {"text_config": [1]},
        {"num_attention_heads": 6, "hidden_size": 96, "num_key_value_heads": [1, 2]},
        {"num_attention_heads": 6, "hidden_size": 96, "head_dim": {"0": 16}},
    ],
)
def test_configs_that_say_odd_things_are_survived(settings: dict[str, Any]) -> None:
    assert matrix_layout("a.qkv_proj.weight", (160, 96), settings) == MatrixLayout(False, (160,))


def small(kind: str) -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    t = transformers
    if kind == "phi3":
        return t.Phi3ForCausalLM(t.Phi3Config(**sizes, **heads, attn_implementation="eager"))
    if kind == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**sizes, **heads, num_local_experts=3))
    if kind == "gpt_oss":
        return t.GptOssForCausalLM(t.GptOssConfig(**sizes, **heads, head_dim=6, num_local_experts=3))
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=32, n_embd=24, n_layer=1, n_head=4, n_positions=8))


@pytest.mark.parametrize("kind", ["phi3", "mixtral", "gpt_oss", "gpt2"])
def test_the_inputs_are_where_the_model_reads_them(kind: str) -> None:
    model = small(kind)
    config = model.config.to_dict()
    checked = 0
    for name, values in model.state_dict().items():
        if tensor_class(name, TensorInfo(name, "F32", tuple(values.shape), "", 0, 0), config) != "matrix":
            continue
        layout = matrix_layout(name, tuple(values.shape), config)
        assert layout is not None
        inputs = values.shape[-2] if layout.transposed else values.shape[-1]
        wide = 96 if kind == "gpt2" else 20
        assert inputs == (wide if name.endswith(("down_proj", "down_proj.weight", "mlp.c_proj.weight")) else 24), name
        checked += 1
    assert checked >= 4


def test_fused_parts_are_what_the_model_takes_apart() -> None:
    """Without its queries or its keys, but not without its values, Phi-3 attends to all it may see alike."""
    model = small("phi3")
    weight = model.model.layers[0].self_attn.qkv_proj.weight
    layout = matrix_layout("a.qkv_proj.weight", tuple(weight.shape), model.config.to_dict())
    assert layout is not None
    alike = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    before = weight.detach().clone()
    for part, uniform in ((0, True), (1, True), (2, False)):
        start = sum(layout.outputs[:part])
        with torch.no_grad():
            weight.copy_(100 * before)
            weight[start : start + layout.outputs[part]] = 0
            scores = model(torch.tensor([[1, 2, 3]]), output_attentions=True).attentions[0][0]
        assert torch.allclose(scores, alike.expand_as(scores), atol=1e-6) == uniform
