"""Elections among a few bf16 experts: the loops made for them write what the torch reference writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge.blending import blend
from ktmerge.recipes.load import parse_recipe

pytest.importorskip("numba")

SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (41, 67),
    "model.layers.0.mlp.down_proj.weight": (3, 7),
    "model.embed_tokens.weight": (5, 9),  # which random drops leave whole
}
BLENDS: list[dict[str, Any]] = [
    {"method": "ties", "density": 0.3},
    {"method": "ties", "density": 0.6, "aggregate": "sum", "lambda": 0.7},
    {"method": "ties", "density": 0.2, "aggregate": "mean", "tie": "plus", "lambda": -1.5},
    {"method": "dare_ties", "density": 0.5, "lambda": 1.3},
    {"method": "dare_ties", "density": 0},
    {"method": "dare_ties", "density": 1},
]


def values(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "coarse":  # few magnitudes: most of an expert's changes are as large as the least that is kept
        return torch.randint(-3, 4, shape, generator=generator) * 2.0**-6
    if kind == "tiny":  # subnormal, and zeros of both signs
        return torch.randint(-9, 10, shape, generator=generator) * 2.0**-130 * -1.0
    return torch.randn(shape, generator=generator) * (1e38 if kind == "huge" else 0.02)


def models(folder: Path, kind: str, number: int) -> None:
    for i in range(number + 1):
        (folder / f"m{i}").mkdir()
        tensors = {
            name: values(kind, shape, 100 * i + place).bfloat16() for place, (name, shape) in enumerate(SHAPES.items())
        }
        save_file(tensors, folder / f"m{i}" / "model.safetensors", metadata={"format": "pt"})
        (folder / f"m{i}" / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))


def outcome(folder: Path, number: int, blend_: dict[str, Any]) -> Any:
    """The stored patterns and what the report says of them, or the error."""
    document = {
        "ktmerge": 1,
        "base": "m0",
        "experts": {f"e{i}": {"model": f"m{i}"} for i in range(1, number + 1)},
        "blend": blend_,
    }
    try:
        report = blend(parse_recipe(document, "test", folder), folder / "out", overwrite=True)
    except UsageError:
        raise
    except KtmergeError as error:
        return str(error)
    stored = load_file(folder / "out" / "model.safetensors")
    patterns = {name: tensor.view(torch.int16).tolist() for name, tensor in stored.items()}
    return patterns, [(one.changed, one.kept, pytest.approx(one.intended, rel=1e-5)) for one in report.tensors]


@pytest.mark.every(45)
@pytest.mark.parametrize("blend_", BLENDS, ids=lambda value: "-".join(map(str, value.values())))
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["plain", "coarse", "tiny", "huge"])
def test_equals_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int, blend_: dict[str, Any]
) -> None:
    models(tmp_path, kind, number)
    found = outcome(tmp_path, number, blend_)
    monkeypatch.setenv("KTMERGE_KERNELS", "reference")
    assert found == outcome(tmp_path, number, blend_)
    assert isinstance(found, str) == (kind == "huge"), found
