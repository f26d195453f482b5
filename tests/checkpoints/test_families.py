"""Real models of many families, tiny and random: what transformers saves is classified, parted, aligned and verified.

The oracle is the model itself: its modules say what each tensor is, and its in-memory names are a second naming.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loadable import assert_loads_whole
from safetensors.torch import load_file, save_file

from ktmerge.checkpoints.alignment import align
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.classes import tensor_class
from ktmerge.checkpoints.parts import Parts
from ktmerge.checkpoints.writer import Writer
from ktmerge.errors import UsageError

TEXT = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
BERT = {name: TEXT[name] for name in list(TEXT)[:5]}
QWEN_VIT = {
    "depth": 3,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
OUT = {"out_hidden_size": 16, "intermediate_size": 24}
Build = Callable[[Any], Any]  # from the transformers module to a model

LLAVA: Build = lambda t: t.LlavaForConditionalGeneration(  # noqa: E731
    t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VIT, projection_dim=16),
        text_config=t.LlamaConfig(**TEXT),
        image_token_index=5,
    )
)

# name: (how to build it, its layers)
FAMILIES: dict[str, tuple[Build, dict[str, int]]] = {
    "llama": (lambda t: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)), {"llm": 2}),
    "llama tied": (lambda t: t.LlamaForCausalLM(t.LlamaConfig(**TEXT, tie_word_embeddings=True)), {"llm": 2}),
    "gpt2": (
        lambda t: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
        {"llm": 2},
    ),
    "gpt-oss": (
        lambda t: t.GptOssForCausalLM(
            t.GptOssConfig(**TEXT, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2)
        ),
        {"llm": 2},
    ),
    "mamba": (
        lambda t: t.MambaForCausalLM(t.MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, state_size=4)),
        {"llm": 2},
    ),
    "bert": (lambda t: t.BertForMaskedLM(t.BertConfig(**BERT)), {"llm": 2}),
    "t5": (
        lambda t: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2)
        ),
        {"llm": 3, "encoder": 2},
    ),
    "llava": (LLAVA, {"llm": 2, "vision": 3}),
    "llava-next": (
        lambda t: t.LlavaNextForConditionalGeneration(
            t.LlavaNextConfig(
                vision_config=t.CLIPVisionConfig(**VIT, projection_dim=16),
                text_config=t.LlamaConfig(**TEXT),
                image_token_index=5,
                image_grid_pinpoints=[[16, 16]],
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "llava-onevision": (
        lambda t: t.LlavaOnevisionForConditionalGeneration(
            t.LlavaOnevisionConfig(
                vision_config=t.SiglipVisionConfig(**VIT), text_config=t.Qwen2Config(**TEXT), image_token_index=5
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "qwen2-vl": (
        lambda t: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(text_config={**TEXT, "rope_scaling": ROPE}, vision_config={**QWEN_VIT, "embed_dim": 16})
        ),
        {"llm": 2, "vision": 3},
    ),
    "qwen2.5-vl": (
        lambda t: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(
                text_config={**TEXT, "rope_scaling": ROPE},
                vision_config={**QWEN_VIT, **OUT, "fullatt_block_indexes": [1]},
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "qwen3-vl": (
        lambda t: t.Qwen3VLForConditionalGeneration(
            t.Qwen3VLConfig(
                text_config={**TEXT, "head_dim": 8, "rope_scaling": ROPE},
                vision_config={
                    **QWEN_VIT,
                    **OUT,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0, 1],
                },
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "qwen3-vl-moe": (
        lambda t: t.Qwen3VLMoeForConditionalGeneration(
            t.Qwen3VLMoeConfig(
                text_config={**TEXT, **MOE, "head_dim": 8, "rope_scaling": ROPE},
                vision_config={
                    **QWEN_VIT,
                    **OUT,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0, 1, 2],
                },
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "qwen3.5-vl": (
        lambda t: t.Qwen3_5ForConditionalGeneration(
            t.Qwen3_5Config(
                text_config={
                    **TEXT,
                    "head_dim": 8,
                    "rope_parameters": {**ROPE, "rope_theta": 1e4},
                    "layer_types": ["linear_attention", "full_attention"],
                    "linear_num_value_heads": 2,
                    "linear_num_key_heads": 2,
                    "linear_key_head_dim": 8,
                    "linear_value_head_dim": 8,
                },
                vision_config={**QWEN_VIT, **OUT, "num_position_embeddings": 16},
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "qwen3": (lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, head_dim=8)), {"llm": 2}),
    "whisper": (
        lambda t: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                vocab_size=99,
                d_model=16,
                encoder_layers=2,
                decoder_layers=3,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                num_mel_bins=8,
                max_source_positions=16,
                max_target_positions=12,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        {"llm": 3, "encoder": 2},
    ),
    "smolvlm": (
        lambda t: t.SmolVLMForConditionalGeneration(
            t.SmolVLMConfig(text_config=t.LlamaConfig(**TEXT), vision_config=VIT, image_token_id=5, scale_factor=2)
        ),
        {"llm": 2, "vision": 3},
    ),
    "idefics3": (
        lambda t: t.Idefics3ForConditionalGeneration(
            t.Idefics3Config(text_config=t.LlamaConfig(**TEXT), vision_config=VIT, image_token_id=5, scale_factor=2)
        ),
        {"llm": 2, "vision": 3},
    ),
    "paligemma": (
        lambda t: t.PaliGemmaForConditionalGeneration(
            t.PaliGemmaConfig(
                text_config=t.GemmaConfig(**TEXT, head_dim=8),
                vision_config=t.SiglipVisionConfig(**VIT),
                image_token_index=5,
                projection_dim=16,
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "gemma3": (
        lambda t: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                text_config=t.Gemma3TextConfig(**TEXT, head_dim=8),
                vision_config=t.SiglipVisionConfig(**VIT),
                image_token_index=5,
                mm_tokens_per_image=4,
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "gemma4": (
        lambda t: t.Gemma4ForConditionalGeneration(
            t.Gemma4Config(
                text_config={
                    **TEXT,
                    "head_dim": 8,
                    "global_head_dim": 8,
                    "layer_types": ["sliding_attention", "full_attention"],
                    "hidden_size_per_layer_input": 4,
                    "vocab_size_per_layer_input": 99,
                    "num_kv_shared_layers": 0,
                },
                vision_config={**VIT, "head_dim": 8, "patch_size": 4},
                audio_config={
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "output_proj_dims": 16,
                    "subsampling_conv_channels": [4, 4],
                },
            )
        ),
        {"llm": 2, "vision": 3, "audio": 2},
    ),
    "internvl": (
        lambda t: t.InternVLForConditionalGeneration(
            t.InternVLConfig(
                text_config=t.Qwen2Config(**TEXT),
                vision_config={**VIT, "image_size": [16, 16], "patch_size": [8, 8]},
                image_token_id=5,
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "mistral3": (
        lambda t: t.Mistral3ForConditionalGeneration(
            t.Mistral3Config(
                text_config=t.MistralConfig(**TEXT), vision_config=t.PixtralVisionConfig(**VIT), image_token_index=5
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "blip-2": (
        lambda t: t.Blip2ForConditionalGeneration(
            t.Blip2Config(
                vision_config=VIT,
                qformer_config={**BERT, "encoder_hidden_size": 16},
                text_config=t.OPTConfig(
                    vocab_size=99,
                    hidden_size=16,
                    ffn_dim=24,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    word_embed_proj_dim=16,
                    max_position_embeddings=32,
                ),
                num_query_tokens=4,
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "clip": (
        lambda t: t.CLIPModel(
            t.CLIPConfig(
                text_config=t.CLIPTextConfig(**BERT, projection_dim=16).to_dict(),
                vision_config=t.CLIPVisionConfig(**VIT, projection_dim=16).to_dict(),
                projection_dim=16,
            )
        ),
        {"llm": 2, "vision": 3},
    ),
    "clip vision": (lambda t: t.CLIPVisionModel(t.CLIPVisionConfig(**VIT)), {"vision": 3}),
    "resnet": (
        lambda t: t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        {"vision": 2},
    ),
    "qwen2-audio": (
        lambda t: t.Qwen2AudioForConditionalGeneration(
            t.Qwen2AudioConfig(
                audio_config={
                    "d_model": 16,
                    "encoder_layers": 2,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 24,
                    "num_mel_bins": 8,
                    "max_source_positions": 16,
                },
                text_config=t.Qwen2Config(**TEXT).to_dict(),
                audio_token_index=5,
            )
        ),
        {"llm": 2, "audio": 2},
    ),
}
FAST = ("llama tied", "gpt2", "t5", "llava", "qwen2.5-vl", "resnet")


def build(family: str, folder: Path) -> Any:
    """Save the family's model as transformers saves it; return the model."""
    import transformers

    torch.manual_seed(0)
    model = FAMILIES[family][0](transformers)
    model.save_pretrained(folder)
    return model


def save_under_memory_names(model: Any, folder: Path) -> Checkpoint:
    folder.mkdir()
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied head is stored once
            state[name] = tensor.clone()
            seen.add(tensor.data_ptr())
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return Checkpoint.open(folder)


def classes_by_module(model: Any) -> dict[str, str]:
    """What the modules say: name in memory -> class, where a module of torch or a usual norm says it."""
    found: dict[str, str] = {name: "buffer" for name, _ in model.named_buffers()}
    for path, module in model.named_modules():
        kind = type(module).__name__
        weight = f"{path}.weight"
        if isinstance(module, torch.nn.Embedding):
            found[weight] = "embed"
        elif isinstance(module, torch.nn.Linear) or kind == "Conv1D":
            found[weight] = "matrix"
        elif isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
            found[weight] = "conv"
        elif "norm" in kind.lower():
            found[weight] = "vector"
        found[f"{path}.bias"] = "vector"
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in model.named_modules():
        if module is output:
            found[f"{path}.weight"] = "embed"
    return found


def check_family(family: str, tmp_path: Path) -> None:
    model = build(family, tmp_path / "saved")
    saved = Checkpoint.open(tmp_path / "saved")
    memory = save_under_memory_names(model, tmp_path / "memory")

    alignment = align(saved, memory, "memory")
    alignment.require_complete()
    values, others = load_file(saved.root / "model.safetensors"), load_file(memory.root / "model.safetensors")
    for name, found in alignment.mapping.items():
        assert torch.equal(values[name], others[found]), (name, found)
    back = align(memory, saved, "saved")
    back.require_complete()

    expected = classes_by_module(model)
    for name, info in saved.tensors.items():
        there = expected.get(alignment.mapping.get(name, name))
        if there is not None:
            assert tensor_class(name, info, saved.config) == there, name

    parts, their_parts = Parts(saved), Parts(memory)
    assert parts.layers == FAMILIES[family][1]
    for name in saved.tensors:
        assert parts.of(name) != "other", name
        assert parts.of(name) == their_parts.of(alignment.mapping[name]), name
    if {"llm", "vision"} <= parts.layers.keys():
        assert {"connector", "embed"} <= set(parts.names())

    assert_loads_whole(saved.root)


@pytest.mark.every(3)
@pytest.mark.parametrize("family", FAST)
def test_usual_families(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FAST])
def test_many_families(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "llava"
    build("llava", folder)
    return folder


def as_published(saved: Path, folder: Path) -> Path:
    """The same LLaVA under the names llava-hf publishes."""
    folder.mkdir()
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(saved / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(saved / "config.json", folder)
    return folder


@pytest.mark.slow
def test_llava_under_both_names(llava: Path, tmp_path: Path) -> None:
    saved, published = Checkpoint.open(llava), Checkpoint.open(as_published(llava, tmp_path / "published"))
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in published.tensors
    for base, other in ((saved, published), (published, saved)):
        alignment = align(base, other, "expert")
        alignment.require_complete()
        assert len(alignment.mapping) == len(base.tensors)
        assert len(alignment.renamed) == sum(name.startswith("vision_tower") for name in base.tensors)
        for name, found in alignment.mapping.items():
            assert Parts(base).of(name) == Parts(other).of(found)
    assert_loads_whole(published.root)

    with Writer(tmp_path / "out") as writer, saved.reader() as reader:
        writer.plan_like(published)
        for name, found in align(published, saved, "expert").mapping.items():
            writer.write(name, reader.read(found))
        writer.copy_files(published)
    assert Checkpoint.open(tmp_path / "out").content_digest() == published.content_digest()
    assert_loads_whole(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        # Experts are stacked in memory and saved one by one.
        (
            lambda t: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=4)),
            r"lacks 26 of the base's tensors: .*experts\.0\.w1\.weight.* has 6 that the base lacks",
        ),
        # In memory other leaves, other blocks.
        (
            lambda t: t.ViTForImageClassification(t.ViTConfig(**VIT, num_labels=3)),
            r"lacks 48 of the base's tensors: vit\.encoder\.layer\.0\..* has 48 that the base lacks",
        ),
    ],
)
def test_what_is_converted_on_loading_is_refused_not_guessed(tmp_path: Path, build: Build, reason: str) -> None:
    import transformers

    model = build(transformers)
    model.save_pretrained(tmp_path / "saved")
    memory = save_under_memory_names(model, tmp_path / "memory")
    with pytest.raises(UsageError, match=reason):
        align(Checkpoint.open(tmp_path / "saved"), memory, "memory").require_complete()
