"""Blending into a loaded model: equal to the file route bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import read, same_bytes, write
from torch import nn

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.reader import TensorReader
from ktmerge.errors import UsageError
from ktmerge.merge import blend, blend_into
from ktmerge.merge.pristine import Pristine
from ktmerge.merge.sinks import LiveSink
from ktmerge.progress import _Silent as Quiet

TWO = {"a": ("a", 1.0), "b": ("b", 1.0)}


class Told(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Toy(nn.Module):
    """Parameters under given names, nested as the dots say; the head shares the embedding's storage."""

    def __init__(self, tensors: dict[str, torch.Tensor], tie: bool = True) -> None:
        super().__init__()
        for name, values in tensors.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for segment in path:
                if segment not in module._modules:
                    module.add_module(segment, nn.Module())
                module = module.get_submodule(segment)
            module.register_parameter(leaf, nn.Parameter(values.clone(), requires_grad=values.is_floating_point()))
        if tie:
            self.lm_head = nn.Module()
            self.lm_head.weight = self.get_parameter("model.embed_tokens.weight")


def test_live_parameters_equal_the_file(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    recipe = recipe_in(llamas, TWO, {"method": "dare_ties", "lambda": 0.6}, output={"rounding": "stochastic"})
    blend(recipe, tmp_path / "out", device="cpu")
    model = Toy(read(llamas / "base"))
    for _ in range(2):  # from pristine inputs every time, never on top of the last blend
        report = blend_into(model, recipe)
        stored = read(tmp_path / "out")
        assert all(same_bytes(model.get_parameter(name).data, stored[name]) for name in stored)
    assert model.lm_head.weight is model.get_parameter("model.embed_tokens.weight")
    assert model.get_parameter("model.norm.weight").requires_grad
    assert report.written > 0


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_a_sweep_from_memory_equals_the_files(
    kernels: str, llamas: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight is read once, but again if its file was replaced meanwhile."""
    monkeypatch.setenv("KTMERGE_KERNELS", kernels)
    folder = tmp_path / "models"
    shutil.copytree(llamas, folder)
    model, sources = Toy(read(folder / "base")), Pristine()
    reads: list[tuple[str, str]] = []
    whole = TensorReader.read_into

    def read_into(self: TensorReader, name: str, start: int, target: memoryview) -> None:
        reads.append((self._root.name, name))
        whole(self, name, start, target)

    blends: list[dict[str, Any]] = [
        {"method": "ties", "density": density, "scope": scope, "lambda": lambda_}
        for density in (0.2, 0.6)
        for scope in ("tensor", "global")
        for lambda_ in (1.0, 0.5)  # the second finds the first's thresholds
    ]
    blends += [{"method": "linear", "lambda": 0.5, "where": [{"part": "norm", "keep": "a"}]}]
    for number, given in enumerate(blends):
        recipe = recipe_in(folder, TWO, given, output={"rounding": "stochastic"})
        with monkeypatch.context() as context:
            context.setattr(TensorReader, "read_into", read_into)
            blend_into(model, recipe, sources)
        blend(recipe, tmp_path / f"out{number}", device="cpu")
        stored = read(tmp_path / f"out{number}")
        assert all(same_bytes(model.get_parameter(name).data, stored[name]) for name in stored), given
    assert sorted(reads) == sorted((model, name) for model in ("a", "b", "base") for name in stored)
    shutil.rmtree(folder / "a")
    shutil.copytree(llamas / "b", folder / "a", copy_function=shutil.copy)  # with a time of its own
    blend_into(model, recipe_in(folder, {"a": ("a", 1.0)}, {"method": "linear"}), sources)
    assert all(same_bytes(model.get_parameter(name).data, found) for name, found in read(llamas / "b").items())
    for seed in (1, 2):
        recipe = recipe_in(folder, TWO, {"method": "ties"}, seed=seed)
        blend_into(model, recipe, sources)
        blend(recipe, tmp_path / f"seed{seed}", device="cpu")
        stored = read(tmp_path / f"seed{seed}")
        assert all(same_bytes(model.get_parameter(name).data, stored[name]) for name in stored), seed


def test_a_wider_model_holds_the_rounded_values(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    recipe = recipe_in(llamas, TWO, {"method": "linear", "where": [{"part": "norm", "keep": "a"}]})
    blend(recipe, tmp_path / "out", device="cpu")
    model = Toy({name: values.float() for name, values in read(llamas / "base").items()})
    blend_into(model, recipe)
    for name, values in read(tmp_path / "out").items():
        assert model.get_parameter(name).data.equal(values.float())


def test_a_narrower_model_rounds_once_to_its_own_type(llamas: Path, tmp_path: Path, recipe_in: Any) -> None:
    recipe = recipe_in(llamas, TWO, {"method": "linear"}, output={"dtype": "float32"})
    blend(recipe, tmp_path / "out", device="cpu")
    model = Toy(read(llamas / "base"))
    blend_into(model, recipe)
    for name, values in read(tmp_path / "out").items():
        assert model.get_parameter(name).data.equal(values.bfloat16())


def test_a_model_of_another_shape_is_refused(llamas: Path, recipe_in: Any) -> None:
    recipe = recipe_in(llamas, TWO, {"method": "linear"})
    tensors = read(llamas / "base")
    wrong = {**tensors, "model.norm.weight": torch.ones(3)}
    more = {**tensors, "model.extra.weight": torch.ones(3)}
    for found in (wrong, more, {"extra.weight": torch.ones(3)}):
        with pytest.raises(UsageError, match="the model"):
            blend_into(Toy(found, tie=len(found) > 1), recipe)


def test_a_model_in_no_memory_is_refused_and_one_in_any_order_is_not(
    llamas: Path, tmp_path: Path, recipe_in: Any
) -> None:
    recipe = recipe_in(llamas, TWO, {"method": "linear"})
    with pytest.raises(UsageError, match="meta device"):
        blend_into(Toy(read(llamas / "base")).to("meta"), recipe)
    model = Toy(read(llamas / "base"))
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data = weight.data.t().contiguous().t()
    blend(recipe, tmp_path / "out", device="cpu")
    for sources in (None, Pristine()):
        blend_into(model, recipe, sources)
        assert not weight.data.is_contiguous()
        assert all(same_bytes(model.get_parameter(name).data, found) for name, found in read(tmp_path / "out").items())


@pytest.mark.parametrize("measured", [True, False])
def test_what_a_model_has_no_room_for_is_left_out_and_told_once(
    measured: bool, llamas: Path, tmp_path: Path, recipe_in: Any
) -> None:
    """As transformers leaves out `mtp.*`; what is taken of the whole model is taken of those tensors, too."""
    for name in "ab":
        write(tmp_path / name, {**read(llamas / name), "mtp.fc.weight": torch.randn(16, 32).bfloat16()})
    write(tmp_path / "base", {**read(llamas / "base"), "mtp.fc.weight": torch.zeros(16, 32).bfloat16()})
    recipe = recipe_in(tmp_path, TWO, {"method": "ties", "density": 0.3, "scope": "global"})
    blend(recipe, tmp_path / "out", device="cpu")
    model, sources, progress = Toy(read(llamas / "base")), Pristine(), Told()
    for _ in range(2):
        report = blend_into(model, recipe, sources, measured=measured, progress=progress)
        assert any("no room for 'mtp.fc.weight' of" in note for note in report.notes)
    stored = read(tmp_path / "out")
    assert all(same_bytes(values.data, stored[name]) for name, values in model.named_parameters())
    assert [note for note in progress.notes if "mtp" in note] == report.notes[-1:]


def test_bytes_and_values_are_the_same(llamas: Path) -> None:
    """Both ways into a live model, in pieces, from memory that may not be written."""
    base = Checkpoint.open(llamas / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    values = torch.randn(base[name].numel, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for way in ("write", "write_bytes"):
        model = Toy(read(llamas / "base"))
        sink = LiveSink(model, base)
        assert sink.dtype(name, "BF16") == "BF16"
        for start in range(0, len(values), 100):
            piece = values[start : start + 100]
            if way == "write":
                sink.write(name, piece, start)
            else:
                sink.write_bytes(name, memoryview(piece.view(torch.uint8).numpy().tobytes()), 2 * start)
        found.append(model.get_parameter(name).data)
    assert same_bytes(*found)
    assert same_bytes(found[0].reshape(-1), values)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["published", "saved"])
def test_a_real_llava_loads_blends_and_runs(tmp_path: Path, recipe_in: Any, base: str) -> None:
    """transformers' own LLaVA, tiny: output loads with nothing missing; the live route gives the same parameters."""
    from loadable import assert_loads_whole
    from safetensors.torch import load_file, save_file
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))
        model.save_pretrained(tmp_path / "base")
        for name in ("a", "b"):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
            model.save_pretrained(tmp_path / name)
    if base == "published":
        file = tmp_path / "base/model.safetensors"
        tensors = load_file(file)
        renamed = {
            name.replace("vision_tower.", "vision_tower.vision_model."): values.clone()
            for name, values in tensors.items()
        }
        assert renamed.keys() != tensors.keys()
        save_file(renamed, file, {"format": "pt"})
    recipe = recipe_in(tmp_path, TWO, {"method": "ties", "where": [{"part": "vision", "lambda": 0.5}]})
    blend(recipe, tmp_path / "out", device="cpu")
    assert_loads_whole(tmp_path / "out")
    assert read(tmp_path / "out").keys() == read(tmp_path / "base").keys()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    live = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    blend_into(live, recipe)
    for (name, first), (_, second) in zip(loaded.named_parameters(), live.named_parameters(), strict=True):
        assert first.equal(second), name


@pytest.mark.slow
def test_a_real_tied_llama_loads(tiny_llama: Path, tmp_path: Path, recipe_in: Any) -> None:
    from loadable import assert_loads_whole
    from merge_models import tuned, write

    write(tmp_path / "a", tuned(read(tiny_llama), 1e-2, 1))
    recipe = recipe_in(tmp_path, {"a": ("a", 1.0)}, {"method": "dare"}, base=str(tiny_llama))
    blend(recipe, tmp_path / "out", device="cpu")
    assert_loads_whole(tmp_path / "out")
    assert read(tmp_path / "out").keys() == read(tiny_llama).keys()
