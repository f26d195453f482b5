"""Statistics of a model that sees: image and text tokens apart; and of maps in other modules than Linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tuning import write

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.statistics import FISHER, INPUTS, Statistics
from ktmerge.recipes.schema import Statistics as Job
from ktmerge.tuners.statistics import measure

PATCHES = 4
TEXT, VISION = "layers.1.mlp.down_proj.weight", "layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tiny_llava(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of two layers each, images of 4 patches, with its processor."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, image_seq_length=PATCHES,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("seeing") / "llava"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def seeing_rows(folder: Path) -> Path:
    from PIL import Image

    (folder / "pictures").mkdir()
    for number in range(3):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / f"{number}.png")
    rows = [
        {"prompt": f"<image>Is {n} good?", "completion": " yes" * (1 + n), "images": [f"{n}.png"]} for n in range(3)
    ]
    write(folder / "rows.jsonl", [*rows, {"prompt": "Is it good?", "completion": " no"}])
    return folder / "rows.jsonl"


def named(statistics: Statistics, tower: str, leaf: str) -> str:
    return next(name for name in statistics.samples if tower in name and name.endswith(leaf))


def test_image_and_text_tokens_have_samples_of_their_own(tiny_llava: Path, tmp_path: Path) -> None:
    seeing_rows(tmp_path)
    job = Job(data=["rows.jsonl"], images="pictures", dtype="float32", fisher="empirical")
    report = measure(job, tiny_llava, tmp_path / "stats", folder=tmp_path)
    statistics = Statistics.open(tmp_path / "stats")
    text, vision = named(statistics, "language", TEXT), named(statistics, "vision", VISION)
    projector = named(statistics, "projector", "linear_1.weight")
    assert statistics.samples[text] == (text, f"{text}:image")
    assert statistics.samples[vision] == (f"{vision}:image",)
    assert statistics.samples[projector] == (f"{projector}:image",)
    tokens = report.record["tokens"]
    assert tokens[f"{text}:image"] == tokens[f"{projector}:image"] == 3 * PATCHES
    assert tokens[f"{vision}:image"] == 3 * (PATCHES + 1)
    found = load_file(tmp_path / "stats" / INPUTS)
    pixels, given = through_the_model(tiny_llava, tmp_path, text, vision)
    torch.testing.assert_close(found[f"sample/{vision}:image"], pixels, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[f"sample/{text}:image"], given[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[f"sample/{text}"], given[1], rtol=1e-4, atol=1e-5)
    fisher = load_file(tmp_path / "stats" / FISHER)
    assert fisher.keys() == Checkpoint.open(tiny_llava).tensors.keys()
    assert float(fisher[vision].sum()) > 0


def through_the_model(path: Path, folder: Path, text: str, vision: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What two maps are given, by one call of the model for each row: of images, and of image and text tokens."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(path)
    model: Any = AutoModelForImageTextToText.from_pretrained(path).eval()
    captured: dict[str, list[torch.Tensor]] = {"text": [], "vision": []}
    layer = model.model.language_model.layers[1].mlp.down_proj
    first = model.model.vision_tower
    first = getattr(first, "vision_model", first).encoder.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, out: captured["text"].append(args[0][0]))
    first.register_forward_hook(lambda module, args, out: captured["vision"].append(args[0][0]))
    images, texts = [], []
    for n in range(4):
        if n < 3:
            whole = f"<image>Is {n} good?" + " yes" * (1 + n) + "<|im_end|>"
            picture = Image.open(folder / "pictures" / f"{n}.png")
            given = processor(text=[whole], images=[picture], return_tensors="pt")
        else:
            given = processor(text=["Is it good? no<|im_end|>"], return_tensors="pt")
        with torch.no_grad():
            model(**given)
        seen = given["input_ids"][0] == model.config.image_token_id
        images.append(captured["text"][-1][seen])
        texts.append(captured["text"][-1][~seen])
    return torch.cat(captured["vision"]), [torch.cat(images), torch.cat(texts)]


def test_maps_stored_inputs_first_are_measured(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    write(tmp_path / "rows.jsonl", [{"prompt": "Is it good?", "completion": " yes"}])
    measure(Job(data=["rows.jsonl"]), tmp_path / "gpt2", tmp_path / "stats", folder=tmp_path)
    statistics = Statistics.open(tmp_path / "stats")
    assert len(statistics.samples) == 8
    name = next(name for name in statistics.samples if name.endswith("h.0.mlp.c_fc.weight"))
    assert statistics.tensors[f"sample/{name}"].shape[1] == 32
