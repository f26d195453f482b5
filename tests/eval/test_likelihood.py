"""The scorer against a float64 softmax over the full logits of one request at a time."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from ktmerge.errors import KtmergeError
from ktmerge.eval.encode import Request
from ktmerge.eval.likelihood import LikelihoodScorer, allows_packing


def make_requests(vocabulary: int, seed: int = 0) -> list[Request]:
    """Contexts of 1 to 60 tokens, each with two to four continuations of 1 to 9."""
    source = random.Random(seed)
    requests = []
    for _ in range(20):
        context = tuple(source.randrange(vocabulary) for _ in range(source.randint(1, 60)))
        for _ in range(source.randint(2, 4)):
            continuation = tuple(source.randrange(vocabulary) for _ in range(source.choice([1, 1, 2, 5, 9])))
            requests.append(Request(context, continuation))
    source.shuffle(requests)
    return requests


def oracle(model: Any, request: Request) -> tuple[float, int]:
    ids = request.context + request.continuation
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    shifted = logits - logits.max(axis=1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    places = range(len(request.context) - 1, len(ids) - 1)
    total = sum(logp[place, token] for place, token in zip(places, request.continuation, strict=True))
    hits = sum(int(logp[place].argmax() == token) for place, token in zip(places, request.continuation, strict=True))
    return float(total), hits


@pytest.fixture(scope="module")
def asked(llama: Any) -> tuple[list[Request], np.ndarray, np.ndarray]:
    requests = make_requests(llama.config.vocab_size)
    # Some continuations that the model itself would choose, so that not every hit count is 0.
    for i in range(0, len(requests), 5):
        with torch.no_grad():
            best = int(llama(torch.tensor([requests[i].context])).logits[0, -1].argmax())
        requests[i] = Request(requests[i].context, (best,))
    answers = [oracle(llama, request) for request in requests]
    assert sum(hits for _, hits in answers) > 5
    return requests, np.array([a for a, _ in answers]), np.array([b for _, b in answers])


@pytest.mark.every(4)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("pack", [None, False, True])
def test_equals_the_oracle_at_every_batch_size(llama: Any, asked: Any, batch_size: int, pack: bool | None) -> None:
    requests, logprob, correct = asked
    found = LikelihoodScorer(llama, batch_size, pack).score(requests)
    np.testing.assert_allclose(found.logprob, logprob, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found.correct, correct)


def test_order_does_not_matter(llama: Any, asked: Any) -> None:
    requests, logprob, _ = asked
    order = list(range(len(requests)))
    random.Random(3).shuffle(order)
    found = LikelihoodScorer(llama, 5).score([requests[i] for i in order])
    np.testing.assert_allclose(found.logprob, logprob[order], atol=1e-4, rtol=0)


def test_this_model_reads_shared_contexts_once(llama: Any, asked: Any) -> None:
    assert allows_packing(llama)
    requests = asked[0]
    read: list[int] = []
    handle = llama.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    try:
        LikelihoodScorer(llama, 1, pack=True).score(requests)
        packed, read[:] = sum(read), []
        LikelihoodScorer(llama, 1, pack=False).score(requests)
    finally:
        handle.remove()
    assert packed < 0.75 * sum(read)


@pytest.mark.parametrize(
    "batch_size", [None, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_what_all_contexts_begin_with_is_read_once(llama: Any, asked: Any, batch_size: int | None) -> None:
    source = random.Random(5)
    shots = tuple(source.randrange(llama.config.vocab_size) for _ in range(70))
    requests = [Request(shots + request.context, request.continuation) for request in asked[0]]
    expected = [oracle(llama, request)[0] for request in requests]
    read: list[int] = []
    handle = llama.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    try:
        found = LikelihoodScorer(llama, batch_size, pack=True).score(requests)
    finally:
        handle.remove()
    np.testing.assert_allclose(found.logprob, expected, atol=1e-4, rtol=0)
    if batch_size == 1:
        contexts = {request.context for request in requests}
        assert sum(read) < len(contexts) * 70


def test_only_needed_hidden_states_reach_the_head(llama: Any, asked: Any) -> None:
    requests = asked[0]
    seen: list[int] = []
    handle = llama.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1].numel()))
    try:
        LikelihoodScorer(llama, 8, pack=False).score(requests)
    finally:
        handle.remove()
    asked_for = {
        (r.context + r.continuation)[: len(r.context) + i] for r in requests for i in range(len(r.continuation))
    }
    assert len(asked_for) <= sum(seen) < sum(len(request.continuation) for request in requests)
    assert not llama.lm_head._forward_pre_hooks


def build(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def configs() -> dict[str, Any]:
    from transformers import BloomConfig, Gemma2Config, MistralConfig, OPTConfig

    small = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
    return {
        "gpt2": GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "opt": OPTConfig(**small, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=16),
        "bloom": BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4),
        "mistral window": MistralConfig(**small, **heads, sliding_window=8),
        "gemma2 softcap": Gemma2Config(**small, **heads, sliding_window=8, final_logit_softcapping=3.0),
    }


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "mistral window", "gemma2 softcap"])
def test_other_families_equal_the_oracle(kind: str) -> None:
    """Learned positions, positions from the mask, ALiBi, windows, capped logits."""
    model = build(configs()[kind])
    requests = make_requests(101, seed=2)[:25]
    expected = [oracle(model, request)[0] for request in requests]
    for batch_size in (1, 9):
        found = LikelihoodScorer(model, batch_size).score(requests)
        np.testing.assert_allclose(found.logprob, expected, atol=1e-4, rtol=0)


def test_packing_is_refused_where_it_would_be_wrong() -> None:
    assert not allows_packing(build(configs()["bloom"]))
    assert not allows_packing(build(configs()["mistral window"]))


def test_packed_choices_at_the_end_of_learned_positions() -> None:
    """Side by side they are more tokens than the model has positions; beside shorter rows there is padding, too."""
    model = build(GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=24))
    contexts = [tuple((5 * i + j) % 100 for j in range(length)) for i, length in enumerate((19, 18, 7, 3))]
    requests = [Request(one, tuple((k + j) % 100 for j in range(5))) for one in contexts for k in (3, 50, 9, 77)]
    found = LikelihoodScorer(model, pack=True).score(requests)
    np.testing.assert_allclose(found.logprob, [oracle(model, one)[0] for one in requests], atol=1e-4, rtol=0)


def test_broken_weights_are_an_error(llama: Any) -> None:
    import copy

    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(KtmergeError, match="not finite"):
        LikelihoodScorer(broken).score(make_requests(300)[:3])


def test_every_place_of_a_single_row_in_another_order(llama: Any) -> None:
    requests = [Request((5, 6, 7, 8), (9,)), Request((5,), (6, 7, 8))]
    found = LikelihoodScorer(llama).score(requests).logprob
    np.testing.assert_allclose(found, [oracle(llama, one)[0] for one in requests], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["mamba", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_configurations_of_other_shapes(kind: str) -> None:
    """Without attention heads, and with a width of its own in every layer."""
    from transformers import Gemma3nTextConfig, MambaConfig

    small = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2}
    made = {
        "mamba": lambda: MambaConfig(**small, state_size=4),
        "gemma3n": lambda: Gemma3nTextConfig(
            **small, intermediate_size=[48, 64], num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            vocab_size_per_layer_input=101, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4,
            activation_sparsity_pattern=[0.0, 0.0], layer_types=["full_attention", "full_attention"],
            pad_token_id=0,
        ),
    }  # fmt: skip
    model = build(made[kind]())
    requests = make_requests(101, seed=2)[:12]
    found = LikelihoodScorer(model).score(requests).logprob
    np.testing.assert_allclose(found, [oracle(model, one)[0] for one in requests], atol=1e-4, rtol=0)


def test_nothing_to_score(llama: Any) -> None:
    assert len(LikelihoodScorer(llama).score([]).logprob) == 0
