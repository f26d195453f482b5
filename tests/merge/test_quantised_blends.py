"""Blends of quantised models: refused with the reason, or read as the numbers they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import Tensors, llama_tensors, read, same_bytes, write

from ktmerge.errors import UsageError
from ktmerge.merge import blend
from ktmerge.merge.planning import plan_blend

WHOLE = {"method": "linear", "lambda": 1}
CONFIG = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 48, "dtype": "bfloat16"}


def quantised(folder: Path, tensors: Tensors) -> Tensors:
    """Write the matrices in FP8 with a scale a row; what they stand for, in float32."""
    stored, meant = {}, {}
    for name, values in tensors.items():
        stored[name] = meant[name] = values
        if "_proj" in name:
            scale = values.float().abs().amax(1, keepdim=True) / 448
            stored[name], stored[f"{name}_scale"] = (values.float() / scale).to(torch.float8_e4m3fn), scale
            meant[name] = stored[name].float() * scale
    write(folder, stored, {**CONFIG, "quantization_config": {"quant_method": "fbgemm_fp8"}}, shards=2)
    return meant


def test_quantised_inputs_are_refused_by_name(tmp_path: Path, recipe_in: Any) -> None:
    quantised(tmp_path / "q", llama_tensors())
    write(tmp_path / "plain", llama_tensors(), CONFIG)
    with pytest.raises(UsageError, match=r"experts\.a: its weights are quantised by FP8.*'dequantise: true'"):
        plan_blend(recipe_in(tmp_path, {"a": ("q", 1.0)}, WHOLE, base="plain"))
    with pytest.raises(UsageError, match=r"^base: \d+ tensors are quantised by FP8 .*'dequantise: true'"):
        plan_blend(recipe_in(tmp_path, {"a": ("q", 1.0)}, WHOLE, base="q"))


def test_nobody_is_sent_to_dequantise_what_cannot_be(tmp_path: Path, recipe_in: Any) -> None:
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    write(tmp_path / "q", packed, {**CONFIG, "quantization_config": {"quant_method": "gptq"}})
    write(tmp_path / "plain", llama_tensors(), CONFIG)
    for base, expert in (("plain", "q"), ("q", "plain")):
        with pytest.raises(UsageError, match=r"quantised by GPTQ.*Give the unquantised model[.,]") as refused:
            plan_blend(recipe_in(tmp_path, {"a": (expert, 1.0)}, WHOLE, base=base))
        assert "dequantise" not in str(refused.value)


def test_a_quantised_expert_is_dequantised_when_asked(tmp_path: Path, recipe_in: Any) -> None:
    meant = quantised(tmp_path / "q", llama_tensors(seed=1))
    write(tmp_path / "plain", llama_tensors(), CONFIG)
    recipe = recipe_in(tmp_path, {"a": ("q", 1.0)}, WHOLE, base="plain", dequantise=True)
    report = blend(recipe, tmp_path / "out", device="cpu")
    for name, values in read(tmp_path / "out").items():
        assert same_bytes(values, meant[name].bfloat16())
    assert any("a: its FP8 weights are dequantised" in note for note in report.notes)


def test_a_quantised_base_gives_an_unquantised_output(tmp_path: Path, recipe_in: Any) -> None:
    meant = quantised(tmp_path / "q", llama_tensors())
    write(tmp_path / "plain", llama_tensors(), CONFIG)
    still = {"method": "linear", "lambda": 0}
    recipe = recipe_in(tmp_path, {"a": ("plain", 1.0)}, still, base="q", dequantise=True)
    blend(recipe, tmp_path / "out", device="cpu")
    stored = read(tmp_path / "out")
    assert stored.keys() == meant.keys()
    assert all(same_bytes(values, meant[name].bfloat16()) for name, values in stored.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
