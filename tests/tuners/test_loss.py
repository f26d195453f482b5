"""The loss: equal to the model's own wherever it is used, refused elsewhere; splitting a batch changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tuning import sample, takes_masks

from ktmerge.tuners.collate import IGNORED, Collator
from ktmerge.tuners.loss import PASS_TOKENS, answer_loss, count_trained, cuts, pieces, projects_faithfully


def test_the_collator_pads_on_the_right_and_labels_only_what_is_trained() -> None:
    batch = Collator(pad=9)([sample(3, 1), sample(5, 2, start=20)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 9], [20, 21, 22, 23, 24]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, IGNORED], [IGNORED, IGNORED, IGNORED, 23, 24]]


@takes_masks
def test_the_loss_is_the_models_own(model: Any) -> None:
    batch = Collator(0)([sample(30, 4), sample(17, 9), sample(8, 8)])
    own = model(**batch).loss
    own.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    found = answer_loss(model, batch) / count_trained(batch)
    found.backward()
    assert count_trained(batch) == 4 + 9 + 7  # the first token of a sample has nothing before it
    assert found.item() == pytest.approx(own.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@takes_masks
def test_pieces_cover_the_batch_and_their_losses_add_up(model: Any) -> None:
    samples = [sample(n, 2) for n in (30, 7, 12, 9, 28, 7)]
    batch = Collator(0)(samples)
    parts = list(pieces(batch, 40))
    for part in parts:
        rows, length = part["input_ids"].shape
        assert rows * length <= 40 or rows == 1
        assert part["attention_mask"].sum(1).max() == length
    assert sum(len(part["input_ids"]) for part in parts) == len(samples)
    assert len(parts) > 2
    total = sum(answer_loss(model, part).item() for part in parts)
    assert total == pytest.approx(answer_loss(model, batch).item(), rel=1e-6)


def test_cuts_cost_least() -> None:
    """Against every way to cut."""
    from itertools import combinations

    def cost(bounds: list[tuple[int, int]]) -> int:
        return sum((end - first) * lengths[end - 1] + PASS_TOKENS for first, end in bounds)

    for lengths in ([3, 8, 9, 40, 41, 90, 200], [5] * 7, [1, 2, 300], [60, 61, 62, 63, 64, 65]):
        count = len(lengths)
        ways = [
            list(zip((0, *inner), (*inner, count), strict=True))
            for size in range(count)
            for inner in combinations(range(1, count), size)
        ]
        allowed = [way for way in ways if all((b - a) * lengths[b - 1] <= 250 or b - a == 1 for a, b in way)]
        assert cost(cuts(lengths, 250)) == min(map(cost, allowed))
    assert cuts([7] * 9, 10**6) == [(0, 9)]


@takes_masks
def test_faithful_models_are_told_from_others(model: Any) -> None:
    assert projects_faithfully(model, 400)
    plain = model.forward

    def deaf(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        return plain(*args, **kwargs)

    def adding(*args: Any, **kwargs: Any) -> Any:
        outputs = plain(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1  # as routers of mixture models do
        return outputs

    for other in (deaf, adding):
        model.forward = other
        assert not projects_faithfully(model, 400)


def test_trying_leaves_the_model_as_it_was(model: Any) -> None:
    model.train()
    state = torch.random.get_rng_state()
    projects_faithfully(model, 400)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Qwen2", "Gemma2", "GPT2", "Phi3", "Granite", "Mixtral", "GPTNeoX"])
def test_other_architectures_are_faithful_or_left_alone(kind: str) -> None:
    """Logits that are capped or scaled after the projection count as faithful; a wrong loss must never pass."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
    if kind == "GPT2":
        sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if not projects_faithfully(model, 300):
        return
    batch = Collator(0)([sample(30, 4), sample(17, 9)])
    with torch.no_grad():
        found = answer_loss(model, batch) / count_trained(batch)
        assert found.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
