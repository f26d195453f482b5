"""From measured inputs to a merge: what the blended model's maps answer, held against the models run by hooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.merge import blend
from ktmerge.recipes.load import parse_recipe
from ktmerge.recipes.schema import Statistics as Job
from ktmerge.tuners.data import read_data
from ktmerge.tuners.encode import Encoder
from ktmerge.tuners.statistics import measure

UP = [{"prompt": f"Is {n} good?", "completion": " yes" * (1 + n % 3)} for n in range(12)]
DOWN = [{"prompt": f"The {n} of war", "completion": f" and peace {n * n}"} for n in range(12)]
A = 0.5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, a model away from it, and what both were given on their data."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("measured")
    base = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base.save_pretrained(folder / "base")
    torch.manual_seed(0)
    with torch.no_grad():
        for values in base.parameters():
            values += 0.1 * values.std().nan_to_num() * torch.randn_like(values)
    base.save_pretrained(folder / "tuned")
    for name, rows in (("base", UP), ("tuned", DOWN)):
        for file in tiny_llama.iterdir():
            if not (folder / name / file.name).exists():
                (folder / name / file.name).write_bytes(file.read_bytes())
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = Job.model_validate({"data": [f"{name}.jsonl"], "dtype": "float32", "fisher": "empirical"})
        measure(job, folder / name, folder / f"stats-{name}", folder=folder)
    return folder


def given(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Inputs of every linear map, by hooks, text by text."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    found: dict[str, list[torch.Tensor]] = {}
    for path, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            key = f"model.{path}.weight"
            module.register_forward_pre_hook(lambda m, args, key=key: found.setdefault(key, []).append(args[0][0]))
    encoder = Encoder.load(folder / name)
    with torch.no_grad():
        for sample in read_data([f"{name}.jsonl"], folder).samples:
            model(torch.tensor([encoder.encode(sample).ids]))
    return {key: torch.cat(parts) for key, parts in found.items()}


def blended(folder: Path, **section: Any) -> dict[str, torch.Tensor]:
    document = {
        "ktmerge": 1,
        "base": "base",
        "statistics": "stats-base",
        "experts": {"tuned": {"model": "tuned", "statistics": "stats-tuned"}},
        "blend": section,
    }
    out = folder / f"out-{len(list(folder.iterdir()))}"
    blend(parse_recipe(document, "recipe", folder), out, device="cpu")
    return weights(out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in Checkpoint.open(folder).weight_files
        for name, tensor in load_file(folder / file).items()
    }


def test_fitted_maps_answer_both_sides_better_than_any_interpolation(work: Path) -> None:
    base, tuned = weights(work / "base"), weights(work / "tuned")
    up, down = given(work, "base"), given(work, "tuned")

    def cost(name: str, values: torch.Tensor) -> float:
        felt = ((values - base[name]) @ up[name].T).square().mean()
        missed = ((values - tuned[name]) @ down[name].T).square().mean()
        return float((1 - A) * felt + A * missed)

    fitted = blended(work, method="regmean_back", a=A, eta=1.0, ridge=1e-6)
    scaled = blended(work, method="cstar", a=A)
    assert len(up) == 14
    for name in up:
        line = [cost(name, base[name] + share / 20 * (tuned[name] - base[name])) for share in range(21)]
        assert cost(name, scaled[name]) <= min(line) * (1 + 1e-3), name
        assert cost(name, fitted[name]) < cost(name, scaled[name]), name


def test_guards_and_patches_know_their_inputs(work: Path) -> None:
    base, tuned = weights(work / "base"), weights(work / "tuned")
    up, down = given(work, "base"), given(work, "tuned")
    guarded = blended(work, method="nullspace", kappa=30.0)
    plain, patched = (blended(work, method="model_tailor", decoration=one) for one in ("none", "exact"))
    for name in up:
        change, whole = guarded[name] - base[name], tuned[name] - base[name]
        felt = (change @ up[name].T).norm() / (whole @ up[name].T).norm()
        assert felt < 0.5 * change.norm() / whole.norm(), name
        missed = [((one[name] - tuned[name]) @ down[name].T).norm() for one in (plain, patched)]
        assert missed[1] < 0.95 * missed[0], name


@pytest.mark.parametrize("method", ["fisher_back", "cgm", "cgm_hard", "guarded"])
def test_information_reaches_every_tensor(work: Path, method: str) -> None:
    base, tuned, found = weights(work / "base"), weights(work / "tuned"), blended(work, method=method)
    assert found.keys() == base.keys()
    for name, values in found.items():
        lower, upper = torch.minimum(base[name], tuned[name]), torch.maximum(base[name], tuned[name])
        assert ((values >= lower - 1e-6) & (values <= upper + 1e-6)).all(), name
    moved = [name for name in base if not found[name].equal(base[name]) and not found[name].equal(tuned[name])]
    assert len(moved) > len(base) // 2
