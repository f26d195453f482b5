"""Checkpoints of random weights for the merge tests: names and shapes of real families, sizes of toys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def _random(shape: tuple[int, ...], generator: torch.Generator, scale: float = 0.05) -> Tensor:
    values = scale * torch.randn(shape, generator=generator)
    return 1 + values if len(shape) == 1 else values


def _block(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.input_layernorm.weight": (width,),
        f"{prefix}.self_attn.q_proj.weight": (width, width),
        f"{prefix}.self_attn.k_proj.weight": (width // 2, width),
        f"{prefix}.mlp.up_proj.weight": (2 * width, width),
        f"{prefix}.mlp.down_proj.weight": (width, 2 * width),
        f"{prefix}.post_attention_layernorm.weight": (width,),
    }


def llama_tensors(dtype: torch.dtype = torch.bfloat16, layers: int = 2, width: int = 16, seed: int = 0) -> Tensors:
    """A Llama with its head tied to the embedding (and so not stored)."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (48, width)}
    for layer in range(layers):
        shapes |= _block(f"model.layers.{layer}", width)
    shapes["model.norm.weight"] = (width,)
    return {name: _random(shape, generator).to(dtype) for name, shape in shapes.items()}


def llava_tensors(naming: str = "published", *, buffers: bool = True) -> Tensors:
    """A LLaVA, named as llava-hf ``published`` it, as transformers 5 ``saved`` it, or as its ``modules`` are called."""
    vision = {"published": "vision_tower.vision_model", "saved": "vision_tower", "modules": "model.vision_tower"}[
        naming
    ]
    projector = "model.multi_modal_projector" if naming == "modules" else "multi_modal_projector"
    text = "model.language_model" if naming == "modules" else "language_model.model"
    head = "lm_head.weight" if naming == "modules" else "language_model.lm_head.weight"
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}.embeddings.class_embedding": (8,),
        f"{vision}.embeddings.patch_embedding.weight": (8, 3, 4, 4),
        f"{vision}.embeddings.position_embedding.weight": (5, 8),
        f"{vision}.pre_layrnorm.weight": (8,),
    }
    for layer in range(2):
        shapes |= {
            f"{vision}.encoder.layers.{layer}.self_attn.q_proj.weight": (8, 8),
            f"{vision}.encoder.layers.{layer}.self_attn.q_proj.bias": (8,),
            f"{vision}.encoder.layers.{layer}.mlp.fc1.weight": (16, 8),
        }
    shapes |= {f"{projector}.linear_1.weight": (12, 8), f"{projector}.linear_1.bias": (12,)}
    shapes[f"{text}.embed_tokens.weight"] = (40, 12)
    for layer in range(3):
        shapes |= _block(f"{text}.layers.{layer}", 12)
    shapes |= {f"{text}.norm.weight": (12,), head: (40, 12)}
    generator = torch.Generator().manual_seed(5)
    tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
    if buffers and naming == "published":
        tensors[f"{vision}.embeddings.position_ids"] = torch.arange(5).unsqueeze(0)
    return tensors


def tuned(base: Mapping[str, Tensor], scale: float, seed: int, frozen: Iterable[str] = ()) -> Tensors:
    """The base moved by noise of size ``scale``, in its own types; tensors whose names hold one of ``frozen`` stay."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, values in base.items():
        noise = scale * torch.randn(values.shape, generator=generator)
        stays = not values.is_floating_point() or any(part in name for part in frozen)
        moved[name] = values.clone() if stays else (values.float() + noise).to(values.dtype)
    return moved


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    files: Mapping[str, str] | None = None,
    shards: int = 1,
) -> Path:
    """Write a checkpoint folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    else:
        index = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[shard::shards]}
            save_file(part, folder / file, {"format": "pt"})
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file, text in (files or {}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


class Model(nn.Module):
    """Parameters by the checkpoint's names."""

    def __init__(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        for name, values in tensors.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(values.to(dtype), requires_grad=False))

    def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {name.replace("/", "."): values for name, values in super().state_dict().items()}


def read(folder: Path) -> Tensors:
    """Every tensor of a checkpoint folder."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Float32 noise; the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal within a share of the largest value expected, in float64."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Equal type, shape and bits: tells a negative zero from zero."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return bool(torch.equal(*flat))
