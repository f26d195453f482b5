"""Measured statistics against models run by hand; the same whatever else is measured; the same bytes after a kill."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tuning import CHATS, ROWS, write

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.statistics import FISHER, INPUTS, RECORD, Statistics
from ktmerge.errors import KtmergeError, UsageError
from ktmerge.recipes.schema import Statistics as Job
from ktmerge.tuners.data import read_data
from ktmerge.tuners.encode import Encoded, Encoder
from ktmerge.tuners.statistics import StatisticsReport, measure
from ktmerge.tuners.statistics.reservoir import Reservoir, priorities
from ktmerge.tuners.statistics.scales import Scales

QUERY, KEY = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"
GATE, DOWN = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"


def made(model: Path, folder: Path, out: str = "stats", /, **settings: Any) -> StatisticsReport:
    write(folder / "rows.jsonl", settings.pop("rows", ROWS))
    flags = {name: settings.pop(name) for name in ("overwrite", "resume") if name in settings}
    job = Job.model_validate({"data": ["rows.jsonl"], **settings} if "self_generate" not in settings else settings)
    return measure(job, model, folder / out, folder=folder, **flags)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encoded_rows(model: Path, folder: Path, count: int = len(ROWS)) -> list[Encoded]:
    encoder = Encoder.load(model)
    return [encoder.encode(sample) for sample in read_data(["rows.jsonl"], folder).samples[:count]]


def in_float64(path: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def by_hand(path: Path, texts: list[Encoded]) -> dict[str, torch.Tensor]:
    """What layer 1's maps are given, from the formulas of the Llama block, all texts padded into one batch."""
    model = in_float64(path)
    longest = max(map(len, texts))
    ids, mask = (torch.zeros(len(texts), longest, dtype=torch.int64) for _ in range(2))
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text.ids)
        mask[row, : len(text)] = 1
    layer = model.model.layers[1]
    middle: list[torch.Tensor] = []
    layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: middle.append(args[0]))
    with torch.no_grad():
        before = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]

    def normed(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale * values / (values.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()

    query = normed(before, layer.input_layernorm.weight)[mask.bool()]
    gate = normed(middle[0], layer.post_attention_layernorm.weight)[mask.bool()]
    gated = gate @ layer.mlp.gate_proj.weight.T
    down = gated / (1 + (-gated).exp()) * (gate @ layer.mlp.up_proj.weight.T)
    return {QUERY: query.detach(), GATE: gate.detach(), DOWN: down.detach()}


def test_samples_and_means_are_what_the_maps_are_given(tiny_llama: Path, tmp_path: Path) -> None:
    made(tiny_llama, tmp_path, rows=ROWS[:8], dtype="float32", tokens=4096)
    found = load_file(tmp_path / "stats" / INPUTS)
    for name, rows in by_hand(tiny_llama, encoded_rows(tiny_llama, tmp_path)).items():
        sample = found[f"sample/{name}"]
        assert sample.shape == rows.shape
        torch.testing.assert_close(sample.double(), rows, rtol=1e-4, atol=1e-5 * float(rows.abs().max()))
        torch.testing.assert_close(found[f"mean_square/{name}"].double(), rows.square().mean(0), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found[f"mean_absolute/{name}"].double(), rows.abs().mean(0), rtol=1e-4, atol=1e-9)
    statistics = Statistics.open(tmp_path / "stats")
    assert statistics.is_of(Checkpoint.open(tiny_llama))
    assert statistics.samples[KEY] == (QUERY,)
    assert len(statistics.samples) == 14
    assert not any("norm" in name or "embed" in name for name in statistics.samples)


@pytest.mark.slow
def test_scales_are_measured_by_what_they_multiply(tiny_llama: Path, tmp_path: Path) -> None:
    made(tiny_llama, tmp_path)
    model = in_float64(tiny_llama)
    seen: dict[str, list[torch.Tensor]] = {}
    for path, module in model.named_modules():
        if path.endswith("norm"):
            module.register_forward_hook(
                lambda one, args, out, path=path: seen.setdefault(f"{path}.weight", []).append(args[0][0])
            )
    for text in encoded_rows(tiny_llama, tmp_path):
        with torch.no_grad():
            model(torch.tensor([text.ids]))
    found, statistics = load_file(tmp_path / "stats" / INPUTS), Statistics.open(tmp_path / "stats")
    assert statistics.scales == set(seen)
    assert len(seen) == 5
    for name, rows in seen.items():
        values = torch.cat(rows)
        unit = values / (values.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        torch.testing.assert_close(found[f"mean_square/{name}"].double(), unit.square().mean(0), rtol=1e-4, atol=1e-9)


class _OneMore(torch.nn.Module):
    """A norm as Gemma's: its weight is a difference from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return (values / values.square().mean(-1, keepdim=True).sqrt()) * (1 + self.weight)


def test_norms_of_every_kind_are_measured_and_nothing_else() -> None:
    torch.manual_seed(0)
    layer = torch.nn.LayerNorm(6)
    model = torch.nn.Sequential(layer, torch.nn.Linear(6, 6), _OneMore(), torch.nn.BatchNorm1d(6)).eval()
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.zeros_(layer.weight)
    scales = Scales(model, {f"{number}.weight": f"stored.{number}" for number in range(4)})
    given = torch.randn(9, 6)
    with torch.no_grad():
        model(given[:4]), model(given[4:])
        scales.close()
        after = model[1](layer(given))
    assert scales.tokens() == {"stored.0": 9, "stored.2": 9}
    variance = given.var(-1, keepdim=True, correction=0)
    normed = (given - given.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(scales.mean_square("stored.0"), normed.square().mean(0))
    unit = after / after.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(scales.mean_square("stored.2"), unit.square().mean(0))


@pytest.mark.slow
def test_a_sample_is_some_of_the_rows_the_same_tokens_everywhere(tiny_llama: Path, tmp_path: Path) -> None:
    made(tiny_llama, tmp_path, "all", dtype="float32", tokens=4096)
    made(tiny_llama, tmp_path, "some", dtype="float16", tokens=20)
    every, some = (load_file(tmp_path / name / INPUTS) for name in ("all", "some"))
    same = torch.ones(20, len(every[f"sample/{QUERY}"]), dtype=torch.bool)
    for name in (QUERY, GATE, DOWN):
        whole, part = every[f"sample/{name}"].half(), some[f"sample/{name}"]
        assert part.dtype == torch.float16
        assert part.shape == (20, whole.shape[1])
        same &= (part[:, None] == whole[None]).all(-1)
        assert every[f"mean_square/{name}"].equal(some[f"mean_square/{name}"])
    last = -1
    for row in same:  # one place after the other, and the same in all three
        last = next(place for place in row.nonzero()[:, 0].tolist() if place > last)


@pytest.mark.slow
def test_inputs_do_not_depend_on_what_else_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    made(tiny_llama, tmp_path, "alone", tokens=30, samples=9)
    made(tiny_llama, tmp_path, "both", tokens=30, samples=9, fisher="empirical")
    alone, both = (load_file(tmp_path / name / INPUTS) for name in ("alone", "both"))
    assert alone.keys() == both.keys()
    for name in alone:
        torch.testing.assert_close(alone[name], both[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_rows_are_drawn_evenly_and_however_they_arrive(tmp_path: Path) -> None:
    rows, keep, trials = 40, 10, 100
    values = torch.arange(rows, dtype=torch.float32)[:, None]
    counts = np.zeros(rows)
    for seed in range(trials):
        kept = []
        for number, cuts in enumerate(((0, 40), (0, 7, 8, 31, 40))):
            one = Reservoir(tmp_path / f"{seed}-{number}", keep, 1)
            for start, stop in pairwise(cuts):
                chances = priorities(seed, "text", 3, stop)[start:]
                one.add(values[start:stop], chances, 3, np.arange(start, stop))
            kept.append(one.sample()[:, 0].tolist())
            assert one.count == rows
        assert kept[0] == kept[1] == sorted(kept[0])
        assert len(set(kept[0])) == keep
        counts[[int(value) for value in kept[0]]] += 1
    share = keep / rows
    deviations = (counts - trials * share) / (trials * share * (1 - share)) ** 0.5
    assert np.abs(deviations).max() < 4.5
    assert 0.4 < (deviations**2).mean() < 1.8


def test_thousands_of_samples_need_few_open_files(tmp_path: Path) -> None:
    """A mixture has one for each expert of each layer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        many = [Reservoir(tmp_path / str(number), 4, 3) for number in range(60)]
        for number, one in enumerate(many):
            one.add(torch.full((2, 3), float(number)), priorities(0, "text", 0, 2), 0, np.arange(2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [one.sample().unique().tolist() for one in many] == [[float(number)] for number in range(60)]


def test_a_scratch_file_that_lost_rows_is_noticed(tmp_path: Path) -> None:
    one = Reservoir(tmp_path / "rows", 4, 3)
    one.add(torch.ones(2, 3), priorities(0, "text", 0, 2), 0, np.arange(2))
    state = one.state()
    (tmp_path / "rows").write_bytes(b"")
    with pytest.raises(KtmergeError, match="lacks rows"):
        Reservoir(tmp_path / "rows", 4, 3).restore(state)


def test_fisher_is_the_mean_of_each_examples_squared_gradient(tiny_llama: Path, tmp_path: Path) -> None:
    report = made(tiny_llama, tmp_path, rows=ROWS[:8], fisher="empirical", samples=8)
    model = in_float64(tiny_llama)
    texts = encoded_rows(tiny_llama, tmp_path)
    expected = {name: torch.zeros_like(values) for name, values in model.named_parameters()}
    for text in texts:
        model.zero_grad()
        ids = torch.tensor(text.ids)
        logits = model(ids[None]).logits[0].log_softmax(-1)
        total = sum(logits[n - 1, ids[n]] for n in range(1, len(text)) if text.trained[n])
        total.backward()  # type: ignore[union-attr]
        for name, values in model.named_parameters():
            expected[name] += values.grad**2 / len(texts)
    found = load_file(tmp_path / "stats" / FISHER)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name].double(), values, rtol=1e-3, atol=1e-6 * float(values.max()), msg=lambda text, n=name: n + text
        )
    norm = sum(float(values.square().sum()) for values in expected.values()) ** 0.5
    assert Statistics.open(tmp_path / "stats").fisher_norm == pytest.approx(norm, rel=1e-4)
    assert report.record["fisher"]["examples"] == len(texts) == 8


@pytest.mark.slow
def test_drawn_answers_are_the_models_and_the_seeds(tiny_llama: Path, tmp_path: Path) -> None:
    for out, seed in (("one", 1), ("again", 1), ("two", 2)):
        made(tiny_llama, tmp_path, out, fisher="sampled", seed=seed, samples=len(ROWS))
    one, again, two = (load_file(tmp_path / out / FISHER) for out in ("one", "again", "two"))
    assert all(one[name].equal(again[name]) for name in one)
    assert not one[GATE].equal(two[GATE])
    # E[g] = 0 over the model's own answers: the expected square of a last-layer gradient has a closed form
    model = in_float64(tiny_llama)
    norm = "model.norm.weight"
    expected = torch.zeros_like(model.model.norm.weight)
    draws = torch.zeros_like(expected)
    for text in encoded_rows(tiny_llama, tmp_path):
        ids, answer = torch.tensor(text.ids), [n - 1 for n in range(1, len(text)) if text.trained[n]]
        with torch.no_grad():
            found = model(ids[None], output_hidden_states=True)
            plain = found.hidden_states[-1][0, answer] / model.model.norm.weight
            chances = found.logits[0, answer].softmax(-1)
            head = model.lm_head.weight
            spread = chances @ head.square() - (chances @ head).square()  # variance of the head's rows under the model
            expected += (plain.square() * spread).sum(0) / len(ROWS)
    for out in ("one", "two"):
        draws += load_file(tmp_path / out / FISHER)[norm].double() / 2
    assert float(draws.sum() / expected.sum()) == pytest.approx(1.0, abs=0.25)


@pytest.mark.slow
def test_rows_are_drawn_by_the_seed(tiny_llama: Path, tmp_path: Path) -> None:
    counts = [made(tiny_llama, tmp_path, f"s{seed}", samples=5, seed=seed).record["tokens"][QUERY] for seed in range(4)]
    assert made(tiny_llama, tmp_path, "again", samples=5, seed=3).record["tokens"][QUERY] == counts[3]
    assert len(set(counts)) > 1


@pytest.mark.slow
def test_a_model_is_measured_on_texts_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    first = made(tiny_llama, tmp_path, "one", self_generate=4, max_length=24)
    made(tiny_llama, tmp_path, "two", self_generate=4, max_length=24)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert first.record["examples"] == 4
    assert 8 <= first.record["tokens"][QUERY] <= 96


def test_conversations_are_read_as_for_a_fine_tune(tiny_llama: Path, tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl", CHATS)
    report = made(tiny_llama, tmp_path, data=["chats.jsonl"])
    assert report.record["examples"] == len(CHATS)
    assert report.pairs()["inputs"].startswith("8 distinct, of 14 linear maps")


KILLED = """
import os, signal, sys
from pathlib import Path
from ktmerge.recipes.schema import Statistics
from ktmerge.tuners.statistics import collector, measure
module = sys.modules["ktmerge.tuners.statistics.measure"]
module.SAVE_SECONDS = 0.0
proper = collector.Collector.observe
def observe(self, number, example):
    proper(self, number, example)
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
collector.Collector.observe = observe
job = Statistics(data=["rows.jsonl"], tokens=30, fisher="sampled")
measure(job, Path(sys.argv[1]), Path(sys.argv[2]) / "killed", folder=Path(sys.argv[2]), resume=True)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    settings = {"tokens": 30, "fisher": "sampled"}
    made(tiny_llama, tmp_path, "whole", **settings)
    for last in (2, 17, 18):
        command = [sys.executable, "-c", KILLED, str(tiny_llama), str(tmp_path), str(last)]
        done = subprocess.run(command, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert not (tmp_path / "killed").exists()
    with pytest.raises(UsageError, match="an earlier run stopped here"):
        made(tiny_llama, tmp_path, "killed", **settings)
    with pytest.raises(UsageError, match="tokens was 30, now 31"):
        made(tiny_llama, tmp_path, "killed", resume=True, **{**settings, "tokens": 31})
    made(tiny_llama, tmp_path, "killed", resume=True, **settings)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert not (tmp_path / "killed.partial").exists()


@pytest.mark.slow
def test_what_is_there_is_kept_or_refused(tiny_llama: Path, tmp_path: Path) -> None:
    made(tiny_llama, tmp_path, tokens=8)
    before = (tmp_path / "stats" / RECORD).stat().st_mtime_ns
    made(tiny_llama, tmp_path, tokens=8, resume=True)
    assert (tmp_path / "stats" / RECORD).stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="exists and is not empty"):
        made(tiny_llama, tmp_path, tokens=8)
    with pytest.raises(UsageError, match="tokens was 8, now 9"):
        made(tiny_llama, tmp_path, tokens=9, resume=True)
    weights = tmp_path / "stats" / INPUTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UsageError, match="has been changed or cut off since"):
        made(tiny_llama, tmp_path, tokens=8, resume=True)
    made(tiny_llama, tmp_path, tokens=9, overwrite=True)
    assert load_file(tmp_path / "stats" / INPUTS)[f"sample/{QUERY}"].shape[0] == 9


def test_refusals(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ktmerge.cli import _exit_code

    write(tmp_path / "rows.jsonl", ROWS)
    rows, out, model = str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), str(tiny_llama)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    write(tmp_path / "seeing.jsonl", [{**ROWS[0], "images": ["none.png"]}])
    cases = {
        "nothing to measure on": [model, "--out", out],
        "give either --recipe": ["--data", rows],
        "belong to 'ktmerge stats' without --recipe": [model, "--recipe", "ties"],
        "the recipe says of no statistics how to make them": ["--recipe", "ties"],
        "statistics: fisher: input should be": [model, "--data", rows, "--out", out, "--fisher", "exact"],
        "no such file": [model, "--data", "nowhere.jsonl", "--out", out],
        "one of the inputs": [model, "--data", rows, "--out", model],
        "is an adapter": [str(adapter), "--data", rows, "--out", out],
        "takes text alone": [model, "--data", str(tmp_path / "seeing.jsonl"), "--out", out],
        "no row of the data names an image": [model, "--data", rows, "--out", out, "--images", str(tmp_path)],
        "give either data or self_generate": [model, "--data", rows, "--out", out, "--self-generate", "2"],
        "unknown key 'token'": [model, "--data", rows, "--out", out, "--set", "token=3"],
        "are longer than 8 tokens": [model, "--data", rows, "--out", out, "--set", "max_length=8"],
    }
    for sentence, arguments in cases.items():
        write(tmp_path / "rows.jsonl", [{"prompt": "Is it good? " * 9, "completion": "yes"}])
        assert _exit_code(["stats", *arguments]) == 2, sentence
        said = " ".join(capsys.readouterr().err.split())
        assert sentence in said, said
    assert not Path(out).exists()


@pytest.mark.slow
def test_an_adapter_is_measured_as_the_model_it_makes(tiny_llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from ktmerge import api
    from ktmerge.checkpoints.opening import open_model

    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    adapted: Any = get_peft_model(model, config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    dense = tmp_path / "dense"
    adapted.merge_and_unload().save_pretrained(str(dense))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense / name).write_bytes((tiny_llama / name).read_bytes())
    settings = {"fisher": "empirical", "samples": 9}
    expected = made(dense, tmp_path, "expected", **settings).out
    api.measure(
        f"{tiny_llama}+{tmp_path / 'adapter'}", tmp_path / "rows.jsonl", tmp_path / "stats", device="cpu", **settings
    )
    plain = load_file(made(tiny_llama, tmp_path, "plain", **settings).out / INPUTS)
    for file in (INPUTS, FISHER):
        found, wanted = load_file(tmp_path / "stats" / file), load_file(expected / file)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-5)
    measured = load_file(tmp_path / "stats" / INPUTS)
    assert any(not torch.allclose(values, plain[name], rtol=1e-2) for name, values in measured.items())
    folded = open_model("+".join((str(tiny_llama), str(tmp_path / "adapter"))), tmp_path)
    assert Statistics.open(tmp_path / "stats").is_of(folded)
    assert not Statistics.open(tmp_path / "stats").is_of(Checkpoint.open(tiny_llama))


@pytest.mark.slow
def test_statistics_are_made_on_the_way_of_a_recipe(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ktmerge import load_recipe, pipeline

    write(tmp_path / "rows.jsonl", ROWS)
    job = {"data": ["rows.jsonl"], "max_steps": 1, "batch_size": 2, "precision": "float32"}
    document = {
        "ktmerge": 1,
        "base": str(tiny_llama),
        "statistics": {"data": "rows.jsonl", "tokens": 16},
        "experts": {"a": {"model": "runs/a", "statistics": {"tokens": 16, "folder": "measured/a"}}},
        "finetune": {"experts": {"a": job}},
        "blend": {"method": "linear"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(document))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    result = pipeline.run(recipe, tmp_path / "out")
    assert result.statistics == {"base": tmp_path / "stats/base", "a": tmp_path / "measured/a"}
    for name, model in (("base", tiny_llama), ("a", tmp_path / "runs/a")):
        assert Statistics.open(result.statistics[name]).is_of(Checkpoint.open(model))
    before = files_of(tmp_path / "measured/a")
    stamp = (tmp_path / "measured/a" / RECORD).stat().st_mtime_ns
    pipeline.run(recipe, tmp_path / "out", resume=True)
    assert files_of(tmp_path / "measured/a") == before
    assert (tmp_path / "measured/a" / RECORD).stat().st_mtime_ns == stamp
