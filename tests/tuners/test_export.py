"""Bases that are stored otherwise than transformers would: the tuned model is stored as the base is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners import finetune
from ktmerge.tuners.export import export


def restored(source: Path, target: Path, change: Any, shards: int = 1) -> dict[str, Any]:
    """A copy of a checkpoint with other tensors in it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = change(load_file(source / "model.safetensors"))
    (target / "model.safetensors").unlink()
    if shards == 1:
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        return dict(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(own, target / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return dict(tensors)


def read(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def tune(base: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    (folder / "a.jsonl").write_text('{"prompt": "one", "completion": " two"}\n')
    job = FinetuneJob.model_validate({"data": ["a.jsonl"], "max_steps": 1, "learning_rate": 1e-3, **settings})
    finetune(job, base, folder / "out", folder=folder)
    return read(folder / "out")


def test_shards_names_and_order_are_the_bases(tiny_llama: Path, tmp_path: Path) -> None:
    restored(tiny_llama, tmp_path / "base", lambda tensors: tensors, shards=3)
    tune(tmp_path / "base", tmp_path)
    base, out = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "out")
    assert list(out.tensors) == list(base.tensors)
    assert {name: info.file for name, info in out.tensors.items()} == {n: i.file for n, i in base.tensors.items()}


@pytest.mark.slow
def test_a_head_stored_beside_its_embedding_is_stored_again(tiny_llama: Path, tmp_path: Path) -> None:
    def untied_on_disk(tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    restored(tiny_llama, tmp_path / "base", untied_on_disk)
    out = tune(tmp_path / "base", tmp_path)
    assert out["lm_head.weight"].equal(out["model.embed_tokens.weight"])
    assert not out["lm_head.weight"].bfloat16().equal(read(tmp_path / "base")["lm_head.weight"])


def test_a_model_without_tied_weights(tiny_llama: Path, tmp_path: Path) -> None:
    def untied(tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 0.5}

    before = restored(tiny_llama, tmp_path / "base", untied)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    out = tune(tmp_path / "base", tmp_path)
    assert out.keys() == before.keys()
    assert not out["lm_head.weight"].equal(out["model.embed_tokens.weight"])
    assert all(not out[name].equal(before[name].float()) for name in out)


@pytest.mark.slow
def test_what_the_model_has_no_use_for_keeps_its_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8).bfloat16(),
        "extra.tower.weight": torch.rand(3, 5).half(),
        "extra.position_ids": torch.arange(7),
    }
    restored(tiny_llama, tmp_path / "base", lambda tensors: {**tensors, **more})
    out = tune(tmp_path / "base", tmp_path)
    for name, tensor in more.items():
        assert out[name].dtype == tensor.dtype
        assert out[name].equal(tensor)


@pytest.mark.slow
def test_names_under_another_wrapper_are_found_again(tiny_llama: Path, tmp_path: Path) -> None:
    """Saved without its head: transformers adds the wrapper's name on loading and the output must drop it again."""

    def bare(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    before = restored(tiny_llama, tmp_path / "base", bare)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    out = tune(tmp_path / "base", tmp_path)
    assert out.keys() == before.keys()
    assert all(not out[name].equal(before[name].float()) for name in out)


@pytest.mark.slow
def test_an_odd_generation_config_travels_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    restored(tiny_llama, tmp_path / "base", lambda tensors: tensors)
    odd = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}'
    (tmp_path / "base/generation_config.json").write_text(odd)
    tune(tmp_path / "base", tmp_path)
    assert (tmp_path / "out/generation_config.json").read_text() == odd


def test_no_code_of_a_base_is_run(tiny_llama: Path, tmp_path: Path) -> None:
    restored(tiny_llama, tmp_path / "base", lambda tensors: tensors)
    config = json.loads((tmp_path / "base/config.json").read_text())
    remote = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "base/config.json").write_text(json.dumps({**config, **remote}))
    (tmp_path / "base/own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UsageError):
        tune(tmp_path / "base", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_base_that_lacks_weights_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def lacking(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}

    restored(tiny_llama, tmp_path / "base", lacking)
    with pytest.raises(UsageError, match=r"lacks 1 weights of its own model, e\.g\. 'model\.layers\.1\.mlp\.up_proj"):
        tune(tmp_path / "base", tmp_path)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("wrong", [{"hidden_size": 32}, {"hidden_size": "64"}, {"num_attention_heads": 0}])
def test_a_configuration_that_does_not_fit_is_told(tiny_llama: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    restored(tiny_llama, tmp_path / "base", lambda tensors: tensors)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, **wrong}))
    with pytest.raises(UsageError, match="cannot be loaded"):
        tune(tmp_path / "base", tmp_path)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_other_kinds_of_models_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    restored(tiny_llama, tmp_path / "base", lambda tensors: tensors)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(UsageError, match="cannot be loaded as a text model"):
        tune(tmp_path / "base", tmp_path)


def test_packed_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    config = json.loads((tiny_llama / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    codes = {"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32)}
    restored(tiny_llama, tmp_path / "packed", lambda tensors: {**tensors, **codes})
    (tmp_path / "packed/config.json").write_text(json.dumps({**config, **quantised}))
    with pytest.raises(UsageError, match=r"is quantised \('model\.layers\.0\.mlp\.up_proj\.qweight'\)"):
        tune(tmp_path / "packed", tmp_path)


def test_values_that_do_not_fit_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    restored(tiny_llama, tmp_path / "large", lambda tensors: {n: t * 0 + 1e6 for n, t in tensors.items()})
    base = Checkpoint.open(tiny_llama)
    with pytest.raises(KtmergeError, match="values that F16 cannot hold; save as float32"):
        export(base, tmp_path / "large", tmp_path / "out", dtype="float16", texts={}, overwrite=False)
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_answer_to_the_base_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("up_proj", "upward"): tensor for name, tensor in tensors.items()}

    restored(tiny_llama, tmp_path / "other", renamed)
    with pytest.raises(KtmergeError, match=r"names tensors otherwise than the base, e\.g\. '.*upward"):
        export(
            Checkpoint.open(tiny_llama), tmp_path / "other", tmp_path / "out", dtype="base", texts={}, overwrite=False
        )
