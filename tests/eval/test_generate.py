from __future__ import annotations

from typing import Any

import pytest
import torch

from ktmerge.eval.generate import cut_at, end_tokens, generate

PROMPTS = [
    "The",
    "The quick brown fox jumps over the lazy dog. What is the capital",
    "Is this review good or bad?",
    "def add(first, second):\n    return",
    "In the beginning the heaven and the earth were without form, and void. Question: Answer: yes no",
    "user",
    "one two three four five six seven",
]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """One token at a time, no cache, no padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "batch_size", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(16, marks=pytest.mark.slow)]
)
def test_equals_plain_greedy_search_at_every_batch_size(
    llama: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int
) -> None:
    ends = end_tokens(llama, tokenizer)
    expected = []
    for prompt in prompts:
        new = greedy(llama, prompt, 12)
        stop = min((new.index(end) for end in ends if end in new), default=len(new))
        expected.append(tokenizer.decode(new[:stop], skip_special_tokens=True))
    assert len(set(expected)) > 1
    found = generate(llama, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size)
    assert found == expected


def test_stop_strings_end_an_answer_and_are_left_out(llama: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    whole = generate(llama, tokenizer, prompts, max_new_tokens=16)
    stop = next(text[2:5] for text in whole if len(text) > 8)
    calls: list[int] = []
    handle = llama.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = generate(llama, tokenizer, prompts, max_new_tokens=16, stop=[stop, ""])
    finally:
        handle.remove()
    assert found == [cut_at(text, [stop]) for text in whole]
    assert any(len(a) < len(b) for a, b in zip(found, whole, strict=True))
    first = whole.index(next(text for text in whole if stop in text))
    calls.clear()
    handle = llama.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        generate(llama, tokenizer, [prompts[first]], max_new_tokens=16, stop=[stop])
    finally:
        handle.remove()
    assert len(calls) < 16  # it stops early, it isn't just cut


def test_an_end_token_of_the_model_ends_an_answer(llama: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    import copy

    new = greedy(llama, prompts[1], 8)
    ending = copy.deepcopy(llama)
    ending.generation_config.eos_token_id = [new[3], 2]
    (found,) = generate(ending, tokenizer, [prompts[1]], max_new_tokens=8)
    assert found == tokenizer.decode(new[: new.index(new[3])], skip_special_tokens=True)


def test_a_special_token_may_be_a_stop(llama: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    import copy

    from tokenizers import AddedToken

    (new,) = greedy(llama, prompts[1], 1)
    ending, stop = copy.deepcopy(tokenizer), tokenizer.convert_ids_to_tokens(new)
    ending.add_special_tokens({"additional_special_tokens": [AddedToken(stop, special=True)]})
    calls: list[int] = []
    handle = llama.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = generate(llama, ending, [prompts[1]], max_new_tokens=8, stop=[stop])
    finally:
        handle.remove()
    assert found == [""]
    assert len(calls) == 1, "texts are decoded without special tokens: their ids have to tell"


def test_the_checkpoints_sampling_settings_do_not_count(llama: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    import copy

    from transformers import GenerationConfig

    expected = generate(llama, tokenizer, prompts, max_new_tokens=10)
    odd = copy.deepcopy(llama)
    likely = greedy(llama, prompts[0], 1)[0]
    odd.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=50, repetition_penalty=9.0, num_beams=3, min_new_tokens=9,
        suppress_tokens=[likely], no_repeat_ngram_size=1, eos_token_id=llama.generation_config.eos_token_id,
    )  # fmt: skip
    assert generate(odd, tokenizer, prompts, max_new_tokens=10) == expected
    assert odd.generation_config.temperature == 5.0  # given back


def test_cut_at_the_first_of_several() -> None:
    assert cut_at("ab\ncd. e", [".", "\n"]) == "ab"
    assert cut_at("abc", ["x"]) == "abc"
    assert cut_at("abc", []) == "abc"
