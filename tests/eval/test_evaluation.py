"""Whole runs on the tiny model, from checkpoint folders to scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.eval import encode_sets, evaluate, generations, read_sets, score_model
from ktmerge.eval.evaluation import require_scorable
from ktmerge.eval.results import Results
from ktmerge.progress import Unit
from ktmerge.recipes.suites import Suite


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.done: dict[str, list[float]] = {}
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, total: float | None, unit: Unit = "items") -> Iterator[Any]:
        self.done[description] = [total or 0, 0]
        kept = self.done[description]

        class Step:
            def advance(self, amount: float = 1) -> None:
                kept[1] += amount

        yield Step()

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_scores_of_every_kind(results: Results, tiny_llama: Path) -> None:
    assert list(results.models) == ["base", "tuned"]  # the base first, however it was given
    assert [task.name for task in results.tasks] == ["facts", "prose", "verdict", "say"]
    assert [task.side for task in results.tasks] == ["upstream", "upstream", "downstream", "downstream"]
    for tasks in results.scores.values():
        assert [len(tasks[name].scores) for name in ("facts", "verdict", "say")] == [12, 12, 12]
        prose = tasks["prose"].details
        assert tasks["prose"].scores.tolist() == [c / n for c, n in zip(prose["correct"], prose["tokens"], strict=True)]
        assert len(tasks["say"].details["outputs"]) == 12
        assert all(len(own) == 3 for own in tasks["facts"].details["logprobs"])
    assert results.scores["base"]["facts"].details != results.scores["tuned"]["facts"].details
    base = results.models["base"]
    assert (base.path, base.device, base.dtype) == (str(tiny_llama), "cpu", "float32")
    assert base.digest is not None
    assert base.digest != results.models["tuned"].digest
    assert {"ktmerge", "torch", "transformers", "tokenizers", "numpy", "python"} == set(results.versions)
    assert results.summary.models["tuned"].O is not None


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores_do_not_depend_on_the_batch_size(
    results: Results, tiny_llama: Path, tuned_llama: Path, suite: Suite, batch_size: int
) -> None:
    again = evaluate({"base": tiny_llama, "tuned": tuned_llama}, suite, batch_size=batch_size, device="cpu")
    for name, tasks in results.scores.items():
        for task, score in tasks.items():
            other = again.scores[name][task]
            np.testing.assert_array_equal(score.scores, other.scores)
            for column in score.details.keys() & {"outputs", "correct", "bytes", "tokens"}:
                assert score.details[column] == other.details[column]
            for column in score.details.keys() & {"logprobs", "nll"}:
                np.testing.assert_allclose(score.details[column], other.details[column], atol=1e-4)


def test_in_memory_equals_on_disk(results: Results, llama: Any, tokenizer: Any, suite: Suite) -> None:
    sets = read_sets(suite)
    llama.train()
    found = score_model(llama, tokenizer, sets, encoded=encode_sets(sets, tokenizer, 512))
    assert llama.training
    llama.eval()
    for task, score in results.scores["base"].items():
        np.testing.assert_array_equal(found[task].scores, score.scores)
        assert found[task].details.keys() == score.details.keys()
    assert score_model(llama, tokenizer, suite)["facts"].scores.tolist() == found["facts"].scores.tolist()


def test_perplexity_per_byte_against_a_plain_computation(results: Results, llama: Any, tokenizer: Any) -> None:
    """All chunks of 'prose' by hand: every token but each chunk's first, over the bytes they stand for."""
    text = "The quick brown fox jumps over the lazy dog. " * 5
    ids = tokenizer.encode(text)
    count = -(-len(ids) // 24)
    bounds = [len(ids) * i // count for i in range(count + 1)]
    nll, size, hits = 0.0, 0, []
    for start, stop in pairwise(bounds):
        chunk = ids[start:stop]
        with torch.no_grad():
            logits = llama(torch.tensor([chunk])).logits[0].double().numpy()
        logp = (
            logits
            - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
            - logits.max(1, keepdims=True)
        )
        nll -= sum(logp[i, token] for i, token in enumerate(chunk[1:]))
        hits.append(float(np.mean([logp[i].argmax() == token for i, token in enumerate(chunk[1:])])))
        size += len(tokenizer.decode(chunk[1:]).encode())
    score = results.scores["base"]["prose"]
    assert score.extras()["perplexity_per_byte"] == pytest.approx(np.exp(nll / size), rel=1e-5)
    np.testing.assert_allclose(score.scores, hits * 3)


@pytest.mark.slow
def test_progress_counts_items(tiny_llama: Path, suite: Suite) -> None:
    progress = Recorder()
    evaluate({"base": tiny_llama}, suite, bootstrap=100, device="cpu", progress=progress)
    scored = {name: counts for name, counts in progress.done.items() if name.startswith("base: ")}
    assert set(scored) == {"base: facts", "base: prose", "base: verdict", "base: say"}
    assert scored["base: facts"] == pytest.approx([12, 12])
    assert all(done == pytest.approx(total) for total, done in scored.values())


def test_digests_follow_content_not_place(results: Results, suite: Suite, tiny_llama: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("facts.jsonl", "prose.jsonl"):
        shutil.copy(suite.folder / name, moved / f"copy-{name}")
    document = suite.model_dump(exclude_unset=True, exclude={"folder"})
    for side in ("upstream", "downstream"):
        for task in document[side]:
            task["data"] = f"elsewhere/copy-{task['data']}"
    same = Suite(**document, folder=tmp_path)
    assert [one.digest for one in read_sets(same)] == [task.digest for task in results.tasks]
    document["upstream"][0]["prompt"] += " "
    changed = [one.digest for one in read_sets(Suite(**document, folder=tmp_path))]
    assert [a == b.digest for a, b in zip(changed, results.tasks, strict=True)] == [False, True, True, True]


def no_model_may_be_loaded(*_: Any, **__: Any) -> Any:
    pytest.fail("a model was loaded before the mistake was found")


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t[0].update(prompt="{{ question }}"),
            "task 'facts', prompt: .*facts.jsonl:1 has no column 'question'",
        ),
        (lambda t: t[1].update(data="prse.jsonl"), "Did you mean 'prose.jsonl'"),
        (lambda t: t[2].update(answer="maybe"), "none of its choices"),
        (lambda t: t[1].update(chunk_tokens=4096), "chunk_tokens is 4096, the model reads 512"),
        (lambda t: t[3].update(max_new_tokens=600), "max_new_tokens is 600"),
    ],
)
def test_mistakes_are_found_before_any_model_is_loaded(
    tiny_llama: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch, change: Change, said: str
) -> None:
    document = suite.model_dump(exclude={"folder"}, exclude_unset=True)
    change([*document["upstream"], *document["downstream"]])
    monkeypatch.setattr("ktmerge.eval.subject.load_model", no_model_may_be_loaded)
    with pytest.raises(UsageError, match=said):
        evaluate({"base": tiny_llama}, Suite(**document, folder=suite.folder))


def test_wrong_models_are_named(tiny_llama: Path, suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the base 'base' is not among the models\. Did you mean 'bas'"):
        evaluate({"bas": tiny_llama}, suite)
    with pytest.raises(UsageError, match="the reference 'x' is not among"):
        evaluate({"base": tiny_llama}, suite, reference="x")
    with pytest.raises(UsageError, match="device 'tpu'"):
        evaluate({"base": tiny_llama}, suite, device="tpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        evaluate({"base": tiny_llama, "m": tmp_path / "empty"}, suite)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            evaluate({"base": tiny_llama}, suite, device="cuda")


def changed_copy(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    document = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(document | config))
    return target


def test_weights_that_are_not_there_are_refused(tiny_llama: Path, suite: Suite, tmp_path: Path) -> None:
    deeper = changed_copy(tiny_llama, tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(UsageError, match="tensors of the model are in no file"):
        evaluate({"base": deeper}, suite, device="cpu")
    wider = changed_copy(tiny_llama, tmp_path / "wider", hidden_size=128)
    with pytest.raises(UsageError, match="cannot load"):
        evaluate({"base": wider}, suite, device="cpu")
    strange = changed_copy(tiny_llama, tmp_path / "strange", model_type="nosuch", architectures=["Nosuch"])
    with pytest.raises(UsageError):
        evaluate({"base": strange}, suite, device="cpu")


KINDS = {
    "facts": r"facts\.jsonl:\d+, item \d+",
    "prose": r"prose\.jsonl:[123], item \d+",
    "say": r"facts\.jsonl:\d+, item \d+",
}


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", KINDS)
def test_broken_weights_name_model_task_and_row(tiny_llama: Path, suite: Suite, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    alone = Suite(upstream=[one for one in suite.tasks() if one.name == kind], folder=suite.folder)
    said = rf"^broken, task '{kind}', .*{KINDS[kind]}: the model's logits are not finite"
    with pytest.raises(KtmergeError, match=said) as caught:
        evaluate({"base": tiny_llama, "broken": broken}, alone, device="cpu")
    assert not isinstance(caught.value, UsageError)


def test_the_row_that_breaks_a_model_is_named(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A weight that only one row's token reaches."""
    import copy

    rows = ["The fox", "The dog", "Paris", "The fox"]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"q": row}) for row in rows))
    broken = copy.deepcopy(llama)
    broken.get_input_embeddings().weight = torch.nn.Parameter(broken.get_input_embeddings().weight.clone())
    (token, *_) = set(tokenizer.encode("Paris")) - {one for row in rows[:2] for one in tokenizer.encode(row)}
    broken.get_input_embeddings().weight.data[token] = float("nan")
    asked = {"data": "x.jsonl", "prompt": "{{ q }}", "answer": "0"}
    for task in ({"kind": "choice", "choices": ["a", "b"]}, {"kind": "generate", "max_new_tokens": 3}):
        one = Suite(upstream=[{"name": "t", **asked, **task}], folder=tmp_path)
        for batch_size in (None, 1):
            with pytest.raises(KtmergeError, match=r"task 't', .*x\.jsonl:3, item 3: the model's logits"):
                score_model(broken, tokenizer, one, batch_size=batch_size)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_is_refused(tiny_llama: Path, suite: Suite, tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    size = {"vocab_size": 400, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2,
            "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **size)).save_pretrained(tmp_path / family)
    for models in ({"base": tmp_path / family}, {"base": tiny_llama, "other": tmp_path / family}):
        with pytest.raises(UsageError, match=rf"{family}: is an encoder-decoder \({family}\); only models that go on"):
            evaluate(models, suite, device="cpu")


@pytest.mark.slow
def test_another_chat_template_is_used_and_warned_of(tiny_llama: Path, suite: Suite, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "human") + "{# #}")
    progress = Recorder()
    results = evaluate({"base": tiny_llama, "other": other}, suite, device="cpu", progress=progress)
    assert len(results.warnings) == 1
    assert "'other' has another tokenizer or chat template" in results.warnings[0]
    assert progress.notes == [f"warning: {results.warnings[0]}"]
    assert results.models["base"].tokenizer != results.models["other"].tokenizer


def test_prompts_cut_for_any_tokenizer_are_warned_of(tiny_llama: Path, suite: Suite, tmp_path: Path) -> None:
    from ktmerge.checkpoints.checkpoint import Checkpoint
    from ktmerge.eval.encodings import Encodings

    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ 'wordy ' * 600 + m.content }}{% endfor %}")
    asked = [one for one in read_sets(suite) if one.task.name == "verdict"]
    found = Encodings(asked, {name: Checkpoint.open(path) for name, path in (("b", tiny_llama), ("o", other))}, "b")
    assert found.warnings[1:] == ["task 'verdict': 12 prompts of 'o' were cut to fit the model."]


def test_another_vocabulary_cannot_be_paired_on_text(tiny_llama: Path, suite: Suite, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    document = json.loads((other / "tokenizer.json").read_text())
    document["model"]["merges"] = document["model"]["merges"][:20]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="task 'prose': 'other' has another tokenizer than 'base'"):
        evaluate({"base": tiny_llama, "other": other}, suite, device="cpu")


def test_only_one_side(tiny_llama: Path, tuned_llama: Path, suite: Suite) -> None:
    upstream = suite.model_copy(update={"downstream": []})
    results = evaluate({"base": tiny_llama, "tuned": tuned_llama}, upstream, bootstrap=200, device="cpu")
    summary = results.summary.models["tuned"]
    assert summary.E is None
    assert summary.O is None
    assert summary.F is not None


@pytest.mark.slow
def test_generations_side_by_side(tiny_llama: Path, tuned_llama: Path) -> None:
    prompts = ["The quick brown fox", "What is the capital of France?"]
    found = generations(
        {"base": tiny_llama, "tuned": tuned_llama}, prompts, max_new_tokens=6, notes=["a note"], device="cpu"
    )
    assert [one.prompt for one in found] == prompts
    assert [one.note for one in found] == ["a note", ""]
    assert all(list(one.outputs) == ["base", "tuned"] for one in found)


@pytest.mark.gpu
def test_on_cuda_in_bfloat16(tiny_llama: Path, tuned_llama: Path, suite: Suite, results: Results) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = evaluate({"base": tiny_llama, "tuned": tuned_llama}, suite, bootstrap=200, device="cuda")
    assert found.models["base"].dtype == "bfloat16"
    for name in found.models:
        logprobs = np.concatenate(found.scores[name]["facts"].details["logprobs"])
        expected = np.concatenate(results.scores[name]["facts"].details["logprobs"])
        np.testing.assert_allclose(logprobs, expected, atol=0.3)


def test_a_set_that_does_not_fit_the_base_is_found_without_a_model(tiny_llama: Path, suite: Suite) -> None:
    require_scorable(tiny_llama, suite)
    said = next(task for task in suite.downstream if task.name == "say").model_copy(update={"max_new_tokens": 4000})
    with pytest.raises(UsageError, match="task 'say': max_new_tokens is 4000"):
        require_scorable(tiny_llama, suite.model_copy(update={"downstream": [said]}))


OWN = {"peft_type": "KTMERGE", "kind": "bottleneck", "places": ["model.layers.0"], "width": 4}


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("config", "weights", "said"),
    [
        ({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}, {}, "not all of the adapter is in it"),
        ({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}, None, "PEFT cannot attach this adapter"),
        (OWN, {}, r"'model\.layers\.0\.bottleneck\.down\.bias' is not in adapter_model"),
        (OWN, None, "cannot be read"),
        ({"peft_type": "KTMERGE", "kind": "prompt", "shape": [-1, 4]}, {}, "does not fit this model"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(
    tiny_llama: Path, suite: Suite, tmp_path: Path, config: dict[str, Any], weights: Any, said: str
) -> None:
    """What is missing would be random, or nothing: the base would be scored in the adapter's name."""
    from safetensors.torch import save_file

    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    path = tmp_path / "adapter/adapter_model.safetensors"
    path.write_bytes(b"garbage") if weights is None else save_file(weights, path)
    alone = Suite(upstream=[one for one in suite.tasks() if one.name == "say"], folder=suite.folder)
    with pytest.raises(UsageError, match=said):
        evaluate({"base": tiny_llama, "adapted": tmp_path / "adapter"}, alone, device="cpu", cache=tmp_path / "cache")


@pytest.mark.parametrize("change", [{"hidden_size": "abc"}, {"num_attention_heads": 0}])
def test_a_configuration_that_makes_no_model_is_named(tiny_llama: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    from ktmerge.eval.loading import load_model

    shutil.copytree(tiny_llama, tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match="odd: transformers cannot load it"):
        load_model(tmp_path / "odd", torch.device("cpu"), torch.float32)
