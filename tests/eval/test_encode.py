from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktmerge.errors import UsageError
from ktmerge.eval import encode_sets, read_sets
from ktmerge.eval.chunks import even_chunks
from ktmerge.eval.encode import Encoder, Request
from ktmerge.eval.fingerprints import fingerprint
from ktmerge.eval.rendering import make_items
from ktmerge.recipes import load_suite
from ktmerge.recipes.rows import Row
from ktmerge.recipes.suites import ChoiceTask, ClassifyTask, GenerateTask, TextTask


def lm_eval_rule(tokenizer: Any, context: str, continuation: str) -> Request:
    """The rule as lm_eval's documentation states it, written again."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole = tokenizer.encode(context + continuation)
    given = tokenizer.encode(context)
    return Request(tuple(given), tuple(whole[len(given) :]))


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("The capital of France is", " Paris"), ("A: ", "yes"), ("A:\n", "no"), ("ab \n ", " cd"), ("Is it", "? yes")],
)
def test_pairs_follow_lm_evals_rule(tokenizer: Any, context: str, continuation: str) -> None:
    pair = Encoder(tokenizer, None).pair(context, continuation)
    assert pair == lm_eval_rule(tokenizer, context, continuation)
    assert tokenizer.decode(pair.context + pair.continuation) == context + continuation


def test_a_space_at_the_end_of_the_prompt_changes_nothing(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, None)
    assert encoder.pair("The capital is ", "Paris") == encoder.pair("The capital is", " Paris")


def test_an_empty_prompt_starts_with_bos(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, None)
    for empty in ("", "  "):
        pair = encoder.pair(empty, "Paris")
        assert pair.context == (tokenizer.bos_token_id,)
        assert tokenizer.decode(pair.continuation) == empty + "Paris"


def test_a_continuation_that_melts_into_the_prompt_is_still_scored(tokenizer: Any) -> None:
    class Melting:
        """Sees two characters as one token where they stand together."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode(self, text: str, **_: Any) -> list[int]:
            return [len(part) for part in text.replace("ab", "ab|").split("|") if part]

    pair = Encoder(Melting(), None).pair("a", "b")  # type: ignore[arg-type]
    assert pair.context
    assert pair.continuation


def test_special_tokens_in_front_are_kept_and_those_behind_left_out(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    with_both = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    )
    with_both.bos_token, with_both.eos_token = "<|im_start|>", "<|im_end|>"
    bos, eos = with_both.bos_token_id, with_both.eos_token_id
    with_both.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", bos), ("<|im_end|>", eos)]
    )
    encoder = Encoder(with_both, None)
    assert encoder.ids("dog") == [bos, *tokenizer.encode("dog")]
    assert encoder.ids("<|im_start|>dog") == [bos, *tokenizer.encode("dog")]
    pair = encoder.pair("The", " dog")
    assert pair.context == (bos, *tokenizer.encode("The"))
    assert eos not in pair.continuation
    text = TextTask(name="t", kind="text", data="x", chunk_tokens=8)
    encoded = encoder.task(text, make_items(text, [Row(0, "", {"text": "The quick brown fox"})]))
    assert all(request.context[0] == bos and len(request.context) == 2 for request in encoded.requests)
    assert all(len(request.context) + len(request.continuation) <= 8 for request in encoded.requests)


def encoded_choice(tokenizer: Any, max_length: int | None = None, **more: Any) -> Any:
    settings = {"prompt": "{{ q }}", "choices": ["yes", "no, never"], "answer": "0"} | more
    task = ChoiceTask(name="c", kind="choice", data="x", **settings)
    rows = [Row(i, "", {"q": "The quick brown fox jumps " * (i + 1)}) for i in range(3)]
    return Encoder(tokenizer, max_length).task(task, make_items(task, rows))


def test_choices_are_grouped_by_item(tokenizer: Any) -> None:
    encoded = encoded_choice(tokenizer)
    assert encoded.offsets == [0, 2, 4, 6]
    assert encoded.rows == [0, 1, 2]
    assert encoded.truncated == 0


def test_long_prompts_are_cut_from_the_left_and_counted(tokenizer: Any) -> None:
    whole = encoded_choice(tokenizer)
    room = len(whole.requests[2].context) + 2
    cut = encoded_choice(tokenizer, room)
    assert cut.truncated == 2 - (len(whole.requests[3].context + whole.requests[3].continuation) - 1 <= room)
    for before, after in zip(whole.requests, cut.requests, strict=True):
        assert after.continuation == before.continuation
        assert before.context[-len(after.context) :] == after.context
        assert len(after.context) + len(after.continuation) - 1 <= room
    with pytest.raises(UsageError, match=r"row 1: a choice is .* tokens long, the model reads 2"):
        encoded_choice(tokenizer, 2, choices=["yes", "The quick brown fox"])


def test_chat_wraps_the_prompt_as_a_user_turn(tokenizer: Any) -> None:
    encoded = encoded_choice(tokenizer, chat=True, prompt="Hi")
    given = tokenizer.decode(encoded.requests[0].context + encoded.requests[0].continuation)
    assert given == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyes"
    plain = encoded_choice(tokenizer, prompt="Hi")
    assert tokenizer.decode(plain.requests[0].context + plain.requests[0].continuation) == "Hi yes"


def test_chat_without_a_template_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UsageError, match="task 'c': chat is set"):
        encoded_choice(tokenizer, chat=True)


def test_a_chat_template_that_fails_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('a system turn is needed') }}")
    with pytest.raises(UsageError, match=r"task 'c': the model's chat template .* a system turn is needed"):
        encoded_choice(tokenizer, chat=True)


def test_a_choice_without_tokens_is_named(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"task 'c': row 1: the choice '<\|im_start\|>' has no tokens"):
        encoded_choice(tokenizer, prompt="", choices=["<|im_start|>", "dog"], separator="")


def test_generation_leaves_room_for_the_answer(tokenizer: Any) -> None:
    task = GenerateTask(name="g", kind="generate", data="x", prompt="{{ q }}", answer="", max_new_tokens=10)
    items = make_items(task, [Row(0, "", {"q": "fox " * 40}), Row(1, "", {"q": "dog"}), Row(2, "", {"q": ""})])
    encoded = Encoder(tokenizer, 30).task(task, items)
    assert encoded.truncated == 1
    assert encoded.prompts[0] == tokenizer.encode("fox " * 40)[-20:]
    assert encoded.prompts[1] == tokenizer.encode("dog")
    assert encoded.prompts[2] == [tokenizer.bos_token_id]
    with pytest.raises(UsageError, match="max_new_tokens is 10, the model's whole context is 10"):
        Encoder(tokenizer, 10).task(task, items)


@pytest.mark.parametrize(
    "text", ["The quick brown fox jumps over the lazy dog. " * 9, "Ünïcödé 世界 — 🦊 naïve  \n\n x " * 9]
)
def test_chunks_of_a_text_count_every_byte_once(tokenizer: Any, text: str) -> None:
    task = TextTask(name="t", kind="text", data="x", chunk_tokens=16)
    encoded = Encoder(tokenizer, None).task(task, make_items(task, [Row(3, "", {"text": text})]))
    ids = [token for request in encoded.requests for token in request.context + request.continuation]
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert all(len(request.context) == 1 for request in encoded.requests)
    assert {len(request.continuation) + 1 for request in encoded.requests} <= {14, 15, 16}
    assert encoded.rows == [3] * len(encoded.requests)
    # What isn't scored is each chunk's first token; bytes of a token: its byte-level symbols are one byte each.
    pieces = tokenizer.convert_ids_to_tokens
    scored = [sum(len(piece) for piece in pieces(list(request.continuation))) for request in encoded.requests]
    if text.isascii():
        assert encoded.bytes == scored
    first = sum(len(piece) for request in encoded.requests for piece in pieces(list(request.context)))
    assert abs(sum(encoded.bytes) - (len(text.encode()) - first)) <= (
        0 if text.isascii() else 3 * len(encoded.requests)
    )


def test_texts_too_short_to_score_are_counted(tokenizer: Any) -> None:
    task = TextTask(name="t", kind="text", data="x", chunk_tokens=16)
    encoder = Encoder(tokenizer, 512)
    items = make_items(task, [Row(0, "", {"text": ""}), Row(1, "", {"text": "x"}), Row(2, "", {"text": "the dog"})])
    encoded = encoder.task(task, items)
    assert (encoded.skipped, encoded.rows) == (2, [2])
    with pytest.raises(UsageError, match="no row has a text of at least two tokens"):
        encoder.task(task, items[:2])
    with pytest.raises(UsageError, match="chunk_tokens is 16, the model reads 8"):
        Encoder(tokenizer, 8).task(task, items)


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 31, 32, 33, 160, 161])
def test_even_chunks_cover_all_and_differ_by_one(tokens: int) -> None:
    chunks = even_chunks(tokens, 16)
    if tokens < 2:
        assert chunks == []
        return
    assert [token for start, stop in chunks for token in range(start, stop)] == list(range(tokens))
    sizes = [stop - start for start, stop in chunks]
    assert max(sizes) <= 16
    assert max(sizes) - min(sizes) <= 1
    assert len(chunks) == -(-tokens // 16)


def test_fingerprints_tell_tokenizers_apart(tokenizer: Any, tiny_llama: Any) -> None:
    from ktmerge.eval.loading import load_tokenizer

    same, other = load_tokenizer(tiny_llama), load_tokenizer(tiny_llama)
    same("some text", truncation=True, max_length=3, padding="max_length")  # leaves state behind
    assert fingerprint(same) == fingerprint(tokenizer)
    other.chat_template = (other.chat_template or "") + " "
    assert fingerprint(other) != fingerprint(tokenizer)
    other = load_tokenizer(tiny_llama)
    other.add_tokens(["<new>"])
    assert fingerprint(other) != fingerprint(tokenizer)


def test_a_template_that_writes_the_date_is_another_each_day(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import date

    from ktmerge.eval import fingerprints
    from ktmerge.eval.loading import load_tokenizer

    dated = load_tokenizer(tiny_llama)
    dated.chat_template = "{{ strftime_now('%d %B %Y') }}" + str(dated.chat_template)
    today = fingerprint(dated)
    assert fingerprint(dated) == today
    monkeypatch.setattr(fingerprints, "date", type("Tomorrow", (), {"today": staticmethod(lambda: date.max)}))
    assert fingerprint(dated) != today


@pytest.mark.parametrize("name", ["vocab.txt", "tekken.json", "additional_chat_templates/tool.jinja"])
def test_whatever_a_tokenizer_s_files_are_called_they_count(tmp_path: Path, name: str) -> None:
    from ktmerge.eval.loading import tokenizer_files_digest

    digests = set()
    for content in ("one", "two"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        (tmp_path / "config.json").write_text(content)
        digests.add(tokenizer_files_digest(tmp_path))
    assert len(digests) == 2


def test_what_does_not_fit_names_the_task_s_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "The quick brown fox"}\n')
    (tmp_path / "s.yaml").write_text("upstream:\n\n- {name: t, kind: text, data: x.jsonl, chunk_tokens: 64}\n")
    sets = read_sets(load_suite(tmp_path / "s.yaml"))
    with pytest.raises(UsageError, match=r"s\.yaml:3: task 't': chunk_tokens is 64, the model reads 32 tokens"):
        encode_sets(sets, tokenizer, 32)


def test_labels_are_different() -> None:
    with pytest.raises(ValueError, match="the label 'yes' stands twice"):
        ClassifyTask(name="c", kind="classify", data="x", prompt="p", answer="a", labels=["yes", "no", "yes"])


def other_tokenizer(space: str, bos: bool) -> Any:
    """One that writes spaces as SentencePiece does, or before the first word, and may begin every text with BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    if space == "bytes":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space)
        made.decoder = decoders.Metaspace(prepend_scheme=space)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator(
        ["The quick brown fox jumps over the lazy dog.", "Is this review good? yes Answer: A"] * 3, trainer
    )
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("space", "bos"), [("always", True), ("always", False), ("first", True), ("bytes", True)])
def test_pairs_are_lm_evals_whatever_a_tokenizer_does_to_spaces(space: str, bos: bool) -> None:
    tokenizer = other_tokenizer(space, bos)
    encoder = Encoder(tokenizer, None)
    contexts = ["The quick", "Question: one two\nAnswer:", "Is this review good? ", "The\n\n", "x"]
    for context in contexts:
        for continuation in (" yes", "yes", " the lazy dog", "\nno", "  x", " A"):
            wanted = lm_eval_rule(tokenizer, context, continuation)
            assert encoder.pair(context, continuation) == wanted, (context, continuation)
    bare = tokenizer.encode(" yes", add_special_tokens=False)
    assert encoder.pair("", " yes") == Request((1,), tuple(bare)), "nothing before it: BOS stands there"
