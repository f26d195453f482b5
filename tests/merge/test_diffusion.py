"""Error-diffused rounding: against a slow computation of its own, and what it must leave alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from merge_models import read, same_bytes, write
from merge_statistics import measure
from torch import Tensor

from ktmerge.api import blend
from ktmerge.errors import UsageError
from ktmerge.merge.covariance import of_inputs
from ktmerge.merge.methods.diffusion import diffused, neighbours
from ktmerge.recipes.load import parse_recipe


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed: int, tokens: int, inputs: int) -> Tensor:
    return random(seed, tokens, 6) @ random(seed + 1, 6, inputs) + 0.1 * random(seed + 2, tokens, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_neighbours_are_next_to_one_another(dtype: torch.dtype) -> None:
    own = torch.tensor([0.0, -0.0, 1.0, -1.5, 1e-9, 6.1e-5, torch.finfo(dtype).max]).to(dtype).float()
    low, high = neighbours(own, dtype)
    assert low.equal(own.double())
    assert high.equal(own.double())
    between = torch.cat([random(1, 500), 1e-6 * random(2, 500), 3000 * random(3, 500)])
    low, high = neighbours(between, dtype)
    assert bool((low <= between.double()).all())
    assert bool((high >= between.double()).all())
    nearest = between.to(dtype).double()
    assert bool(((nearest == low) | (nearest == high)).all())
    assert low.to(dtype).double().equal(low)
    step = torch.nextafter(low.to(torch.bfloat16), torch.tensor(torch.inf, dtype=torch.bfloat16))
    assert dtype != torch.bfloat16 or bool(((high == low) | (step.double() == high)).all())


@pytest.mark.parametrize(("tokens", "inputs"), [(200, 70), (20, 130), (50, 1), (3, 5)])
def test_errors_are_passed_on_as_the_formula_says(tokens: int, inputs: int) -> None:
    sample, values, fixed = correlated(1, tokens, inputs), random(4, 4, inputs), random(5, 4, inputs) > 1
    moment = sample.double().numpy().T @ sample.double().numpy() / tokens + 0.3 * np.eye(inputs)
    factor = np.linalg.cholesky(np.linalg.inv(moment)).T
    low, high = (one.numpy() for one in neighbours(values, torch.bfloat16))
    left, expected = values.double().numpy().copy(), np.zeros((4, inputs))
    for j in range(inputs):
        middle = (low[:, j] + high[:, j]) / 2
        chosen = np.where(left[:, j] < middle, low[:, j], high[:, j])
        expected[:, j] = np.where(fixed[:, j], values[:, j].bfloat16().double(), chosen)
        left[:, j + 1 :] -= np.outer((left[:, j] - expected[:, j]) / factor[j, j], factor[j, j + 1 :])
    found = diffused(values, fixed, of_inputs(sample).ridged(0.3), torch.bfloat16)
    assert np.array_equal(found.numpy(), expected)


def test_outputs_miss_less_than_with_the_nearest_values() -> None:
    sample, values = correlated(1, 300, 96).double(), 0.02 * random(4, 32, 96)
    found = diffused(values, torch.zeros(32, 96, dtype=torch.bool), of_inputs(sample).ridged(1e-2), torch.bfloat16)

    def missed(stored: Tensor) -> float:
        return float(((stored - values.double()) @ sample.T).square().sum())

    assert missed(found) < 0.2 * missed(values.bfloat16().double())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {"model.layers.0.mlp.up_proj.weight": 0.02 * random(1, 24, 32), "model.norm.weight": 1 + random(2, 32)}
    write(tmp_path / "base", {name: one.bfloat16() for name, one in tensors.items()}, config={"model_type": "llama"})
    tuned = {name: (one.bfloat16() + 2e-4 * random(3, *one.shape)).bfloat16() for name, one in tensors.items()}
    write(tmp_path / "tuned", tuned, config={"model_type": "llama"})
    measure(tmp_path / "base", tmp_path / "stats" / "base")
    return tmp_path


def blended(
    folder: Path, share: float, *scale: object, output: object = None, **blend_section: object
) -> dict[str, Tensor]:
    document = {
        "ktmerge": 1,
        "base": "base",
        "statistics": "stats/base",
        "experts": {"tuned": {"model": "tuned"}},
        "blend": {"stages": {"combine": "mean", "scale": [{"interpolate": {"a": share}}, *scale]}, **blend_section},
        "output": output or {},
    }
    blend(parse_recipe(document, "recipe", folder), folder / "out", overwrite=True)
    return read(folder / "out")


def test_ends_stay_as_they_are(folder: Path) -> None:
    for share, model in ((0.0, "base"), (1.0, "tuned")):
        stored = read(folder / model)
        found = blended(folder, share, "diffuse")
        assert all(same_bytes(found[name], one) for name, one in stored.items())


def test_halfway_what_is_stored_is_one_of_two_neighbours(folder: Path) -> None:
    base, tuned = (read(folder / model) for model in ("base", "tuned"))
    nearest, found = blended(folder, 0.5), blended(folder, 0.5, "diffuse")
    name = "model.layers.0.mlp.up_proj.weight"
    wanted = base[name].float() + 0.5 * (tuned[name].float() - base[name].float())
    low, high = neighbours(wanted, torch.bfloat16)
    stored = found[name].double()
    assert bool(((stored == low) | (stored == high)).all())
    assert not found[name].equal(nearest[name])
    assert found["model.norm.weight"].equal(nearest["model.norm.weight"])


def test_the_type_is_the_output_s(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    half, plain = {"dtype": "float16", "rounding": "stochastic"}, {"dtype": "float32"}
    wanted = blended(folder, 0.3, output=plain)[name]
    low, high = neighbours(wanted, torch.float16)
    found = blended(folder, 0.3, "diffuse", output=half)[name].double()
    assert bool(((found == low) | (found == high)).all())
    assert not found.equal(wanted.half().double())
    assert blended(folder, 0.3, "diffuse", output=plain)[name].equal(wanted)


def test_it_comes_last_and_is_not_scaled(folder: Path) -> None:
    for scale, section in ((("diffuse",), {"lambda": 0.5}), (("diffuse", "lines"), {})):
        with pytest.raises(UsageError, match="'diffuse' comes last, at lambda 1"):
            blended(folder, 0.5, *scale, **section)
