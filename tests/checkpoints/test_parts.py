"""Parts from names alone, over the namings that models are really published and re-saved under."""

from __future__ import annotations

from typing import Any

import pytest

from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError


def blocks(container: str, count: int, *leaves: str) -> list[str]:
    leaves = leaves or ("attn.q_proj.weight", "mlp.fc1.weight", "norm1.weight")
    return [f"{container}.{i}.{leaf}" for i in range(count) for leaf in leaves]


Family = tuple[list[str], dict[str, Any], dict[str, str], dict[str, int]]
# name: (tensor names, config, expected part of some of them, layers)
FAMILIES: dict[str, Family] = {
    "llama": (
        [*blocks("model.layers", 3), "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
        {"vocab_size": 9},
        {
            "model.layers.2.mlp.fc1.weight": "llm.layers[2]",
            "model.embed_tokens.weight": "embed",
            "model.norm.weight": "norm",
            "lm_head.weight": "head",
        },
        {"llm": 3},
    ),
    "llama without its head": (
        [*blocks("layers", 2), "embed_tokens.weight", "norm.weight"],
        {},
        {"layers.1.norm1.weight": "llm.layers[1]", "embed_tokens.weight": "embed", "norm.weight": "norm"},
        {"llm": 2},
    ),
    "gpt2 as published": (
        [*blocks("h", 2, "attn.c_attn.weight", "ln_1.weight"), "wte.weight", "wpe.weight", "ln_f.bias"],
        {},
        {"h.1.ln_1.weight": "llm.layers[1]", "wte.weight": "embed", "wpe.weight": "embed", "ln_f.bias": "norm"},
        {"llm": 2},
    ),
    "gpt-neox": (
        [
            *blocks("gpt_neox.layers", 2),
            "gpt_neox.embed_in.weight",
            "gpt_neox.final_layer_norm.bias",
            "embed_out.weight",
        ],
        {},
        {"gpt_neox.embed_in.weight": "embed", "gpt_neox.final_layer_norm.bias": "norm", "embed_out.weight": "head"},
        {"llm": 2},
    ),
    "mixtral, numbers inside blocks": (
        [
            *blocks("model.layers", 2, "mlp.experts.7.w1.weight", "mlp.experts.0.w1.weight", "mlp.gate.weight"),
            "model.norm.weight",
        ],
        {},
        {"model.layers.1.mlp.experts.7.w1.weight": "llm.layers[1]", "model.layers.0.mlp.gate.weight": "llm.layers[0]"},
        {"llm": 2},
    ),
    "chatglm: an encoder that is the decoder": (
        [
            *blocks("transformer.encoder.layers", 2),
            "transformer.embedding.word_embeddings.weight",
            "transformer.encoder.final_layernorm.weight",
            "transformer.output_layer.weight",
            "transformer.rotary_pos_emb.inv_freq",
        ],
        {},
        {
            "transformer.encoder.layers.1.norm1.weight": "llm.layers[1]",
            "transformer.embedding.word_embeddings.weight": "embed",
            "transformer.encoder.final_layernorm.weight": "norm",
            "transformer.output_layer.weight": "head",
            "transformer.rotary_pos_emb.inv_freq": "llm",
        },
        {"llm": 2},
    ),
    "multi-token prediction beside the main stack": (
        [*blocks("model.layers", 4), *blocks("mtp.layers", 1), "mtp.fc.weight", "model.norm.weight"],
        {},
        {"mtp.layers.0.norm1.weight": "llm", "model.layers.3.norm1.weight": "llm.layers[3]"},
        {"llm": 4},
    ),
    "bert classifier": (
        [
            *blocks("bert.encoder.layer", 2),
            "bert.embeddings.LayerNorm.weight",
            "bert.pooler.dense.bias",
            "classifier.bias",
        ],
        {"vocab_size": 9},
        {
            "bert.encoder.layer.1.norm1.weight": "llm.layers[1]",
            "bert.embeddings.LayerNorm.weight": "embed",
            "classifier.bias": "head",
        },
        {"llm": 2},
    ),
    "t5": (
        [
            *blocks("encoder.block", 2, "layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"),
            *blocks("decoder.block", 3, "layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.q.weight"),
            "shared.weight",
            "encoder.final_layer_norm.weight",
            "decoder.final_layer_norm.weight",
        ],
        {"is_encoder_decoder": True},
        {
            "encoder.block.1.layer.0.SelfAttention.q.weight": "encoder.layers[1]",
            "decoder.block.2.layer.1.EncDecAttention.q.weight": "llm.layers[2]",
            "shared.weight": "embed",
            "encoder.final_layer_norm.weight": "encoder",
            "decoder.final_layer_norm.weight": "norm",
        },
        {"llm": 3, "encoder": 2},
    ),
    "whisper": (
        [
            *blocks("model.encoder.layers", 2),
            *blocks("model.decoder.layers", 3),
            "model.encoder.conv1.weight",
            "model.decoder.embed_tokens.weight",
            "proj_out.weight",
        ],
        {},
        {
            "model.encoder.conv1.weight": "encoder",
            "model.decoder.embed_tokens.weight": "embed",
            "proj_out.weight": "head",
        },
        {"llm": 3, "encoder": 2},
    ),
    "llava as llava-hf publishes it": (
        [
            *blocks("language_model.model.layers", 4),
            *blocks("vision_tower.vision_model.encoder.layers", 3),
            "language_model.model.embed_tokens.weight",
            "language_model.model.norm.weight",
            "language_model.lm_head.weight",
            "multi_modal_projector.linear_1.weight",
            "vision_tower.vision_model.embeddings.position_embedding.weight",
            "vision_tower.vision_model.post_layernorm.weight",
            "image_newline",
        ],
        {"model_type": "llava"},
        {
            "language_model.model.layers.3.norm1.weight": "llm.layers[3]",
            "vision_tower.vision_model.encoder.layers.2.norm1.weight": "vision.layers[2]",
            "language_model.model.embed_tokens.weight": "embed",
            "language_model.model.norm.weight": "norm",
            "language_model.lm_head.weight": "head",
            "multi_modal_projector.linear_1.weight": "connector",
            "vision_tower.vision_model.embeddings.position_embedding.weight": "vision",
            "vision_tower.vision_model.post_layernorm.weight": "vision",
            "image_newline": "connector",
        },
        {"llm": 4, "vision": 3},
    ),
    "llava of the original authors": (
        [
            *blocks("model.layers", 4),
            *blocks("model.vision_tower.vision_tower.vision_model.encoder.layers", 2),
            "model.mm_projector.0.weight",
            "model.mm_projector.2.bias",
            "model.image_newline",
            "model.embed_tokens.weight",
            "lm_head.weight",
        ],
        {},
        {
            "model.mm_projector.2.bias": "connector",
            "model.image_newline": "connector",
            "model.vision_tower.vision_tower.vision_model.encoder.layers.1.norm1.weight": "vision.layers[1]",
            "model.layers.3.norm1.weight": "llm.layers[3]",
        },
        {"llm": 4, "vision": 2},
    ),
    "qwen2-vl as published": (
        [
            *blocks("model.layers", 2),
            *blocks("visual.blocks", 3, "attn.qkv.weight", "mlp.fc1.weight"),
            "visual.merger.mlp.0.weight",
            "visual.merger.ln_q.weight",
            "visual.patch_embed.proj.weight",
            "model.norm.weight",
        ],
        {},
        {
            "visual.blocks.2.attn.qkv.weight": "vision.layers[2]",
            "visual.merger.mlp.0.weight": "connector",
            "visual.merger.ln_q.weight": "connector",
            "visual.patch_embed.proj.weight": "vision",
            "model.norm.weight": "norm",
        },
        {"llm": 2, "vision": 3},
    ),
    "qwen3-vl": (
        [
            *blocks("model.language_model.layers", 2),
            *blocks("model.visual.blocks", 3),
            *blocks("model.visual.deepstack_merger_list", 2, "linear_fc1.weight", "norm.weight"),
            "model.visual.pos_embed.weight",
        ],
        {},
        {
            "model.visual.deepstack_merger_list.1.norm.weight": "connector",
            "model.visual.pos_embed.weight": "vision",
            "model.visual.blocks.0.norm1.weight": "vision.layers[0]",
        },
        {"llm": 2, "vision": 3},
    ),
    "smolvlm": (
        [
            *blocks("model.text_model.layers", 2),
            *blocks("model.vision_model.encoder.layers", 3),
            "model.connector.modality_projection.proj.weight",
            "model.text_model.norm.weight",
            "lm_head.weight",
        ],
        {},
        {"model.connector.modality_projection.proj.weight": "connector", "model.text_model.norm.weight": "norm"},
        {"llm": 2, "vision": 3},
    ),
    "idefics2: a resampler with layers of its own": (
        [
            *blocks("model.text_model.layers", 2),
            *blocks("model.vision_model.encoder.layers", 2),
            *blocks("model.connector.perceiver_resampler.layers", 3),
            "model.connector.perceiver_resampler.latents",
        ],
        {},
        {"model.connector.perceiver_resampler.layers.2.norm1.weight": "connector"},
        {"llm": 2, "vision": 2},
    ),
    "internvl-chat": (
        [
            *blocks("language_model.model.layers", 2),
            *blocks("vision_model.encoder.layers", 3),
            "mlp1.0.weight",
            "mlp1.3.bias",
            "vision_model.embeddings.class_embedding",
        ],
        {},
        {"mlp1.0.weight": "connector", "mlp1.3.bias": "connector", "vision_model.embeddings.class_embedding": "vision"},
        {"llm": 2, "vision": 3},
    ),
    "minicpm-v": (
        [
            *blocks("llm.model.layers", 2),
            *blocks("vpm.encoder.layers", 2),
            "resampler.kv_proj.weight",
            "llm.lm_head.weight",
        ],
        {},
        {"vpm.encoder.layers.1.norm1.weight": "vision.layers[1]", "resampler.kv_proj.weight": "connector"},
        {"llm": 2, "vision": 2},
    ),
    "phi-3-vision": (
        [
            *blocks("model.layers", 3),
            *blocks("model.vision_embed_tokens.img_processor.vision_model.encoder.layers", 2),
            "model.vision_embed_tokens.img_projection.0.weight",
            "model.vision_embed_tokens.sub_GN",
            "model.embed_tokens.weight",
        ],
        {},
        {
            "model.vision_embed_tokens.img_projection.0.weight": "connector",
            "model.vision_embed_tokens.sub_GN": "vision",
            "model.embed_tokens.weight": "embed",
        },
        {"llm": 3, "vision": 2},
    ),
    "mllama: two vision stacks": (
        [
            *blocks("language_model.model.layers", 3),
            *blocks("vision_model.transformer.layers", 4),
            *blocks("vision_model.global_transformer.layers", 2),
            "multi_modal_projector.weight",
        ],
        {},
        {
            "vision_model.transformer.layers.3.norm1.weight": "vision.layers[3]",
            "vision_model.global_transformer.layers.1.norm1.weight": "vision",
            "multi_modal_projector.weight": "connector",
        },
        {"llm": 3, "vision": 4},
    ),
    "blip-2": (
        [
            *blocks("language_model.model.decoder.layers", 2),
            *blocks("vision_model.encoder.layers", 2),
            *blocks("qformer.encoder.layer", 5),
            "query_tokens",
            "language_projection.weight",
        ],
        {},
        {"qformer.encoder.layer.4.norm1.weight": "connector", "query_tokens": "connector"},
        {"llm": 2, "vision": 2},
    ),
    "gemma3n: three towers": (
        [
            *blocks("model.language_model.layers", 2),
            "model.vision_tower.timm_model.blocks.0.0.conv.weight",
            "model.vision_tower.timm_model.blocks.1.0.conv.weight",
            *blocks("model.audio_tower.conformer", 2, *(f"ffw.{i}.weight" for i in range(6))),
            "model.embed_vision.embedding_projection.weight",
            "model.embed_audio.embedding_projection.weight",
            "model.language_model.per_layer_model_projection.weight",
            "model.language_model.embed_tokens_per_layer.weight",
        ],
        {},
        {
            "model.embed_vision.embedding_projection.weight": "connector",
            "model.embed_audio.embedding_projection.weight": "connector",
            "model.language_model.per_layer_model_projection.weight": "llm",
            "model.language_model.embed_tokens_per_layer.weight": "embed",
            "model.audio_tower.conformer.1.ffw.5.weight": "audio.layers[1]",
            "model.vision_tower.timm_model.blocks.1.0.conv.weight": "vision.layers[1]",
        },
        {"llm": 2, "vision": 2, "audio": 2},
    ),
    "a connector of unheard-of name": (
        [*blocks("model.layers", 2), *blocks("vision.blocks", 2), "bridge.weight", "model.rotary_emb.inv_freq"],
        {},
        {"bridge.weight": "connector", "model.rotary_emb.inv_freq": "llm"},
        {"llm": 2, "vision": 2},
    ),
    "a tower behind a numbered wrapper": (
        [*blocks("model.layers", 2), *blocks("vision_towers.0.blocks", 3)],
        {},
        {"vision_towers.0.blocks.2.norm1.weight": "vision.layers[2]"},
        {"llm": 2, "vision": 3},
    ),
    "clip": (
        [
            *blocks("text_model.encoder.layers", 2),
            *blocks("vision_model.encoder.layers", 3),
            "text_model.embeddings.token_embedding.weight",
            "text_model.final_layer_norm.weight",
            "visual_projection.weight",
            "text_projection.weight",
            "logit_scale",
        ],
        {},
        {
            "text_model.encoder.layers.0.norm1.weight": "llm.layers[0]",
            "text_model.embeddings.token_embedding.weight": "embed",
            "text_model.final_layer_norm.weight": "norm",
            "visual_projection.weight": "connector",
            "text_projection.weight": "connector",
            "logit_scale": "connector",
        },
        {"llm": 2, "vision": 3},
    ),
    "vit": (
        [*blocks("vit.encoder.layer", 2), "vit.embeddings.cls_token", "vit.layernorm.weight", "classifier.weight"],
        {"image_size": 224},
        {
            "vit.encoder.layer.1.norm1.weight": "vision.layers[1]",
            "vit.embeddings.cls_token": "vision",
            "vit.layernorm.weight": "vision",
            "classifier.weight": "vision.head",
        },
        {"vision": 2},
    ),
    "a vision tower on its own, named by its config": (
        [*blocks("encoder.layers", 2), "embeddings.patch_embedding.weight", "post_layernorm.weight"],
        {"image_size": 224, "patch_size": 16},
        {"encoder.layers.1.norm1.weight": "vision.layers[1]", "post_layernorm.weight": "vision"},
        {"vision": 2},
    ),
    "beit: a vocabulary of pictures": (
        [*blocks("beit.encoder.layer", 2), "beit.embeddings.cls_token", "classifier.weight"],
        {"image_size": 224, "vocab_size": 8192},
        {"beit.encoder.layer.1.norm1.weight": "vision.layers[1]", "classifier.weight": "vision.head"},
        {"vision": 2},
    ),
    "wav2vec: letters that it hears": (
        [*blocks("wav2vec2.encoder.layers", 2), "wav2vec2.encoder.layer_norm.weight", "lm_head.weight"],
        {"feat_extract_norm": "group", "vocab_size": 32},
        {"wav2vec2.encoder.layers.1.norm1.weight": "audio.layers[1]", "lm_head.weight": "head"},
        {"audio": 2},
    ),
    "yolos: heads that are stacks": (
        [*blocks("vit.encoder.layer", 3), *blocks("bbox_predictor.layers", 2, "weight", "bias")],
        {"image_size": [512, 864], "num_channels": 3},
        {"vit.encoder.layer.1.norm1.weight": "vision.layers[1]", "bbox_predictor.layers.0.weight": "vision"},
        {"vision": 3},
    ),
    "sam: a decoder of masks": (
        [*blocks("vision_encoder.layers", 3), *blocks("mask_decoder.transformer.layers", 2)],
        {"vision_config": {}, "mask_decoder_config": {}},
        {
            "vision_encoder.layers.2.norm1.weight": "vision.layers[2]",
            "mask_decoder.transformer.layers.0.norm1.weight": "vision",
        },
        {"vision": 3},
    ),
    "siglip without its text tower": (
        [*blocks("vision_model.encoder.layers", 2), "classifier.weight"],
        {"vision_config": {}, "text_config": {}},
        {"classifier.weight": "vision.head"},
        {"vision": 2},
    ),
    "visual_bert: a language model by its table": (
        [
            *blocks("visual_bert.encoder.layer", 2),
            "visual_bert.embeddings.word_embeddings.weight",
            "visual_bert.embeddings.visual_projection.weight",
            "cls.predictions.bias",
        ],
        {"vocab_size": 9},
        {
            "visual_bert.encoder.layer.1.norm1.weight": "llm.layers[1]",
            "visual_bert.embeddings.word_embeddings.weight": "embed",
            "visual_bert.embeddings.visual_projection.weight": "connector",
        },
        {"llm": 2},
    ),
    "an encoder with a table of its own": (
        [
            *blocks("model.encoder.layers", 2),
            *blocks("model.decoder.layers", 2),
            "model.encoder.embed_tokens.weight",
            "model.encoder.norm.weight",
            "model.decoder.embed_tokens.weight",
        ],
        {"is_encoder_decoder": True, "vocab_size": 9},
        {
            "model.encoder.embed_tokens.weight": "embed",
            "model.decoder.embed_tokens.weight": "embed",
            "model.encoder.norm.weight": "encoder",
        },
        {"llm": 2, "encoder": 2},
    ),
    "connectors by other names": (
        [
            *blocks("text_model.model.layers", 2),
            *blocks("vision_model.encoder.layers", 3),
            "text_model.model.embed_tokens.weight",
            "image_to_text_projection.x_attn.out_proj.weight",
            "model.embed_tokens_extend.image_embed.img_projection_up.weight",
            "model.embed_tokens_extend.audio_embed.up_proj_for_speech.weight",
            "model.visual_embeddings_table.weight",
            "text_audio_logit_scale",
        ],
        {"vision_config": {}, "text_config": {}},
        {
            "image_to_text_projection.x_attn.out_proj.weight": "connector",
            "model.embed_tokens_extend.image_embed.img_projection_up.weight": "connector",
            "model.embed_tokens_extend.audio_embed.up_proj_for_speech.weight": "connector",
            "model.visual_embeddings_table.weight": "connector",
            "text_audio_logit_scale": "connector",
        },
        {"llm": 2, "vision": 3},
    ),
    "distilbert: a projector that joins nothing": (
        [
            *blocks("distilbert.transformer.layer", 2),
            "distilbert.embeddings.word_embeddings.weight",
            "vocab_transform.weight",
            "vocab_layer_norm.bias",
            "vocab_projector.weight",
        ],
        {"vocab_size": 9},
        {"vocab_transform.weight": "head", "vocab_layer_norm.bias": "head", "vocab_projector.weight": "head"},
        {"llm": 2},
    ),
    "lfm2: a final norm called after the embedding": (
        [*blocks("model.layers", 2), "model.embed_tokens.weight", "model.embedding_norm.weight"],
        {"vocab_size": 9},
        {"model.embedding_norm.weight": "norm", "model.embed_tokens.weight": "embed"},
        {"llm": 2},
    ),
    "granite speech: an encoder beside a language model": (
        [
            *blocks("encoder.layers", 3),
            *blocks("language_model.model.layers", 2),
            "encoder.input_linear.weight",
            "language_model.model.embed_tokens.weight",
            "projector.linear.weight",
        ],
        {"model_type": "granite_speech"},
        {
            "encoder.layers.2.norm1.weight": "encoder.layers[2]",
            "encoder.input_linear.weight": "encoder",
            "language_model.model.layers.1.norm1.weight": "llm.layers[1]",
            "projector.linear.weight": "connector",
        },
        {"llm": 2, "encoder": 3},
    ),
    "spectrograms in patches": (
        [*blocks("encoder.layer", 2), "embeddings.cls_token"],
        {"patch_size": 16, "num_mel_bins": 128},
        {"encoder.layer.1.norm1.weight": "audio.layers[1]", "embeddings.cls_token": "audio"},
        {"audio": 2},
    ),
    "an audio tower on its own, named by its config": (
        [*blocks("layers", 2), "output_proj.weight"],
        {"model_type": "gemma4_audio"},
        {"layers.1.norm1.weight": "audio.layers[1]", "output_proj.weight": "audio"},
        {"audio": 2},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    names, config, expected, layers = FAMILIES[family]
    parts = Parts(names, config)
    assert {name: parts.of(name) for name in expected} == expected
    assert parts.layers == layers
    for tower, count in layers.items():
        stack = {part for part in map(parts.of, names) if part.startswith(f"{tower}.layers")}
        assert stack == {f"{tower}.layers[{i}]" for i in range(count)}
    assert "other" not in {parts.of(name) for name in names}
    assert parts.of("no.such.tensor") == "other"


@pytest.mark.parametrize("number", ["²", pytest.param("1" * 5000, id="long")])
def test_what_is_no_number_is_no_layers(number: str) -> None:
    parts = Parts([f"model.layers.{place}.mlp.up_proj.weight" for place in ("0", "1", number)])
    assert parts.layers == {"llm": 2}


def test_order_of_names_does_not_matter() -> None:
    for names, config, expected, _ in FAMILIES.values():
        backwards = Parts(names[::-1], config)
        assert {name: backwards.of(name) for name in expected} == expected


LLAVA, LLAVA_CONFIG = FAMILIES["llava as llava-hf publishes it"][:2]


def test_names_for_messages() -> None:
    assert Parts(LLAVA, LLAVA_CONFIG).names() == (
        "llm",
        "llm.layers",
        "vision",
        "vision.layers",
        "connector",
        "embed",
        "head",
        "norm",
    )
    assert Parts(*FAMILIES["vit"][:2]).names() == ("vision", "vision.layers", "head")


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("llm.layers[-1]", set(blocks("language_model.model.layers", 4)[-3:])),
        ("connector", {"multi_modal_projector.linear_1.weight", "image_newline"}),
        ("vision", {name for name in LLAVA if name.startswith("vision_tower")}),
        ("llm", {name for name in LLAVA if name.startswith("language_model")}),
        ("head, norm", {"language_model.lm_head.weight", "language_model.model.norm.weight"}),
    ],
)
def test_matcher(expression: str, chosen: set[str]) -> None:
    matches = Parts(LLAVA, LLAVA_CONFIG).matcher(expression)
    assert {name for name in LLAVA if matches(name)} == chosen


@pytest.mark.parametrize("expression", ["audio", "llm.layers[4]", "llm.layers[-5]", "llm.layers[9:]", "other"])
def test_matching_nothing_is_refused(expression: str) -> None:
    with pytest.raises(UsageError, match=r"matches no tensor.*it has llm, .*llm\.layers\[0:4\], vision\.layers\[0:3\]"):
        Parts(LLAVA, LLAVA_CONFIG).matcher(expression)
