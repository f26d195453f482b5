"""What is trained: the tensors asked for move, at their rates; all others come out with the base's bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tuning import Listener, sha256, tune, weights
from typer.testing import CliRunner

from ktmerge import api
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.commands import app
from ktmerge.errors import UsageError


def moved(base: Path, out: Path) -> set[str]:
    """The names of tensors that changed; those that did not have the base's type and bytes."""
    before, after = weights(base), weights(out)
    assert before.keys() == after.keys()
    same = {name for name in before if after[name].dtype == before[name].dtype and after[name].equal(before[name])}
    assert all(not after[name].float().equal(before[name].float()) for name in before.keys() - same)
    return before.keys() - same


@pytest.mark.parametrize(
    ("train", "prefixes"),
    [
        pytest.param("last:1", ("model.layers.1.",), marks=pytest.mark.slow),
        ("top:1+norm", ("model.layers.0.", "model.norm.")),
        pytest.param("llm.layers", ("model.layers.",), marks=pytest.mark.slow),
        ("head", ("model.embed_tokens.",)),
    ],
)
def test_exactly_what_was_asked_for_moves(tiny_llama: Path, tmp_path: Path, train: str, prefixes: Any) -> None:
    listener = Listener()
    report = tune(tiny_llama, tmp_path, train=train, max_steps=3, weight_decay=0.1, warmup=0, progress=listener)
    wanted = {name for name in weights(tiny_llama) if name.startswith(prefixes)}
    assert moved(tiny_llama, tmp_path / "out") == wanted
    assert report.record["run"]["trained"]["tensors"] == len(wanted)
    assert report.record["run"]["trained"]["parameters"] == sum(weights(tiny_llama)[n].numel() for n in wanted)
    assert any(note.startswith(f"training {len(wanted)} of ") for note in listener.notes)
    assert any("frozen" in note for note in listener.notes)
    assert any("head and embed share one tensor" in note for note in listener.notes) == (train == "head")


@pytest.mark.slow
def test_frozen_tensors_are_never_rounded(tiny_llama: Path, tmp_path: Path) -> None:
    tune(tiny_llama, tmp_path, "first", max_steps=2, save_dtype="float32")
    tune(tmp_path / "first", tmp_path, "second", max_steps=2, train="norm", save_dtype="float16")
    assert moved(tmp_path / "first", tmp_path / "second") == {"model.norm.weight"}
    assert Checkpoint.open(tmp_path / "second").tensors["model.norm.weight"].dtype == "F16"


def test_rates_by_part_are_the_steps_of_the_first_update(tiny_llama: Path, tmp_path: Path) -> None:
    """Adam's first step moves every element with a gradient by the rate."""
    rates = {"top:1": 1e-4, "last:1+norm": 3e-4}
    tune(tiny_llama, tmp_path, max_steps=1, warmup=0, scheduler="constant", learning_rate=1e-3, learning_rates=rates)
    before, after = weights(tiny_llama), weights(tmp_path / "out")
    for name, rate in (
        ("model.layers.0.mlp.up_proj.weight", 1e-4),
        ("model.layers.1.mlp.up_proj.weight", 3e-4),
        ("model.norm.weight", 3e-4),
        ("model.embed_tokens.weight", 1e-3),
    ):
        step = (after[name] - before[name].float()).abs().max()
        assert float(step) == pytest.approx(rate, rel=1e-2), name


@pytest.mark.slow
def test_a_part_resumes_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    from stopping import StopsAt

    settings: dict[str, Any] = {"train": "last:1+head", "learning_rates": {"head": 2e-4}}
    tune(tiny_llama, tmp_path, "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **settings, progress=StopsAt(4))
    held = weights(tmp_path / "out.partial/checkpoint-4")
    assert not any(name.startswith("model.layers.0.") for name in held)
    tune(tiny_llama, tmp_path, **settings, resume=True)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"train": "connector"},
            "part 'connector' matches no tensor of this model; it has llm, llm.layers, embed, head, norm",
        ),
        ({"train": "last:3"}, "the model has 2 layers"),
        ({"train": "norm", "learning_rates": {"head": 1e-4}}, "learning_rates 'head': matches nothing that is trained"),
        ({"learning_rates": {"llm": 1e-4, "norm": 1e-5}}, "learning_rates 'norm': matches nothing"),
    ],
)
def test_what_matches_nothing_is_refused_before_anything_is_read(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        tune(tiny_llama, tmp_path, **settings, data=["missing.jsonl"])
    assert not (tmp_path / "out.partial").exists()


def test_the_command_line_takes_it(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    document = {
        "ktmerge": 1,
        "base": str(tiny_llama),
        "experts": {"one": {"model": "one"}},
        "blend": {"method": "linear"},
        "finetune": {"experts": {"one": {"data": "d.jsonl"}}},
    }
    recipe.write_text(json.dumps(document))
    assert api.finetune_jobs(recipe, settings={"train": "last:1"})[0].job.train == "last:1"
    assert api.finetune_jobs(recipe, settings={"train": None})[0].job.train == "full"
    (tmp_path / "d.jsonl").write_text("{}")
    api.check(str(recipe))
    with pytest.raises(UsageError, match=r"finetune\.experts\.one: train 'last:3': the model has 2 layers"):
        api.check(str(recipe), overrides=["finetune.experts.one.train=last:3"])
    called = CliRunner().invoke(
        app, ["finetune", "--base", str(tiny_llama), "--data", "d", "--out", str(tmp_path / "o"), "--train", "last"]
    )
    assert isinstance(called.exception, UsageError)
    assert called.exception.exit_code == 2
    assert "write last:K" in str(called.exception)


@pytest.mark.parametrize(
    ("train", "prefixes"),
    [
        ("connector", ("model.multi_modal_projector.",)),
        ("vision.layers[-1] + head", ("model.vision_tower.encoder.layers.1.", "lm_head.")),
        ("last:1", ("model.language_model.layers.1.",)),
        ("llm", ("model.language_model.", "lm_head.")),
        ("vision", ("model.vision_tower.",)),
    ],
)
def test_the_parts_of_a_model_that_sees(train: str, prefixes: tuple[str, ...]) -> None:
    """A LLaVA made from its configuration, without memory."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from ktmerge.recipes.finetuning import FinetuneJob
    from ktmerge.tuners.trained import choose_trained

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=28, patch_size=14),
        text_config=LlamaConfig(**sizes, num_attention_heads=2, vocab_size=50),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    names = {name for name, _ in model.named_parameters()}

    class Base:
        def __init__(self) -> None:
            self.config = config.to_dict()

    job = FinetuneJob.model_validate({"data": "d", "train": train})
    trained = choose_trained(model, Base(), job)  # type: ignore[arg-type]
    wanted = {name for name in names if name.replace("vision_model.", "").startswith(prefixes)}
    assert wanted
    assert set(trained.rates) == wanted
    assert {name for name, one in model.named_parameters() if one.requires_grad} == wanted
    assert sum(one.parameters for one in trained.summaries) == sum(one.numel() for one in model.parameters())
    assert sum(one.tensors for one in trained.summaries) == len(names)


def test_the_table_counts_bytes() -> None:
    from ktmerge.tuners.trained import PartSummary, Trained

    found = Trained(
        {"a": 1e-5}, (PartSummary("llm.layers[0:2]", 3, 1000, 1000, 1e-5), PartSummary("head", 1, 500, 0, 0))
    )
    lines = found.lines(2.0)
    assert lines[0] == "training 1 of 4 tensors, 1,000 of 1,500 parameters (66.7%):"
    assert lines[2].split() == ["llm.layers[0:2]", "3", "1,000", "4.0", "kB", "4.0", "kB", "2.0", "kB", "1e-05"]
    assert lines[3].split() == ["head", "1", "500", "2.0", "kB", "0", "B", "0", "B", "frozen"]
