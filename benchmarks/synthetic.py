"""Checkpoints made on the spot for benchmarks: Qwen2-shaped, bf16, random weights, experts = base + Gaussian noise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

CHUNK = 1 << 22

# Qwen2.5-0.5B's shape, the same with fewer and more layers (two of them tell what one takes), one three times as large
# with larger tensors, and two small ones.
_HALF = {"hidden": 896, "layers": 24, "mlp": 4864, "heads": 14, "kv_heads": 2, "vocabulary": 151936}
SHAPES = {
    "0.17b": _HALF | {"layers": 2},
    "0.25b": _HALF | {"layers": 8},
    "0.5b": _HALF,
    "1b": _HALF | {"layers": 58},
    "1.5b": {"hidden": 1536, "layers": 28, "mlp": 8960, "heads": 12, "kv_heads": 2, "vocabulary": 151936},
    "0.05b": {"hidden": 512, "layers": 8, "mlp": 2048, "heads": 8, "kv_heads": 2, "vocabulary": 32768},
    "tiny": {"hidden": 128, "layers": 2, "mlp": 256, "heads": 4, "kv_heads": 2, "vocabulary": 4096},
}


def make(folder: Path, size: str, experts: int, noise: float = 1e-3) -> tuple[Path, list[Path]]:
    """Write ``folder/base`` and ``folder/expert0`` ..; return their paths. What is there already is kept."""
    base = folder / "base"
    paths = [folder / f"expert{i}" for i in range(experts)]
    tensors = _tensors(**SHAPES[size])
    for seed, path in enumerate([base, *paths]):
        if not (path / "config.json").exists():
            _write(path, tensors, noise if path != base else 0.0, seed)
            (path / "config.json").write_text(json.dumps(_config(**SHAPES[size]), indent=2))
    return base, paths


def count(size: str) -> int:
    """Parameters of a model of that size."""
    return sum(math.prod(shape) for shape in _tensors(**SHAPES[size]).values())


def _tensors(hidden: int, layers: int, mlp: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, list[int]]:
    kv = hidden // heads * kv_heads
    tensors = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for i in range(layers):
        at = f"model.layers.{i}."
        tensors |= {
            f"{at}input_layernorm.weight": [hidden],
            f"{at}mlp.down_proj.weight": [hidden, mlp],
            f"{at}mlp.gate_proj.weight": [mlp, hidden],
            f"{at}mlp.up_proj.weight": [mlp, hidden],
            f"{at}post_attention_layernorm.weight": [hidden],
            f"{at}self_attn.k_proj.bias": [kv],
            f"{at}self_attn.k_proj.weight": [kv, hidden],
            f"{at}self_attn.o_proj.weight": [hidden, hidden],
            f"{at}self_attn.q_proj.bias": [hidden],
            f"{at}self_attn.q_proj.weight": [hidden, hidden],
            f"{at}self_attn.v_proj.bias": [kv],
            f"{at}self_attn.v_proj.weight": [kv, hidden],
        }
    return tensors | {"model.norm.weight": [hidden]}


def _config(hidden: int, layers: int, mlp: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _write(folder: Path, tensors: dict[str, list[int]], noise: float, seed: int) -> None:
    """Base weights come from seed 0 for everyone; an expert adds ``noise`` drawn from its own seed."""
    folder.mkdir(parents=True, exist_ok=True)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            left = int(np.prod(shape))
            while left:
                n = min(left, CHUNK)
                values = common.standard_normal(n, dtype=np.float32) * np.float32(0.02)
                if noise:
                    values += own.standard_normal(n, dtype=np.float32) * np.float32(noise)
                bits = values.view(np.uint32)
                file.write(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes())
                left -= n
