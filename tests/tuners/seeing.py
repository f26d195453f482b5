"""Tiny models of six families that see, with processors as their publishers configure them, and pictures for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
       "patch_size": 8}  # fmt: skip
QWEN_VIT = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "in_channels": 3, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "out_hidden_size": 32, "intermediate_size": 24, "fullatt_block_indexes": [1],
            "window_size": 16}  # fmt: skip
TURN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    # all images of a turn before its text; takes parts alone, as llava-hf publishes it
    "llava": "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] }}{% endgeneration %}"
    "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    # marks that leave the stop token out, as published
    "llava-onevision": TURN
    + "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if m['role'] != 'assistant' %}{{ '\n' + c['text'] }}"
    "{% else %}{% generation %}{{ '\n' + c['text'] }}{% endgeneration %}{% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}" + ASK,
    "qwen2.5-vl": TURN
    + PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + ASK,
    "smolvlm": "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "internvl": TURN + PARTS.replace("IMAGE", "<IMG_CONTEXT>\n") + "{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
    "paligemma": None,
}
IMAGE_TOKENS = {"qwen2.5-vl": "<|image_pad|>", "internvl": "<IMG_CONTEXT>"}
SPECIAL = {
    "llava": ["<image>"],
    "llava-onevision": ["<image>", "<video>"],
    "qwen2.5-vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "smolvlm": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>",
                "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>"],
    "internvl": ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "paligemma": ["<image>", "<bos>"],
}  # fmt: skip
FAMILIES = tuple(TEMPLATES)


def build(family: str, folder: Path, speaking: Path, seed: int = 0) -> Path:
    """A random model of the family with its processor's files, as found on the hub; the tokenizer is ``speaking``'s."""
    import torch
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(speaking)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[family]})
    if family == "internvl":
        tokenizer._set_model_specific_special_tokens(
            {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}
        )  # fmt: skip
    if family == "smolvlm":
        tokenizer.eos_token = "<end_of_utterance>"
    if family == "paligemma":
        tokenizer.bos_token = "<bos>"
    rows = len(tokenizer) + (1024 + 128 if family == "paligemma" else 0)
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS.get(family, "<image>"))
    text = {
        "vocab_size": rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[family](transformers, text, token)
    model.save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    images, own = _PROCESSORS[family](transformers)
    images.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(own))
    if TEMPLATES[family] is not None:
        (folder / "chat_template.jinja").write_text(TEMPLATES[family])
    return folder


_MODELS: dict[str, Callable[[Any, dict[str, Any], int], Any]] = {
    "llava": lambda t, text, token: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VIT), text_config=t.LlamaConfig(**text), image_token_index=token,
            vision_feature_layer=-1,
        )
    ),
    "llava-onevision": lambda t, text, token: t.LlavaOnevisionForConditionalGeneration(
        t.LlavaOnevisionConfig(
            vision_config=t.SiglipVisionConfig(**VIT, vision_use_head=False), text_config=t.Qwen2Config(**text),
            image_token_index=token, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
            vision_feature_layer=-1, vision_feature_select_strategy="full",
        )
    ),
    "qwen2.5-vl": lambda t, text, token: t.Qwen2_5_VLForConditionalGeneration(
        t.Qwen2_5_VLConfig(
            text_config={**text, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            vision_config=QWEN_VIT, image_token_id=token, video_token_id=token + 1, vision_start_token_id=token - 2,
        )
    ),
    "smolvlm": lambda t, text, token: t.SmolVLMForConditionalGeneration(
        t.SmolVLMConfig(
            text_config=t.LlamaConfig(**text), vision_config=VIT, image_token_id=token, scale_factor=2,
            pad_token_id=text["pad_token_id"],
        )
    ),
    "internvl": lambda t, text, token: t.InternVLForConditionalGeneration(
        t.InternVLConfig(
            text_config=t.Qwen2Config(**text), vision_config={**VIT, "image_size": [16, 16], "patch_size": [8, 8]},
            image_token_id=token, image_seq_length=1,
        )
    ),
    "paligemma": lambda t, text, token: t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(
            text_config=t.GemmaConfig(**text, head_dim=16), vision_config=t.SiglipVisionConfig(**VIT),
            image_token_index=token, projection_dim=32,
        )
    ),
}  # fmt: skip
_SQUARE = {"height": 16, "width": 16}
_PROCESSORS: dict[str, Callable[[Any], tuple[Any, dict[str, Any]]]] = {
    "llava": lambda t: (
        t.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=_SQUARE),
        {"processor_class": "LlavaProcessor", "patch_size": 8, "vision_feature_select_strategy": "default",
         "image_token": "<image>", "num_additional_image_tokens": 1},
    ),
    "llava-onevision": lambda t: (
        t.LlavaOnevisionImageProcessorPil(
            size=_SQUARE, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]]
        ),
        {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 4, "vision_feature_select_strategy": "full",
         "image_token": "<image>", "video_token": "<video>"},
    ),
    "qwen2.5-vl": lambda t: (
        t.Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        ),
        {"processor_class": "Qwen2_5_VLProcessor"},
    ),
    "smolvlm": lambda t: (
        t.SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 1},
    ),
    "internvl": lambda t: (
        t.GotOcr2ImageProcessorPil(size=_SQUARE, crop_to_patches=True, min_patches=1, max_patches=4),
        {"processor_class": "InternVLProcessor", "image_seq_length": 1},
    ),
    "paligemma": lambda t: (
        t.SiglipImageProcessorPil(size=_SQUARE, image_seq_length=4),
        {"processor_class": "PaliGemmaProcessor"},
    ),
}  # fmt: skip


def picture(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Path:
    """A picture of noise, ``size`` as width and height."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
