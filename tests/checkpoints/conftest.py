"""Real little safetensors files, written by the reference library or byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

Arrays = Mapping[str, np.ndarray]
MakeCheckpoint = Callable[..., Path]


def arrays(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 arrays of the given shapes; the same for the same seed."""
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(tuple(shape)).astype(np.float32) for name, shape in shapes.items()}


TOY = {
    "model.embed_tokens.weight": (12, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.layers.1.input_layernorm.weight": (4,),
    "model.norm.weight": (4,),
}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """Write a checkpoint folder below ``tmp_path``: one file, or ``shards`` of them with an index."""

    def make(
        name: str = "model",
        tensors: Arrays | None = None,
        *,
        shards: int = 1,
        config: dict[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tensors = arrays(TOY) if tensors is None else tensors
        if shards == 1:
            save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        else:
            weight_map = {}
            for shard, names in enumerate(np.array_split(list(tensors), shards)):
                file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
                save_file({str(key): tensors[str(key)] for key in names}, folder / file, {"format": "pt"})
                weight_map |= {str(key): file for key in names}
            index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(config if config is not None else {"vocab_size": 12}))
        for file, text in (files or {}).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        return folder

    return make


@pytest.fixture
def raw_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a file that may be no safetensors file: any header (an object, or its bytes), any claimed length."""

    def write(header: object, data: bytes = b"", length: int | None = None, name: str = "raw.safetensors") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / name
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        return path

    return write
