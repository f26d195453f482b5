"""PEFT adapters as checkpoints. The oracle is PEFT: what merge_and_unload makes of the same adapter in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import regex
import torch
from safetensors.torch import load_file, save_file

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.opening import open_model
from ktmerge.errors import KtmergeError, UsageError

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ALL_LINEAR, "lora_alpha": 16}),
    "rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"v_proj": 3, r"^model\.layers\.1\.self_attn\.q_proj": 1},
        },
    ),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "bias": ("qwen", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "bias": "all"}),
    "tied, saved": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 40, 4, 7]}),
    "tokens, tied": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [47, 0]}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "conv1d, flag overwritten": ("gpt2 untied", {"target_modules": ["c_proj", "lm_head"]}),
    "stacks, single in the file": ("mixtral", {"target_parameters": STACKS, "target_modules": ["q_proj"]}),
    "stacks, by patterns": (
        "qwen-moe",
        {
            "target_parameters": [*STACKS, "mlp.gate.weight"],
            "target_modules": [],
            "rank_pattern": {"experts.down_proj": 2, "mlp.gate.weight": 3},
            "alpha_pattern": {r".*\.gate_up_proj": 5},
            "use_rslora": True,
        },
    ),
    "stacks, inputs first": ("gpt-oss", {"target_parameters": STACKS, "target_modules": ["q_proj"]}),
    "square stacks, inputs first": ("gpt-oss square", {"target_parameters": ["experts.down_proj"]}),
    "a router": ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}),
    "names in memory": ("vit", {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}),
    "names in memory, dora": ("vit", {"target_modules": ["v_proj", "fc2"], "use_dora": True}),
    "apart in memory": ("nomic", {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "apart in memory, dora": ("nomic", {"target_modules": ["k_proj", "down_proj"], "use_dora": True}),
    "tokens alone": ("llama", {"token_indices": [3, 40, 4]}),
    "tokens alone, tied": ("tied", {"token_indices": [47, 0]}),
    "convolution": ("vit", {"target_modules": ["projection", "classifier"]}),
    "convolution dora": ("vit", {"target_modules": ["projection"], "use_dora": True}),
}


TIED: dict[str, Any] = {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True}
LIKE_OTHERS = (
    "rslora",
    "tied, saved",
    "tokens, tied",
    "embedding dora",
    "conv1d",
    "conv1d, flag overwritten",
    "convolution dora",
    "stacks, by patterns",
    "stacks, inputs first",
    "square stacks, inputs first",
    "a router",
    "names in memory, dora",
    "apart in memory, dora",
    "tokens alone, tied",
)
"""Cases whose parts are all in other cases."""


def _build(kind: str) -> Any:
    import transformers as t

    small = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    gpt2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if kind in ("llama", "tied"):
        return t.LlamaForCausalLM(t.LlamaConfig(**small, **{**heads, "tie_word_embeddings": kind == "tied"}))
    if kind == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**small, **heads, num_local_experts=3))
    if kind == "qwen-moe":
        experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**small, **heads, **experts, head_dim=8))
    if kind.startswith("gpt-oss"):
        inner = {**small, "intermediate_size": 16 if kind.endswith("square") else 24}
        return t.GptOssForCausalLM(
            t.GptOssConfig(**inner, **heads, num_local_experts=3, num_experts_per_tok=2, head_dim=8)
        )
    if kind == "nomic":
        return t.NomicBertModel(t.NomicBertConfig(**small, num_attention_heads=2))
    if kind == "qwen":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**small, **heads))
    if kind == "vit":
        sides = {"image_size": 16, "patch_size": 8, "num_attention_heads": 2}
        return t.ViTForImageClassification(t.ViTConfig(**sides, hidden_size=16, intermediate_size=24))
    return t.GPT2LMHeadModel(t.GPT2Config(**gpt2, **ends, tie_word_embeddings=kind == "gpt2"))


def make_adapter(folder: Path, kind: str, seed: int = 0, **settings: Any) -> dict[str, torch.Tensor]:
    """Write a model (``model``) and an adapter of random factors (``adapter``); the merged weights by PEFT."""
    import peft
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build(kind)
        model.save_pretrained(folder / "model")
        config = (
            peft.TrainableTokensConfig(**settings)
            if "token_indices" in settings
            else peft.LoraConfig(**{"r": 4, **settings})
        )
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 if "magnitude" in name else 0.3
                parameter.data += scale * torch.rand(parameter.shape) * parameter.data.std()  # in place: some are tied
                if "lora_B" in name or "lora_embedding_A" in name:
                    parameter.data.copy_(0.2 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    fresh = type(model).from_pretrained(folder / "model", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(fresh, folder / "adapter").merge_and_unload(safe_merge=True)
    assert isinstance(merged, transformers.PreTrainedModel)
    merged.save_pretrained(folder / "merged")
    return load_file(folder / "merged" / "model.safetensors")


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[pytest.mark.slow] if case in LIKE_OTHERS else []) for case in CASES],
)
def adapted(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("adapter")
    kind, settings = CASES[request.param]
    return folder, make_adapter(folder, kind, **settings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_adapter(folder, "llama", target_modules=ALL_LINEAR)
    return folder


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    """The plain adapter and its model, to be spoiled."""
    return Path(shutil.copytree(plain, tmp_path / "copy"))


@pytest.mark.every(3)
def test_folded_weights_are_pefts(adapted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, merged = adapted
    model = Checkpoint.open(folder / "model")
    folded = open_model("model+adapter", folder)
    # Of a head that is the embedding PEFT stores both where it stores them whole.
    assert set(folded.tensors) - {"lm_head.weight"} == set(merged) - {"lm_head.weight"}
    changed = 0
    with folded.reader() as reader, model.reader() as original:
        for name, expected in merged.items():
            found = reader.read(name).view(expected.shape)
            assert found.dtype == torch.float32
            assert torch.allclose(found, expected, rtol=0, atol=1e-6), name
            moved = not expected.equal(original.read(name).view(expected.shape))
            changed += moved
            assert (reader.place(name) is None) or not moved
    assert changed


def test_a_strangers_pattern_cannot_take_for_ever(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((copy / "adapter/adapter_config.json").read_text())
    config["alpha_pattern"] = {"(.*)*x(.*)*y": 3}  # Python's own search of it would not end
    (copy / "adapter/adapter_config.json").write_text(json.dumps(config))
    open_model("model+adapter", copy)

    def endless(pattern: str, text: str, timeout: float) -> None:
        raise TimeoutError

    monkeypatch.setattr(regex, "match", endless)
    with pytest.raises(UsageError, match=r"alpha_pattern has the pattern .*, which takes for ever"):
        open_model("model+adapter", copy)


def test_tables_that_peft_wrote_three_times_are_the_trained_ones(tmp_path: Path) -> None:
    """As it saves a module of modules_to_save once the vocabulary has grown."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _build("llama")
        model.save_pretrained(tmp_path / "model")
        model.resize_token_embeddings(56)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
        wrapped = peft.get_peft_model(model, settings)
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.data += torch.randn(parameter.shape)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any(".original_module." in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    merged = wrapped.merge_and_unload()
    folded = open_model("model+adapter", tmp_path, Checkpoint.open(tmp_path / "model"))
    assert set(folded.tensors) == set(Checkpoint.open(tmp_path / "model").tensors)
    with folded.reader() as reader:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            trained = merged.get_parameter(name).detach()
            assert trained.shape == (56, 16)
            assert reader.read(name).view(trained.shape).equal(trained)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "case",
    [
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("plain", "dora", "apart in memory, dora", "stacks, inputs first")
        ),
        "stacks, single in the file",
        "conv1d dora",
        "embedding",
    ],
)
def test_any_piece_has_the_bits_of_the_whole(case: str, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    make_adapter(tmp_path, kind, **settings)
    folded = open_model("adapter", tmp_path, Checkpoint.open(tmp_path / "model"))
    named = open_model("model+adapter", tmp_path)
    with folded.reader() as reader:
        for name, info in folded.tensors.items():
            whole = reader.read(name)
            assert b"".join(bytes(block) for block in reader.blocks(name)) == whole.numpy().tobytes()
            for size in (1, 7, 17, 100):
                if info.numel > 400 * size:
                    continue
                with named.reader() as other:
                    pieces = [
                        other.read(name, start, min(start + size, info.numel))
                        for start in reversed(range(0, info.numel, size))
                    ]
                assert torch.cat(pieces[::-1]).equal(whole)


def test_bfloat16_weights_and_factors_are_folded_unrounded(copy: Path) -> None:
    for file in (copy / "model" / "model.safetensors", copy / "adapter" / "adapter_model.safetensors"):
        save_file({name: values.bfloat16() for name, values in load_file(file).items()}, file, {"format": "pt"})
    name = "model.layers.1.mlp.down_proj.weight"
    weights = load_file(copy / "model" / "model.safetensors")[name].double()
    factors = load_file(copy / "adapter" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight"].double() for x in "AB")
    folded = open_model("model+adapter", copy)
    with folded.reader() as reader:
        assert folded[name].dtype == "F32"
        assert reader.read(name).view(16, 24).equal((weights + 2.0 * (b @ a)).float())
    assert folded["model.norm.weight"].dtype == "BF16"


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"peft_type": "IA3"}, "of the type IA3.*LoRA, DoRA and trainable tokens are"),
        ({"peft_type": "PROMPT_TUNING"}, "of the type PROMPT_TUNING"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4.*path_initial_model"),
        ({"target_parameters": "experts.gate"}, "no list of names"),
        ({"r": 8}, "do not make the rank 8"),
        ({"rank_pattern": {"q_proj": 5}}, "do not make the rank 5"),
        ({"alpha_pattern": {"q_(": 5}}, "alpha_pattern has the pattern"),
        ({"lora_alpha": "much"}, "lora_alpha .*'much', not a number"),
        ({"lora_alpha": 10**400}, "lora_alpha .*, not a number"),
        ({"use_dora": True}, "says DoRA .* no lora_magnitude_vector of"),
    ],
)
def test_what_is_no_change_of_weights_is_refused(copy: Path, changes: dict[str, Any], complaint: str) -> None:
    _config(copy, **changes)
    with pytest.raises(UsageError, match=complaint):
        open_model("model+adapter", copy)


@pytest.mark.parametrize(
    ("rename", "complaint"),
    [
        (("layers.0.self_attn.q_proj", "layers.7.self_attn.q_proj"), "changes 'model.layers.7.*belongs to another"),
        (("layers.0.self_attn.q_proj.lora_A.weight", "layers.0.self_attn.q_proj.ia3_l"), "no part of LoRA or DoRA"),
        (("layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.o_proj.lora_A"), "only one factor"),
        (("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"), "do not fit|only one factor"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(copy: Path, rename: tuple[str, str], complaint: str) -> None:
    file = copy / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace(*rename): values for name, values in sorted(load_file(file).items())}
    save_file(renamed, file)
    with pytest.raises(UsageError, match=complaint):
        open_model("model+adapter", copy)


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("model+model", "'model' is no PEFT adapter"),
        ("adapter+adapter", "several adapters"),
        ("model+adapter+adapter", "Several adapters"),
        ("model+nothing", "no such folder"),
        ("adapter", "is a PEFT adapter, not a whole model"),
        ("model+", "write model\\+adapter"),
        ("~nobody-of-this-name/model+adapter", "cannot be looked up"),
        ("x" * 300 + "+adapter", "cannot be looked up"),
    ],
)
def test_wrong_references_are_refused(plain: Path, reference: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        open_model(reference, plain)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("indices", "complaint"),
    [
        ([3, 40], r"do not say which rows"),
        ([1, 2, 48], r"trained tokens that .*\[48, 16\] lacks"),
        (["x", 1, 2], "do not say which"),
        ({"lm_head": [1, 2, 3]}, "do not say which"),
        ([1, -2, 3], "do not say which"),
    ],
)
def test_trained_tokens_that_are_not_there_are_refused(tmp_path: Path, indices: Any, complaint: str) -> None:
    make_adapter(tmp_path, "llama", target_modules=["q_proj"], trainable_token_indices=[3, 40, 7])
    _config(tmp_path, trainable_token_indices=indices)
    with pytest.raises(UsageError, match=complaint):
        open_model("model+adapter", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss square"])
def test_folded_stacks_compute_what_the_adapter_does(kind: str, tmp_path: Path) -> None:
    """Held to PEFT's forward pass; over the same model with its stacks as in memory, too."""
    import peft

    merged = make_adapter(tmp_path, kind, target_parameters=STACKS, target_modules=["q_proj"])
    fresh = type(_build(kind)).from_pretrained(tmp_path / "model", dtype=torch.float32)
    (tmp_path / "memory").mkdir()
    held = {name: values.clone() for name, values in fresh.state_dict().items()}
    save_file(held, tmp_path / "memory" / "model.safetensors", {"format": "pt"})
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "memory")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = fresh(tokens).logits
        wanted = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")(tokens).logits
    assert not torch.allclose(before, wanted, atol=0.01)
    for name in ("model", "memory"):
        folded = open_model(f"{name}+adapter", tmp_path)
        with folded.reader() as reader:
            state = {one: reader.read(one).view(info.shape).clone() for one, info in folded.tensors.items()}
        assert (set(state) == set(merged)) == (name == "model" or kind != "mixtral")
        (tmp_path / f"folded {name}").mkdir()
        save_file(state, tmp_path / f"folded {name}" / "model.safetensors", {"format": "pt"})
        shutil.copy(tmp_path / "model" / "config.json", tmp_path / f"folded {name}")
        loaded = type(fresh).from_pretrained(tmp_path / f"folded {name}", dtype=torch.float32)
        with torch.no_grad():
            assert torch.allclose(loaded(tokens).logits, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"architectures": ["NoSuchModel"]}, "changes 'vit.layers.0.*belongs to another"),
        ({"architectures": ["AutoModel"]}, "changes 'vit.layers.0.*belongs to another"),
        ({"hidden_size": "broad"}, "changes 'vit.layers.0.*belongs to another"),
    ],
)
def test_names_in_memory_need_a_model_that_transformers_knows(
    tmp_path: Path, config: dict[str, Any], complaint: str
) -> None:
    make_adapter(tmp_path, "vit", target_modules=["q_proj"])
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(UsageError, match=complaint):
        open_model("model+adapter", tmp_path)


def test_no_model_is_built_where_all_names_are_in_the_files(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(_: Checkpoint) -> None:
        raise AssertionError

    monkeypatch.setattr("ktmerge.checkpoints.held.held_tensors", built)
    open_model("model+adapter", plain)


def test_parts_of_a_fused_matrix_stored_whole_are_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path, "nomic", target_modules=["q_proj"], modules_to_save=["v_proj"])
    with pytest.raises(UsageError, match=r"stores '.*v_proj.weight' whole, which the model's files have in other"):
        open_model("model+adapter", tmp_path)


def test_stacks_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path, "mixtral", target_parameters=STACKS, target_modules=[])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace(".base_layer", ".base_layer.base_layer"): v for name, v in load_file(file).items()}
    copies = {name.replace(".base_layer.base_layer", ".base_layer"): v for name, v in renamed.items()}
    save_file({**{name: v.clone() for name, v in copies.items()}, **renamed}, file)
    with pytest.raises(UsageError, match="do not tell which of its target_parameters"):
        open_model("model+adapter", tmp_path)


def test_a_head_that_is_the_embedding_is_folded_once(tmp_path: Path) -> None:
    """Held to what PEFT computes: its merge adds the change of a tied table once for each of its modules."""
    import peft

    make_adapter(tmp_path, "tied", **TIED)
    fresh = _build("tied").from_pretrained(tmp_path / "model", dtype=torch.float32)
    folded = open_model("model+adapter", tmp_path)
    with folded.reader() as reader:
        state = {name: reader.read(name).view(info.shape).clone() for name, info in folded.tensors.items()}
    assert set(state) == set(Checkpoint.open(tmp_path / "model").tensors)
    (tmp_path / "folded").mkdir()
    save_file(state, tmp_path / "folded" / "model.safetensors", {"format": "pt"})
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "folded")
    loaded = type(fresh).from_pretrained(tmp_path / "folded", dtype=torch.float32)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before, wanted = (
            fresh(tokens).logits,
            peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")(tokens).logits,
        )
        assert not torch.allclose(before, wanted, atol=0.1)
        assert torch.allclose(loaded(tokens).logits, wanted, atol=1e-5)


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path, "tied", **TIED)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    save_file(
        {**stored, "base_model.model.lm_head.lora_B.weight": stored["base_model.model.lm_head.lora_B.weight"] + 1}, file
    )
    folded = open_model("model+adapter", tmp_path)
    with (
        folded.reader() as reader,
        pytest.raises(KtmergeError, match=r"'.*lm_head.lora_B.weight' is not its .*save it again"),
    ):
        reader.read("model.embed_tokens.weight")
    _config(tmp_path, ensure_weight_tying=False)
    with pytest.raises(UsageError, match="ties to its embedding"):
        open_model("model+adapter", tmp_path)


@pytest.mark.parametrize("flag", [False, True])
def test_an_adapter_of_the_embedding_alone_cannot_be_folded_into_a_tied_model(tmp_path: Path, flag: bool) -> None:
    """PEFT ties no table that is not called `embed_tokens`, whatever it is told."""
    make_adapter(tmp_path, "gpt2", target_modules=["wte", "c_attn"], ensure_weight_tying=flag)
    with pytest.raises(UsageError, match=r"'transformer.wte.weight' but not on the head.*Untie"):
        open_model("model+adapter", tmp_path)


def test_names_of_other_versions_are_found(copy: Path) -> None:
    """An adapter of a model that was wrapped otherwise when it was trained."""
    file = copy / "adapter" / "adapter_model.safetensors"
    expected = open_model("model+adapter", copy)
    with expected.reader() as reader:
        values = {name: reader.read(name) for name in expected.tensors}
    save_file(
        {name.replace("model.layers", "model.language_model.layers", 1): v for name, v in load_file(file).items()}, file
    )
    folded = open_model("model+adapter", copy)
    with folded.reader() as reader:
        assert all(reader.read(name).equal(values[name]) for name in folded.tensors)


def test_a_folder_with_a_plus_in_its_name_is_a_folder(copy: Path) -> None:
    (copy / "model").rename(copy / "a+b")
    assert open_model("a+b", copy).roots == (copy / "a+b",)
    assert set(open_model("a+b+adapter", copy).roots) == {copy / "a+b", copy / "adapter"}
