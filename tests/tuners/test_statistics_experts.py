"""Statistics of mixtures of experts: each expert is measured on the tokens that are sent to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tuning import ROWS, write

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.statistics import FISHER, INPUTS, Statistics
from ktmerge.merge import blend
from ktmerge.merge.planning import plan_blend
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Statistics as Job
from ktmerge.tuners.data import read_data
from ktmerge.tuners.encode import Encoder
from ktmerge.tuners.statistics import measure

EXPERTS, LAYER = 4, "model.layers.1.mlp"


@pytest.fixture(scope="module")
def mixtures(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random mixture of 4 experts, 2 a token: with experts saved one by one, and stacked as they are in memory."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_experts=EXPERTS,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
    folder = tmp_path_factory.mktemp("mixtures")
    for name in ("single", "stacked"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "stacked" / "model.safetensors")
    return {name: folder / name for name in ("single", "stacked")}


def by_hand(path: Path, folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, torch.Tensor]]:
    """Of layer 1: what each expert is given, what its down projection is given, and the Fisher information."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    experts = model.model.layers[1].mlp.experts
    calls: list[Any] = []
    experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    fisher = {name: torch.zeros_like(values) for name, values in model.named_parameters()}
    encoder = Encoder.load(path)
    texts = [encoder.encode(sample) for sample in read_data(["rows.jsonl"], folder).samples]
    for text in texts:
        ids, trained = torch.tensor(text.ids), torch.tensor(list(text.trained), dtype=torch.bool)
        model.zero_grad()
        scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
        scores.gather(1, ids[1:, None])[trained[1:]].sum().backward()
        for name, values in model.named_parameters():
            fisher[name] += values.grad**2 / len(texts)
    given, inner = [], []
    for expert in range(EXPERTS):
        rows = torch.cat([args[0].detach()[(args[1] == expert).any(-1)] for args in calls])
        gate, up = (rows @ experts.gate_up_proj[expert].detach().T).chunk(2, dim=-1)
        given.append(rows)
        inner.append(torch.nn.functional.silu(gate) * up)
    return given, inner, fisher


@pytest.mark.slow
def test_each_expert_is_measured_on_the_tokens_sent_to_it(mixtures: dict[str, Path], tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    given, inner, fisher = by_hand(mixtures["single"], tmp_path)
    job = Job(data=["rows.jsonl"], tokens=4096, dtype="float32", fisher="empirical")
    for form, path in mixtures.items():
        measure(job, path, tmp_path / form, folder=tmp_path)
    single, stacked = (load_file(tmp_path / form / INPUTS) for form in mixtures)
    own = Statistics.open(tmp_path / "single")
    assert len(given[0]) != len(given[1])
    for expert in range(EXPERTS):
        gate, up, down = (f"{LAYER}.experts.{expert}.{leaf}_proj.weight" for leaf in ("gate", "up", "down"))
        assert own.samples[up] == (gate,)
        torch.testing.assert_close(single[f"sample/{gate}"], given[expert], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(single[f"sample/{down}"], inner[expert], rtol=1e-4, atol=1e-6)
        for name, rows in (("gate_up_proj", given[expert]), ("down_proj", inner[expert])):
            whole = stacked[f"sample/{LAYER}.experts.{name}"][expert]
            expected = rows.T @ rows / len(rows)
            torch.testing.assert_close(whole.T @ whole / len(whole), expected, rtol=1e-3, atol=1e-6)
            mean = stacked[f"mean_square/{LAYER}.experts.{name}"][expert]
            torch.testing.assert_close(mean, rows.square().mean(0), rtol=1e-4, atol=1e-7)
    assert f"{LAYER}.gate.weight" in own.samples
    for form, path in mixtures.items():
        found = load_file(tmp_path / form / FISHER)
        shapes = {name: info.shape for name, info in Checkpoint.open(path).tensors.items()}
        assert {name: tuple(values.shape) for name, values in found.items()} == shapes
    found = load_file(tmp_path / "single" / FISHER)
    for expert in range(EXPERTS):
        gate, up = fisher[f"{LAYER}.experts.gate_up_proj"][expert].chunk(2)
        for leaf, values in (("gate", gate), ("up", up), ("down", fisher[f"{LAYER}.experts.down_proj"][expert])):
            measured = found[f"{LAYER}.experts.{expert}.{leaf}_proj.weight"]
            torch.testing.assert_close(measured, values, rtol=1e-3, atol=1e-4 * float(values.max()))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["single", "stacked"])
def test_mixtures_are_blended_with_what_was_measured(mixtures: dict[str, Path], tmp_path: Path, form: str) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    job = Job(data=["rows.jsonl"], fisher="empirical")
    measure(job, mixtures[form], tmp_path / "stats", folder=tmp_path)
    expert = {"model": str(mixtures[form]), "statistics": "stats"}
    for method in ("regmean_back", "fisher"):
        document = {
            "ktmerge": 1, "base": str(mixtures[form]), "statistics": "stats", "experts": {"a": expert},
            "blend": {"method": method},
        }  # fmt: skip
        plan = plan_blend(parse_recipe(json.loads(json.dumps(document)), "recipe", tmp_path))
        assert plan.statistics["a"].root == tmp_path / "stats"


def inputs_first(family: str, words: int, end: int) -> Any:
    """The config of a small mixture that stores its stacked experts inputs first."""
    from transformers import GptOssConfig, Llama4TextConfig

    common = {
        "vocab_size": words, "hidden_size": 16, "intermediate_size": 12, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": end, "pad_token_id": 0,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if family == "gpt_oss":
        return GptOssConfig(**common, layer_types=["full_attention"] * 2)
    return Llama4TextConfig(**common, intermediate_size_mlp=24, interleave_moe_layer_step=1)


def what_experts_are_given(experts: Any, family: str, args: tuple[Any, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each expert's inputs, and those of its down projection, in one call."""
    found = []
    for expert in range(EXPERTS):
        if family == "gpt_oss":
            rows = args[0][(args[1] == expert).any(-1)]
            both = rows @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
            gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
            found.append((rows, (up + 1) * gate * torch.sigmoid(1.702 * gate)))
        else:
            rows = args[0].unflatten(0, (EXPERTS, -1))[expert]
            rows = rows[rows.abs().sum(-1) > 0]
            gate, up = (rows @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
            found.append((rows, up * torch.nn.functional.silu(gate)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_experts_stored_inputs_first_are_measured(tiny_llama: Path, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(inputs_first(family, len(tokenizer), tokenizer.eos_token_id))
        for values in model.parameters():
            torch.nn.init.normal_(values, std=0.2)
    model.eval().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write(tmp_path / "rows.jsonl", ROWS)
    measure(Job(data=["rows.jsonl"], tokens=4096, dtype="float32"), tmp_path / "model", tmp_path / "stats",
            folder=tmp_path)  # fmt: skip

    calls: list[Any] = []
    layer = model.model.layers[1]
    experts = layer.mlp.experts if family == "gpt_oss" else layer.feed_forward.experts
    experts.register_forward_pre_hook(lambda module, args: calls.append([one.detach() for one in args]))
    encoder = Encoder.load(tmp_path / "model")
    with torch.no_grad():
        for sample in read_data(["rows.jsonl"], tmp_path).samples:
            model(torch.tensor(encoder.encode(sample).ids)[None])
        given = [what_experts_are_given(experts, family, args) for args in calls]
    measured = load_file(tmp_path / "stats" / INPUTS)
    at = "model.layers.1.mlp" if family == "gpt_oss" else "model.layers.1.feed_forward"
    for expert in range(EXPERTS):
        for number, name in enumerate(("gate_up_proj", "down_proj")):
            rows = torch.cat([call[expert][number] for call in given])
            found = measured[f"sample/{at}.experts.{name}"][expert]
            if not len(rows):  # the router sent nothing there
                assert not found.any()
                continue
            torch.testing.assert_close(found.T @ found / len(found), rows.T @ rows / len(rows), rtol=1e-3, atol=1e-5)
            mean = measured[f"mean_square/{at}.experts.{name}"][expert]
            torch.testing.assert_close(mean, rows.square().mean(0), rtol=1e-4, atol=1e-6)
    expert = {"model": str(tmp_path / "model"), "statistics": "stats"}
    for method in ("regmean", "model_tailor"):
        document = {
            "ktmerge": 1,
            "base": str(tmp_path / "model"),
            "experts": {"a": expert},
            "blend": {"method": method},
        }
        blend(parse_recipe(document, "recipe", tmp_path), tmp_path / method, device="cpu")
