"""Tensor classes by name, shape, type and config."""

from __future__ import annotations

from typing import Any

import pytest

from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.header import TensorInfo

TEXT = {"vocab_size": 99}
NESTED = {"text_config": {"vocab_size": 99}}
PACKED = {"quantization_config": {"quant_method": "any"}}


def classify(name: str, shape: tuple[int, ...], dtype: str = "BF16", config: dict[str, Any] | None = None) -> str:
    return tensor_class(name, TensorInfo(name, dtype, shape, "f", 0, 0), TEXT if config is None else config)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (16, 16), "matrix"),
        ("transformer.h.0.attn.c_attn.weight", (16, 48), "matrix"),
        ("model.layers.0.mlp.experts.3.w1.weight", (24, 16), "matrix"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 16, 48), "matrix"),
        ("model.layers.0.feed_forward.experts.down_proj", (4, 16, 48), "matrix"),
        ("model.layers.0.mlp.gate.weight", (4, 16), "matrix"),
        ("multi_modal_projector.linear_1.weight", (16, 16), "matrix"),
        ("multi_modal_projector.mm_input_projection_weight", (16, 16), "matrix"),
        ("visual_projection.weight", (16, 16), "matrix"),
        ("classifier.weight", (3, 16), "matrix"),
        ("score.weight", (1, 16), "matrix"),
        ("visual.merger.mlp.0.weight", (16, 16), "matrix"),
        ("vision_tower.head.attention.in_proj_weight", (48, 16), "matrix"),
        ("vision_model.embeddings.patch_embedding.weight", (16, 192), "matrix"),  # a linear patch embedding
        ("vision_tower.head.mlp.fc1.weight", (99, 16), "matrix"),
        ("model.layers.0.attn.output.weight", (99, 16), "matrix"),  # only by accident as many rows as tokens
        ("head.weight", (3, 16), "matrix"),
        ("model.embed_tokens.weight", (99, 16), "embed"),
        ("model.language_model.embed_tokens_per_layer.weight", (99, 16), "embed"),
        ("lm_head.weight", (99, 16), "embed"),
        ("embed_out.weight", (99, 16), "embed"),
        ("wte.weight", (99, 16), "embed"),
        ("transformer.wpe.weight", (32, 16), "embed"),
        ("shared.weight", (99, 16), "embed"),
        ("bert.embeddings.word_embeddings.weight", (99, 16), "embed"),
        ("bert.embeddings.token_type_embeddings.weight", (2, 16), "embed"),
        ("backbone.embeddings.weight", (99, 16), "embed"),
        ("cls.predictions.decoder.weight", (99, 16), "embed"),
        ("output.weight", (99, 16), "embed"),
        ("transformer.output_layer.weight", (99, 16), "embed"),
        ("model.encoder.embed_positions.weight", (16, 16), "embed"),
        ("vision_model.embeddings.position_embedding.weight", (5, 16), "embed"),
        ("vit.embeddings.position_embeddings", (1, 5, 16), "embed"),
        ("model.visual.pos_embed.weight", (16, 16), "embed"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 2), "embed"),
        ("query_tokens", (1, 4, 16), "embed"),
        ("positional_embedding", (77, 16), "embed"),
        ("model.layers.0.input_layernorm.weight", (16,), "vector"),
        ("model.layers.0.self_attn.q_proj.bias", (16,), "vector"),
        ("vision_model.embeddings.class_embedding", (16,), "vector"),
        ("vit.embeddings.cls_token", (1, 1, 16), "vector"),
        ("image_newline", (16,), "vector"),
        ("logit_scale", (), "vector"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 48), "vector"),
        ("backbone.layers.0.mixer.A_log", (32, 4), "vector"),
        ("model.layers.0.self_attn.sinks", (2,), "vector"),
        ("vision_tower.embeddings.patch_embedding.weight", (16, 3, 8, 8), "conv"),
        ("visual.patch_embed.proj.weight", (16, 3, 2, 8, 8), "conv"),
        ("vit.embeddings.patch_embeddings.projection.weight", (16, 3, 8, 8), "conv"),
        ("model.encoder.conv1.weight", (16, 8, 3), "conv"),
        ("backbone.layers.0.mixer.conv1d.weight", (32, 1, 4), "conv"),
        ("resnet.encoder.stages.0.layers.0.shortcut.convolution.weight", (16, 8, 1, 1), "conv"),
        ("model.rotary_emb.inv_freq", (8,), "buffer"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), "buffer"),
        ("model.audio_tower.layers.0.feed_forward1.ffw_layer_1.input_max", (), "buffer"),
        ("resnet.embedder.normalization.running_mean", (8,), "buffer"),
        ("resnet.embedder.normalization.running_var", (8,), "buffer"),
        ("transformer.h.0.attn.bias", (1, 1, 32, 32), "buffer"),
        ("transformer.h.0.attn.masked_bias", (), "buffer"),
    ],
)
def test_floats(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert classify(name, shape) == expected
    assert classify(name, shape, "F32", NESTED) == expected


def test_a_plain_head_needs_the_vocabulary_to_be_known() -> None:
    assert classify("output.weight", (99, 16), config={}) == "matrix"
    assert classify("output.weight", (99, 16), config={"text_config": {"vocab_size": 99}}) == "embed"
    assert classify("lm_head.weight", (99, 16), config={}) == "embed"


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "config", "expected"),
    [
        ("vision_model.embeddings.position_ids", (1, 5), "I64", {}, "buffer"),
        ("resnet.embedder.normalization.num_batches_tracked", (), "I64", {}, "buffer"),
        ("transformer.h.0.attn.bias", (1, 1, 8, 8), "U8", {}, "buffer"),
        ("transformer.h.0.attn.bias", (1, 1, 8, 8), "BOOL", {}, "buffer"),
        ("freqs", (4, 4), "C64", {}, "buffer"),
        ("model.layers.0.mlp.up_proj.weight", (4, 4), "F8_E4M3", {}, "quant"),
        ("model.layers.0.mlp.up_proj.weight", (4, 4), "F4", {}, "quant"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", (1, 1), "F32", PACKED, "quant"),
        ("model.layers.0.mlp.up_proj.weight_scale", (1,), "BF16", PACKED, "quant"),
        ("model.layers.0.mlp.up_proj.qweight", (4, 4), "I32", PACKED, "quant"),
        ("model.layers.0.mlp.up_proj.qweight", (4, 4), "I32", {}, "quant"),
        ("model.layers.0.mlp.up_proj.scales", (4, 4), "F16", PACKED, "quant"),
        ("model.layers.0.mlp.up_proj.g_idx", (4,), "I32", PACKED, "quant"),
        ("model.layers.0.mlp.up_proj.weight.absmax", (4,), "F32", PACKED, "quant"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", (4,), "U8", PACKED, "quant"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", (4, 4, 2, 16), "U8", PACKED, "quant"),
        ("model.layers.0.mlp.experts.gate_up_proj_scales", (4, 4, 2), "U8", PACKED, "quant"),
        ("model.layers.0.mlp.up_proj.weight", (4, 4), "I8", {}, "quant"),
        ("model.layers.0.mlp.up_proj.weight", (4, 1), "U8", PACKED, "quant"),
        ("model.layers.0.input_layernorm.weight", (4,), "BF16", PACKED, "vector"),
        ("model.embed_tokens.weight", (99, 4), "BF16", PACKED, "embed"),
        ("some.scales", (4,), "BF16", {}, "vector"),
    ],
)
def test_integers_and_packed_weights(
    name: str, shape: tuple[int, ...], dtype: str, config: dict[str, Any], expected: str
) -> None:
    assert classify(name, shape, dtype, config) == expected
