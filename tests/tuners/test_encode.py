"""Which tokens are trained: exactly the answer and the stop token after it, for every format and kind of template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ktmerge.commands import app
from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners.data import ChatSample, Message, PlainSample, Sample, read_data
from ktmerge.tuners.encode import Encoded, Encoder, SampleError, encode_all
from ktmerge.tuners.preview import preview

STOP = "<|im_end|>"
QUESTION, ANSWER = "What is the capital of France?", "Paris, of course."
FORMATS = {
    "messages": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "prompt_completion": {"prompt": QUESTION, "completion": " " + ANSWER},
}
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # marks that leave the stop token out, as published ones do
    "marked": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}",
    # closes the answer and the turn
    "two stops": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|><|pad|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # marks that take the stop token and the line end in
    "marked whole": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}",
    # refuses a conversation without a user, so there is no rendering of the part before the first answer alone
    "strict": "{% if messages|length < 2 %}{{ raise_exception('too short') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content|trim + '<|im_end|>\n' }}{% endfor %}",
    # says something else at the end, so no part of it is how the whole begins
    "counting": "{{ messages|length }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
}
ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.fixture
def encoder(tiny_llama: Path) -> Encoder:
    return Encoder.load(tiny_llama)


def with_template(base: Path, template: str | None) -> Encoder:
    encoder = Encoder.load(base)
    encoder.tokenizer.chat_template = template
    return Encoder(encoder.tokenizer, [encoder.tokenizer.eos_token_id])


def runs(encoder: Encoder, encoded: Encoded) -> list[str]:
    """The trained stretches as text."""
    found: list[list[int]] = []
    before = 0
    for token, trained in zip(encoded.ids, encoded.trained, strict=True):
        if trained and not before:
            found.append([])
        if trained:
            found[-1].append(token)
        before = trained
    return [encoder.tokenizer.decode(run) for run in found]


def chat(*turns: str, trained_from: int = 0) -> ChatSample:
    """user, assistant, user, ..."""
    roles = ("user", "assistant")
    return ChatSample(tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns)), "x", trained_from)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_trains_answer_and_stop(tmp_path: Path, encoder: Encoder, name: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(FORMATS[name]))
    (sample,) = read_data(["a.jsonl"], tmp_path).samples
    encoded = encoder.encode(sample)
    text = encoder.tokenizer.decode(list(encoded.ids))
    answer = ANSWER if name != "prompt_completion" else " " + ANSWER
    assert runs(encoder, encoded) == [answer + STOP]
    assert QUESTION in text
    assert text.startswith("<|im_start|>user" if name != "prompt_completion" else QUESTION)


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_every_kind_of_template_trains_each_answer_and_its_stop(tiny_llama: Path, template: str) -> None:
    encoder = with_template(tiny_llama, TEMPLATES[template])
    sample = chat("one two", "yes", "yes? is yes a yes", "yes yes", "and now", "no")
    assert runs(encoder, encoder.encode(sample)) == ["yes" + STOP, "yes yes" + STOP, "no" + STOP]
    unknown = Encoder(encoder.tokenizer, [encoder.tokenizer.convert_tokens_to_ids("a")])
    end = STOP + "<|pad|>" if template == "two stops" else STOP
    assert runs(unknown, unknown.encode(sample)) == ["yes" + end, "yes yes" + end, "no" + end]


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_earlier_answers_of_a_prompt_are_not_trained(tiny_llama: Path, template: str) -> None:
    encoder = with_template(tiny_llama, TEMPLATES[template])
    sample = chat("one", "yes", "two", "no", trained_from=3)
    assert runs(encoder, encoder.encode(sample)) == ["no" + STOP]


def test_a_template_without_end_gets_the_stop_token(tiny_llama: Path) -> None:
    encoder = with_template(tiny_llama, ENDLESS)
    encoded = encoder.encode(chat("one", "yes", "two", "no"))
    assert encoder.tokenizer.decode(list(encoded.ids)) == "user: one\nassistant: yes\nuser: two\nassistant: no" + STOP
    # the space before an answer is part of its first token
    assert runs(encoder, encoded) == [" yes\n", " no" + STOP]


def test_a_stop_token_that_is_not_the_eos_of_the_tokenizer(tiny_llama: Path) -> None:
    """As in base models with a ChatML template, whose configured end of text is another token."""
    encoder = Encoder.load(tiny_llama)
    pad = encoder.tokenizer.pad_token_id
    other = Encoder(encoder.tokenizer, [pad])
    assert runs(other, other.encode(chat("one", "yes"))) == ["yes" + STOP]


def test_a_token_that_straddles_the_border_is_trained(encoder: Encoder) -> None:
    encoded = encoder.encode(PlainSample("The capital of ", "France", "x"))
    whole = encoder.tokenizer("The capital of France")["input_ids"]
    assert list(encoded.ids) == [*whole, encoder.tokenizer.eos_token_id]
    assert runs(encoder, encoded) == [" France" + STOP]


def test_characters_of_several_tokens_are_kept_whole(encoder: Encoder) -> None:
    encoded = encoder.encode(PlainSample("日本? ", "日本 é", "x"))
    assert runs(encoder, encoded)[0].strip() == "日本 é" + STOP


def test_a_completion_that_ends_itself_gets_no_second_stop(encoder: Encoder) -> None:
    encoded = encoder.encode(PlainSample("one", " two" + STOP, "x"))
    assert list(encoded.ids).count(encoder.tokenizer.eos_token_id) == 1


def test_without_offsets_the_same_tokens_are_trained(encoder: Encoder) -> None:
    class Slow:
        """The tokenizer without what only fast ones offer."""

        is_fast = False

        def __getattr__(self, name: str) -> object:
            return getattr(encoder.tokenizer, name)

        def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
            assert "return_offsets_mapping" not in kwargs
            return {"input_ids": encoder.tokenizer(text, **kwargs)["input_ids"]}

    slow = Encoder(Slow(), [encoder.tokenizer.eos_token_id])
    samples: list[Sample] = [chat("one", "yes", "two", "no no"), PlainSample("The capital of ", "France", "x")]
    for sample in samples:
        assert slow.encode(sample) == encoder.encode(sample)


def test_over_long_samples_are_dropped_whole(encoder: Encoder) -> None:
    samples: list[Sample] = [PlainSample("one", " two" * n, "x") for n in (1, 50, 2)]
    found = encode_all(encoder, samples, max_length=20)
    assert found.dropped == 1
    assert found.samples == [encoder.encode(samples[0]), encoder.encode(samples[2])]
    assert found.longest == max(map(len, found.samples))
    assert found.tokens == sum(map(len, found.samples))
    assert found.trained_tokens == sum(sum(one.trained) for one in found.samples)


def test_nothing_left_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(UsageError, match=r"all 2 samples are longer than 8 tokens \(the shortest has"):
        encode_all(encoder, [PlainSample("one", " two" * 50, "x")] * 2, max_length=8)


def test_conversations_need_a_template(tiny_llama: Path) -> None:
    encoder = with_template(tiny_llama, None)
    encoder.require_template([PlainSample("a", "b", "x")])
    with pytest.raises(UsageError, match=r"no chat template\. Give prompt-completion data"):
        encoder.require_template([chat("a", "b")])


def test_what_a_template_refuses_is_told_by_row(tiny_llama: Path) -> None:
    encoder = with_template(tiny_llama, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="x: the chat template refuses it: roles must alternate"):
        encode_all(encoder, [chat("a", "b")], 100)
    silent = with_template(tiny_llama, "{{ messages[0].content }}")
    with pytest.raises(SampleError, match="does not show the answer of turn 2"):
        silent.encode(chat("a", "b"))


def test_a_template_that_wants_parts_is_refused_rather_than_trained_without_answers(tiny_llama: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{% for part in m.content if part.type == 'text' %}{{ part.text }}"
    for opening, closing in (("", ""), ("{% generation %}", "{% endgeneration %}")):
        encoder = with_template(tiny_llama, f"{template}{{% endfor %}}{opening}<|im_end|>{closing}{{% endfor %}}")
        with pytest.raises(SampleError, match="does not show"):
            encoder.encode(chat("one", "yes"))


def test_thoughts_that_the_template_drops_are_no_part_of_the_answer(tiny_llama: Path) -> None:
    encoder = with_template(
        tiny_llama, TEMPLATES["chatml"].replace("m.content", "m.content.split('</think>')[-1].lstrip('\\n')")
    )
    encoded = encoder.encode(chat("one", "<think>two or three</think>\n\nyes"))
    assert runs(encoder, encoded) == ["yes" + STOP]


def test_the_first_token_is_never_trained(encoder: Encoder) -> None:
    """Nothing comes before it; the Trainer counts it for some models, and divides by the count."""
    encoded = encoder.encode(PlainSample("", "yes no", "x"))
    assert not encoded.trained[0]
    assert all(encoded.trained[1:])


def test_a_text_that_the_tokenizer_makes_nothing_of_is_named() -> None:
    """A vocabulary of letters, without a token for those that are missing, leaves them out."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")
    with pytest.raises(SampleError, match="no token to learn"):
        Encoder(tokenizer, [1]).encode(PlainSample("", "β", "x:1"))


def test_a_foreign_tokenizer_is_noticed(tiny_llama: Path) -> None:
    encoder = Encoder.load(tiny_llama)
    small = Encoder(encoder.tokenizer, [2], vocabulary=10)
    with pytest.raises(SampleError, match="the model knows only 10"):
        small.encode(PlainSample("one", " two", "x"))


def test_a_base_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="its tokenizer cannot be loaded"):
        Encoder.load(tmp_path)


def test_a_broken_tokenizer_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "base")
    (tmp_path / "base/tokenizer_config.json").write_text("[]")
    with pytest.raises(UsageError, match="its tokenizer cannot be loaded"):
        Encoder.load(tmp_path / "base")


def test_preview_shows_text_and_flags(tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"prompt": "日本 Q", "completion": " 日 A"}, {"prompt": "long", "completion": " long" * 9}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = preview(FinetuneJob(data=["a.jsonl"], max_length=24), tiny_llama, 2, tmp_path)
    assert len(shown) == 2
    assert "".join(text for text, _ in shown[0].tokens) == "日本 Q 日 A" + STOP
    assert "".join(text for text, trained in shown[0].tokens if trained) == " 日 A" + STOP
    assert [one.dropped for one in shown] == [False, True]
    assert shown[0].where == "a.jsonl:1"
    command = ["finetune", "--base", str(tiny_llama), "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o")]
    told = json.loads(CliRunner().invoke(app, [*command, "--preview", "2", "--json"]).stdout)
    assert list(told) == ["o"]
    for one, sample in zip(told["o"], shown, strict=True):
        assert [(token["text"], token["trained"]) for token in one["tokens"]] == sample.tokens
        assert not one["dropped"]  # max_length is what it is by default


def test_preview_knows_the_context_of_the_model(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Q", "completion": "a b " * 300}))
    (shown,) = preview(FinetuneJob(data=["a.jsonl"]), tiny_llama, 1, tmp_path)
    assert 512 < len(shown.tokens) < 2048
    assert shown.dropped
