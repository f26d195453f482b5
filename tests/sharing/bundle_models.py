"""Models to share, a recipe over them and a suite that scores them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SUITE = """# what to keep, what to learn
ktmerge_suite: 1
name: two-sides
upstream:
  - {name: general, kind: text, data: data/general.jsonl}
downstream:
  - {name: sums, kind: generate, data: data/sums.jsonl, prompt: "{{ q }}", answer: "{{ a }}"}
"""
RECIPE = """# half of what spam learned
ktmerge: 1
name: half-of-spam
description: half of it
base: base
experts:
  spam: {model: spam, weight: 0.5}
blend: {method: linear}
eval: {suite: suite.yaml}
"""


def write_model(folder: Path, seed: int, width: int = 8) -> None:
    """A Llama of three tensors."""
    numbers = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (32, width), "model.layers.0.self_attn.q_proj.weight": (width, width)}
    shapes["model.norm.weight"] = (width,)  # type: ignore[assignment]
    folder.mkdir(parents=True)
    tensors = {key: numbers.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
