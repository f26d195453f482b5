"""LoRA extraction: what comes out is loaded by PEFT and by ktmerge, and holds what the report says it holds."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from merge_models import Tensors, llama_tensors, read, write

from ktmerge.cli import main
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge import blend
from ktmerge.merge.extraction import extract_lora

CONFIG = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 48, "architectures": ["LlamaForCausalLM"]}


def moved(base: Tensors, rank: int, rest: float = 0.0) -> Tensors:
    """Every projection moved by so many directions; everything else by noise."""
    generator = torch.Generator().manual_seed(3)
    out = {}
    for name, values in base.items():
        change = rest * torch.randn(values.shape, generator=generator)
        if "_proj" in name:
            left, right = (torch.randn(size, rank, generator=generator) for size in values.shape)
            change = 0.01 * left @ right.T
        out[name] = values + change
    return out


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Tensors, Tensors]:
    base = llama_tensors(torch.float32)
    tuned = moved(base, 3)
    write(tmp_path / "base", base, CONFIG)
    write(tmp_path / "tuned", tuned, CONFIG)
    return tmp_path, base, tuned


def test_a_change_of_low_rank_comes_back_through_ktmerge(pair: tuple[Path, Tensors, Tensors], recipe_in: Any) -> None:
    folder, _, tuned = pair
    found = extract_lora(folder / "base", folder / "tuned", folder / "adapter", rank=8)
    assert found.share == pytest.approx(1, abs=1e-6)
    assert {one.rank for one in found.tensors} == {3}
    blend(recipe_in(folder, {"a": ("adapter", 1.0)}, {"method": "linear", "lambda": 1}), folder / "out", device="cpu")
    stored = read(folder / "out")
    for name, values in tuned.items():
        torch.testing.assert_close(stored[name], values, rtol=0, atol=2e-6)


def test_shares_are_those_of_the_largest_singular_values(pair: tuple[Path, Tensors, Tensors]) -> None:
    folder, base, _ = pair
    tuned = moved(base, 6, rest=0.003)
    write(folder / "further", tuned, CONFIG)
    found = extract_lora(folder / "base", folder / "further", folder / "adapter", rank=2)
    energies, kept = 0.0, 0.0
    for one in found.tensors:
        delta = (tuned[one.name] - base[one.name]).double().numpy()
        energies += (delta**2).sum()
        assert one.energy == pytest.approx((delta**2).sum(), rel=1e-6)
        if "_proj" in one.name:
            s = np.linalg.svd(delta, compute_uv=False)
            assert one.rank == 2
            assert one.kept == pytest.approx((s[:2] ** 2).sum(), rel=1e-5)
            kept += (s[:2] ** 2).sum()
        else:
            assert (one.rank, one.kept) == (0, 0.0)
    assert len(found.tensors) == len(base)
    assert found.share == pytest.approx(kept / energies, rel=1e-5)
    columns, rows, _ = found.table()
    assert all(len(row) == len(columns) for row in rows)
    assert "not in it" in {row[2] for row in rows}
    assert json.loads(json.dumps(found.to_json()))["share"] == pytest.approx(found.share, rel=1e-4)


def test_ranks_by_rule_differ_from_layer_to_layer(pair: tuple[Path, Tensors, Tensors], recipe_in: Any) -> None:
    folder, base, tuned = pair
    for name in tuned:
        if "down_proj" in name:
            tuned[name] = base[name] + 0.01 * torch.eye(16, 32)
    write(folder / "uneven", tuned, CONFIG)
    found = extract_lora(folder / "base", folder / "uneven", folder / "adapter", rule="energy", share=0.9999)
    assert {one.rank for one in found.tensors if "down_proj" in one.name} == {16}
    recipe = recipe_in(folder, {"a": ("adapter", 1.0)}, {"method": "linear", "lambda": 1})
    blend(recipe, folder / "out", device="cpu")
    stored = read(folder / "out")
    for name, values in tuned.items():
        torch.testing.assert_close(stored[name], values, rtol=0, atol=1e-2 * float((values - base[name]).abs().max()))


def model_of(kind: str) -> Any:
    if kind == "gpt2":  # weights stored inputs first; the fused projection is not square, the output one is
        config: Any = transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_it_and_gives_the_tuned_model(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = model_of(kind)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, values in model.named_parameters():
            if (
                values.ndim == 2
                and "wte" not in name
                and "wpe" not in name
                and "embed" not in name
                and "head" not in name
            ):
                values += 0.02 * torch.randn_like(values)
    model.save_pretrained(tmp_path / "tuned")
    found = extract_lora(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=64)
    assert found.share == pytest.approx(1, abs=1e-6)
    fresh = type(model).from_pretrained(tmp_path / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", _refuse_missing)
        folded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload(safe_merge=True)
    merged = folded.state_dict()
    for name, values in model.state_dict().items():
        torch.testing.assert_close(merged[name], values, rtol=0, atol=2e-6)


def _refuse_missing(message: Any, *_: Any, **__: Any) -> None:
    assert "missing" not in str(message).lower()


def test_refusals(pair: tuple[Path, Tensors, Tensors]) -> None:
    folder, *_ = pair
    with pytest.raises(UsageError, match="nothing to put into"):
        extract_lora(folder / "base", folder / "base", folder / "adapter")
    assert not (folder / "adapter").exists()
    with pytest.raises(UsageError, match="rank of 0"):
        extract_lora(folder / "base", folder / "tuned", folder / "adapter", rank=0)
    (folder / "there").mkdir()
    (folder / "there" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        extract_lora(folder / "base", folder / "tuned", folder / "there")


def test_the_command_says_what_it_kept(pair: tuple[Path, Tensors, Tensors], capsys: Any) -> None:
    folder, *_ = pair
    models = [str(folder / "base"), str(folder / "tuned")]
    with pytest.raises(SystemExit) as stop:
        main(["extract-lora", *models, "--energy", "0.5", "--out", str(folder / "adapter"), "--json"])
    assert stop.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert 0.5 <= told["share"] < 1
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


def test_its_files_are_like_others_and_a_full_disk_is_told(
    pair: tuple[Path, Tensors, Tensors],
) -> None:
    folder, *_ = pair
    (folder / "base" / "config.json").write_text(json.dumps({**CONFIG, "architectures": 5}))
    extract_lora(folder / "base", folder / "tuned", folder / "adapter")
    (folder / "plain").touch()
    modes = {path.stat().st_mode for path in (folder / "adapter").iterdir()}
    assert modes == {(folder / "plain").stat().st_mode}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(KtmergeError, match="raise the limit"):
            extract_lora(folder / "base", folder / "tuned", folder / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in folder.iterdir() if "other" in path.name]
