"""The real command line, and models for it to blend."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ktmerge import cli

RECIPE = """
ktmerge: 1
name: two-tasks
base: base
experts:
  a: {model: a, weight: 0.6}
  b: {model: b, weight: 0.4}
blend:
  method: ties
  density: 0.3
  scope: global
  where:
    - {match: "*.layers.0.*", keep: base}
    - {part: norm, method: linear}
output: {rounding: stochastic}
seed: 3
"""


TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2}, "merges": [["a", "b"], "b a"]},
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
    "normalizer": None,
}


def command(*arguments: object) -> list[str]:
    """``ktmerge`` with arguments, as a list for `subprocess`."""
    return [sys.executable, "-m", "ktmerge", *map(str, arguments)]


def ktmerge(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run ``ktmerge`` and expect an exit code, and no traceback."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == code, f"{arguments} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_models(folder: Path, width: int, layers: int, shards: int) -> None:
    """A Llama in bfloat16 as ``base``, two fine-tunes of it as ``a`` and ``b``, and ``recipe.yaml``."""
    numbers = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (4 * width, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (width, width),
            f"{prefix}.mlp.up_proj.weight": (4 * width, width),
            f"{prefix}.mlp.down_proj.weight": (width, 4 * width),
            f"{prefix}.input_layernorm.weight": (width,),
        }
    shapes["model.norm.weight"] = (width,)
    start = {name: numbers.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 4 * width, "dtype": "bfloat16"}
    for name in ("base", "a", "b"):
        moved = start
        if name != "base":
            moved = {
                key: values + np.float32(0.02) * numbers.standard_normal(values.shape, np.float32)
                for key, values in start.items()
            }
        tensors = {key: torch.from_numpy(values).bfloat16() for key, values in moved.items()}
        write_shards(folder / name, tensors, shards)
        (folder / name / "config.json").write_text(json.dumps(config))
        (folder / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "recipe.yaml").write_text(RECIPE)


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    folder.mkdir(parents=True)
    names = list(tensors)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def blend(folder: Path, out: Path, *arguments: str) -> int:
    """Run ``ktmerge blend`` over the folder's recipe in this process; the exit code."""
    return cli._exit_code(
        ["blend", "-r", str(folder / "recipe.yaml"), "--out", str(out), "--device", "cpu", *arguments]
    )


def check_refused(folder: Path, out: Path, expected: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> None:
    """A blend fails with one of ktmerge's own errors, which says what is expected."""
    capsys.readouterr()
    found = blend(folder, out)
    said = capsys.readouterr().err
    assert found in ((code,) if code else (1, 2)), said
    assert re.search(expected, said), said
    assert "Traceback" not in said
