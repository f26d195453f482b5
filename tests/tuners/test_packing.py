"""Packed samples do not see each other; batches of like length hold every sample once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning import sample, takes_masks, tune, weights

from ktmerge.errors import UsageError
from ktmerge.tuners.collate import IGNORED, Collator
from ktmerge.tuners.loss import answer_loss, count_trained, pieces
from ktmerge.tuners.packing import LengthSampler, PackingCollator, fill, packs_faithfully

SAMPLES = [sample(30, 4), sample(17, 9, 40), sample(8, 8, 90), sample(12, 2, 200), sample(3, 1, 300)]


def test_rows_are_filled_and_hold_everything_once() -> None:
    rows = fill([3, 9, 4, 5, 1, 9], 10)
    assert rows == [[1, 4], [5], [3, 2], [0]]
    assert fill([7, 2], 5) == [[0], [1]]  # what is longer goes alone


@takes_masks
def test_a_packed_batch_has_the_loss_and_gradients_of_the_padded_one(model: Any) -> None:
    packed = PackingCollator(9)(SAMPLES)
    padded = Collator(9)(SAMPLES)
    assert packed["input_ids"].shape[0] == 3 < len(SAMPLES)
    assert packed["attention_mask"].sum() == sum(map(len, SAMPLES))
    assert count_trained(packed) == count_trained(padded)
    answer_loss(model, padded).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = answer_loss(model, packed)
    found.backward()
    assert found.item() == pytest.approx(answer_loss(model, padded).item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
    total = sum(answer_loss(model, part).item() for part in pieces(packed, 40))
    assert total == pytest.approx(found.item(), rel=1e-6)


@takes_masks
def test_no_logit_depends_on_another_sample(model: Any) -> None:
    """In one row; every token of the first sample is changed, and nothing of the others."""
    with torch.no_grad():
        other = [sample(30, 4, 60), *SAMPLES[1:]]
        one, two = (PackingCollator(0, 200)(some) for some in (SAMPLES, other))
        assert one["input_ids"].shape[0] == 1
        given = ({"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]} for batch in (one, two))
        before, after = (model(**batch, use_cache=False).logits for batch in given)
    assert torch.equal(before[0, 30:], after[0, 30:])
    assert not torch.equal(before[0, :30], after[0, :30])


def test_the_first_token_of_a_sample_is_nobodys_answer() -> None:
    packed = PackingCollator(0, 50)([sample(4, 4), sample(3, 3, 20)])
    assert packed["labels"].tolist() == [[IGNORED, 6, 7, 8, IGNORED, 21, 22]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]


@takes_masks
def test_models_that_mix_a_row_are_told_from_others(model: Any) -> None:
    assert packs_faithfully(model, 400)
    plain = model.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        mask = torch.ones_like(kwargs["input_ids"])
        return plain(*args, **{"attention_mask": mask, **kwargs})

    model.forward = masked
    assert not packs_faithfully(model, 400)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "attention"),
    [*((kind, how) for kind in ("Qwen2", "GPT2", "Gemma3Text") for how in ("sdpa", "eager")),
     ("Bloom", "eager"), ("Mamba", "eager")],
)  # fmt: skip
def test_other_architectures_pack_faithfully_or_are_refused(kind: str, attention: str) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
    sizes = {"GPT2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2}}.get(kind, sizes)
    sizes = {"Bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 2}}.get(kind, sizes)
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation=attention)
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(3.0)  # so that what a token sees matters
    if packs_faithfully(found, 300):
        with torch.no_grad():
            padded, packed = (float(answer_loss(found, make(0)(SAMPLES[:2]))) for make in (Collator, PackingCollator))
        assert packed == pytest.approx(padded, rel=1e-4)
    else:
        assert kind in ("Bloom", "Mamba")


@pytest.mark.slow
@takes_masks
def test_a_packed_run_has_the_losses_of_a_padded_one(tiny_llama: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 10, "eval_upstream": "chats.jsonl", "group_by_length": True}
    tune(tiny_llama, tmp_path, "padded", **settings)
    tune(tiny_llama, tmp_path, "packed", **settings, packing=True)
    logs = [
        [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        for out in ("padded", "packed")
    ]
    for a, b in zip(*logs, strict=True):
        for key in a.keys() & {"loss", "eval_upstream_loss", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=2e-4)
    one, two = weights(tmp_path / "padded"), weights(tmp_path / "packed")
    assert all((one[name] - two[name]).abs().mean() < 1e-5 for name in one)


def test_a_model_without_masks_is_refused(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktmerge.tuners.assembly.projects_faithfully", lambda *_: False)
    with pytest.raises(UsageError, match=r"packing: this model \(llama\) takes no mask as logits_to_keep"):
        tune(tiny_llama, tmp_path, packing=True)


@takes_masks
def test_a_model_that_cannot_pack_is_refused(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktmerge.tuners import packing

    monkeypatch.setattr(packing, "packs_faithfully", lambda *_: False)
    with pytest.raises(UsageError, match=r"samples in one row would see each other in this model \(llama\)"):
        tune(tiny_llama, tmp_path, packing=True)
    assert not (tmp_path / "out.partial").exists()


def test_batches_have_like_lengths_and_every_sample_once() -> None:
    lengths = [(7 * n) % 101 + 1 for n in range(103)]
    sampler = LengthSampler(lengths, 8, seed=1, pool=4)
    order = list(sampler)
    assert sorted(order) == list(range(103))
    assert len(sampler) == 103
    batches = [order[first : first + 8] for first in range(0, 96, 8)]
    spread = sum(max(lengths[n] for n in batch) - min(lengths[n] for n in batch) for batch in batches) / len(batches)
    assert spread < 35  # chance has about 80
    assert list(LengthSampler(lengths, 8, seed=1, pool=4)) == order
    sampler.set_epoch(1)
    assert list(sampler) != order
