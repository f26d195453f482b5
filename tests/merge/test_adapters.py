"""Blends whose experts are PEFT adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import llama_tensors, read, same_bytes, write
from safetensors.torch import load_file, save_file

from ktmerge.checkpoints.digests import input_files
from ktmerge.checkpoints.opening import open_model
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.merge import blend, inspect
from ktmerge.merge.planning import plan_blend

WHOLE = {"method": "linear", "lambda": 1}


def lora(
    folder: Path, shapes: dict[str, tuple[int, ...]], rank: int = 3, alpha: float = 6.0
) -> dict[str, torch.Tensor]:
    """Write an adapter of random factors over the weights of these names; the deltas they make, in float64."""
    generator = torch.Generator().manual_seed(7)
    factors, deltas = {}, {}
    for name, (outputs, inputs) in shapes.items():
        a = 0.1 * torch.randn(rank, inputs, generator=generator)
        b = 0.1 * torch.randn(outputs, rank, generator=generator)
        module = name.removesuffix(".weight")
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        deltas[name] = alpha / rank * (b.double() @ a.double())
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "/elsewhere/llama"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A bfloat16 Llama ``base`` and an ``adapter`` of half its matrices; the deltas."""
    tensors = llama_tensors()
    config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 48, "dtype": "bfloat16"}
    write(tmp_path / "base", tensors, config, shards=2)
    shapes = {name: tuple(values.shape) for name, values in tensors.items() if "_proj" in name and "layers.0" in name}
    return tmp_path, lora(tmp_path / "adapter", shapes)


@pytest.mark.parametrize("model", ["adapter", "base+adapter"])
def test_lambda_1_is_the_folded_model(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any, tmp_path: Path, model: str
) -> None:
    folder, deltas = adapted
    recipe = recipe_in(folder, {"a": (model, 1.0)}, WHOLE, output={"dtype": "float32"})
    blend(recipe, tmp_path / "out", device="cpu")
    stored, base = read(tmp_path / "out"), read(folder / "base")
    for name, values in stored.items():
        if name in deltas:
            assert torch.allclose(values, (base[name].double() + deltas[name]).float(), rtol=0, atol=1e-7)
        else:
            assert values.equal(base[name].float())


def test_untouched_tensors_stay_and_folded_ones_are_rounded_once(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any, tmp_path: Path
) -> None:
    folder, deltas = adapted
    report = blend(recipe_in(folder, {"a": ("adapter", 1.0)}, WHOLE), tmp_path / "out", device="cpu")
    stored, base = read(tmp_path / "out"), read(folder / "base")
    for name, values in stored.items():
        if name in deltas:
            assert values.equal((base[name].double() + deltas[name]).float().bfloat16())
        else:
            assert same_bytes(values, base[name])
    assert any(
        "a: a LoRA adapter, folded into 4 tensors of base" in note and "'llama'" in note for note in report.notes
    )
    assert "/elsewhere" not in (tmp_path / "out" / "ktmerge.json").read_text()


def test_a_kept_part_of_an_adapter_is_its_folded_weights(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any, tmp_path: Path
) -> None:
    folder, deltas = adapted
    rules = [{"part": "llm.layers[0]", "keep": "a"}]
    blend(
        recipe_in(folder, {"a": ("adapter", 1.0)}, {"method": "ties", "where": rules}), tmp_path / "out", device="cpu"
    )
    stored, base = read(tmp_path / "out"), read(folder / "base")
    for name, delta in deltas.items():
        assert stored[name].equal((base[name].double() + delta).float().bfloat16())


def test_an_adapter_and_a_whole_model_in_one_blend(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any, tmp_path: Path
) -> None:
    folder, _ = adapted
    blend(recipe_in(folder, {"a": ("adapter", 1.0)}, WHOLE, output={"dtype": "float32"}), tmp_path / "folded")
    ties = {"method": "ties", "density": 0.4}
    experts = [{"a": (name, 1.0), "b": ("base", 0.5)} for name in ("adapter", str(tmp_path / "folded"))]
    for number, given in enumerate(experts):
        blend(recipe_in(folder, given, ties), tmp_path / f"out{number}", device="cpu")
    first, second = read(tmp_path / "out0"), read(tmp_path / "out1")
    assert all(same_bytes(values, second[name]) for name, values in first.items())


def test_an_adapter_over_the_base_changes_what_the_others_are_measured_against(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any, tmp_path: Path
) -> None:
    folder, deltas = adapted
    recipe = recipe_in(folder, {"a": ("base", 1.0)}, {"method": "linear", "lambda": 0}, base="base+adapter")
    blend(recipe, tmp_path / "out", device="cpu")
    base = read(folder / "base")
    for name, values in read(tmp_path / "out").items():
        wanted = (base[name].double() + deltas[name]).float().bfloat16() if name in deltas else base[name]
        assert same_bytes(values, wanted)
    assert (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_what_an_adapter_does_not_bring_is_no_difference(adapted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = adapted
    (folder / "base/tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "base/merges.txt").write_text("a b")
    found = inspect(folder / "base", {"a": folder / "adapter"}, headers_only=True)
    assert list(found.differences["a"].lines()) == []
    (folder / "adapter/tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    found = inspect(folder / "base", {"a": folder / "adapter"}, headers_only=True)
    assert list(found.differences["a"].tokens) == ["added"]


def test_what_an_adapter_needs_is_said(adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any) -> None:
    folder, _ = adapted
    with pytest.raises(UsageError, match=r"^base: .* is a PEFT adapter, not a whole model"):
        plan_blend(recipe_in(folder, {"a": ("base", 1.0)}, WHOLE, base="adapter"))


def test_an_output_over_an_input_and_an_adapter_changed_under_the_run_are_refused(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any, tmp_path: Path
) -> None:
    folder, _ = adapted
    recipe = recipe_in(folder, {"a": ("base+adapter", 1.0)}, WHOLE)
    with pytest.raises(UsageError, match="one of the inputs"):
        blend(recipe, folder / "adapter", overwrite=True, device="cpu")
    plan = plan_blend(recipe)
    os.utime(folder / "adapter" / "adapter_model.safetensors", ns=(0, 0))
    with pytest.raises(KtmergeError, match="was changed"), plan.experts[0].checkpoint.reader() as reader:
        reader.check_unchanged()


@pytest.mark.parametrize("model", ["org/adapter@v1", "org/base@abc+org/adapter@v1", "base+org/adapter@v1"])
def test_adapters_come_from_the_hub(
    adapted: tuple[Path, dict[str, torch.Tensor]],
    recipe_in: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
) -> None:
    folder, _ = adapted
    places = {"org/base@abc": "base", "org/adapter@v1": "adapter", "base": "base"}
    monkeypatch.setattr("ktmerge.checkpoints.opening.resolve", lambda reference, _: folder / places[reference])
    plan = plan_blend(recipe_in(folder, {"a": (model, 1.0)}, WHOLE))
    assert folder / "adapter" in plan.experts[0].checkpoint.roots


def test_an_interrupted_blend_goes_on_only_with_the_same_adapter(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any, tmp_path: Path
) -> None:
    folder, _ = adapted
    recipe = recipe_in(folder, {"a": ("adapter", 1.0)}, WHOLE)
    blend(recipe, tmp_path / "out", device="cpu")
    first, written = read(tmp_path / "out"), (tmp_path / "out" / "ktmerge.json").stat().st_mtime_ns
    blend(recipe, tmp_path / "out", device="cpu", resume=True)
    assert (tmp_path / "out" / "ktmerge.json").stat().st_mtime_ns == written
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6.0', '"lora_alpha": 3.0'))
    blend(recipe, tmp_path / "out", device="cpu", resume=True, overwrite=True)
    assert any(not same_bytes(values, first[name]) for name, values in read(tmp_path / "out").items())


def whole_tables(folder: Path, tables: dict[str, torch.Tensor]) -> None:
    """Let the adapter store these tensors whole, as those of modules_to_save are."""
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), **{f"base_model.model.{name}": values for name, values in tables.items()}}, file)


def test_a_base_with_an_adapter_that_stores_modules_whole(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any, tmp_path: Path
) -> None:
    """They lie in the model's files, in the model's types."""
    folder, _ = adapted
    norm = torch.linspace(0.5, 1.5, 16)
    whole_tables(folder, {"model.norm.weight": norm})
    recipe = recipe_in(folder, {"a": ("base", 1.0)}, {"method": "linear", "lambda": 0}, base="base+adapter")
    blend(recipe, tmp_path / "out", device="cpu")
    stored, base = read(tmp_path / "out"), read(folder / "base")
    assert {name: values.dtype for name, values in stored.items()} == {name: one.dtype for name, one in base.items()}
    assert stored["model.norm.weight"].equal(norm.bfloat16())
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == sorted(
        path.name for path in (folder / "base").glob("*.safetensors")
    )


def test_a_base_whose_adapter_has_more_tokens_is_refused(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any
) -> None:
    folder, _ = adapted
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "ensure_weight_tying": True}))
    whole_tables(folder, {"model.embed_tokens.weight": torch.ones(50, 16)})
    with pytest.raises(UsageError, match=r"base: .*another shape of 'model.embed_tokens.weight' than the model"):
        plan_blend(recipe_in(folder, {"a": ("base", 1.0)}, WHOLE, base="base+adapter"))


def test_an_adapters_own_tokenizer_is_an_input(adapted: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, _ = adapted
    for part in ("base", "adapter"):
        (folder / part / "tokenizer.json").write_text(json.dumps({"x": part}))
        (tmp_path / f"{part}s").mkdir()
        (folder / part).rename(tmp_path / f"{part}s" / "v1")
    files = input_files(open_model("bases/v1+adapters/v1", tmp_path))
    assert {json.loads(path.read_text())["x"] for path in files.values() if path.name == "tokenizer.json"} == {
        "base",
        "adapter",
    }


def test_an_adapter_of_a_head_that_is_the_embedding_is_told_so(
    adapted: tuple[Path, dict[str, torch.Tensor]], recipe_in: Any
) -> None:
    folder, _ = adapted
    lora(folder / "head", {"lm_head.weight": (48, 16)})
    with pytest.raises(UsageError, match=r"'lm_head.weight', which .* ties to its embedding and does not store; untie"):
        plan_blend(recipe_in(folder, {"a": ("head", 1.0)}, WHOLE))
