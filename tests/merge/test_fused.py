"""The compiled way and the torch reference write the same bytes, for every pipeline, type and rounding."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ktmerge.errors import KtmergeError
from ktmerge.merge import fused, workspace
from ktmerge.merge.blending import blend
from ktmerge.merge.flow import Flow
from ktmerge.merge.sinks import FileSink
from ktmerge.recipes.load import parse_recipe

pytest.importorskip("numba")

SHAPES = {
    "model.embed_tokens.weight": (97, 130),
    "model.layers.0.mlp.up_proj.weight": (70, 129),  # its element count is no multiple of 4
    "model.layers.0.input_layernorm.weight": (7,),
    "model.norm.weight": (1,),
}
DTYPES = {"b16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
PAIRS = [("b16", "b16"), ("b16", "f32"), ("f32", "b16"), ("f16", "f16"), ("f32", "f32"), ("f16", "b16")]
BLENDS: list[dict[str, Any]] = [
    {"method": "linear", "lambda": 0.5},
    {"method": "task_arithmetic"},
    {"method": "ties"},
    {"method": "ties", "scope": "global", "density": 0.07, "elect": "mass"},
    {"method": "ties", "density": 1.0},
    {"method": "ties", "density": 0.0},
    {"method": "dare", "density": 0.3},
    {"method": "dare", "density": 0.3, "rescale": "none"},
    {"method": "dare", "density": 1e-300},
    {"method": "dare_ties", "density": 0.6, "lambda": 0.7},
    {"stages": {"transform": [{"dare": {"density": 0.5}}, "trim"], "combine": "sum"}},
    {"method": "breadcrumbs", "density": 0.3, "gamma": 0.1},
    {"method": "breadcrumbs_ties", "scope": "global", "density": 0.5, "gamma": 0.02},
    {"method": "breadcrumbs", "density": 0.7, "gamma": 1.0},
    {"stages": {"transform": [{"breadcrumbs": {"density": 0.5, "gamma": 0.2}}, "trim"], "combine": "largest"}},
    {"method": "magmax"},
    {"method": "emr_unified"},
    {"method": "ema", "beta": 0.7},
    {"method": "ties", "elect": "count", "aggregate": "sum", "tie": "plus"},
    {"method": "ties", "elect": "mass", "aggregate": "wsum_over_count"},
    {"method": "ties", "aggregate": "mean", "tie": "plus", "density": 0.4},
    {"method": "nearswap", "t": 0.004},
    {"method": "clip", "rho": 0.01},
    {"stages": {"combine": "sum", "guard": [{"clip": {"rho": 0.5}}]}},
    {"method": "lines", "alpha": 0.3, "beta": 0.9, "outside": "alpha+beta", "lambda": 1.1},
    {"stages": {"transform": ["trim"], "combine": "elect", "scale": [{"interpolate": {"a": 0.7}}]}},
    {"method": "lm_cocktail", "losses": {"e0": 2.0, "e1": 0.5, "e2": 3.0}},
    {"method": "warp"},
    {"method": "karcher", "lambda": 0.8},
    {"method": "nmean"},
    {"method": "model_stock"},
    {"method": "metagpt"},
    {"method": "nan", "scope": "tensor"},
    {"method": "norm_budget"},
    {"stages": {"transform": ["half_reset", "trim"], "combine": "sum"}},
    {"stages": {"transform": [{"half_reset": {"mode": "element"}}], "combine": "karcher"}},
    {"method": "consensus", "agree": 1},
    {"method": "ram"},
    {"method": "ram_plus"},
    {"method": "localize_stitch", "density": 0.3},
    {"method": "tatr", "quantile": 0.8},
    {
        "stages": {
            "transform": ["trim"],
            "combine": {"trust": {"scope": "tensor"}},
            "scale": [{"interpolate": {"a": 0.7}}],
        }
    },
]
OUTPUTS: list[dict[str, Any]] = [
    {},
    {"dtype": "float16"},
    {"dtype": "float32"},
    {"dtype": "bfloat16", "rounding": "stochastic"},
]
NOT_COVERED: list[dict[str, Any]] = [{"method": "ties", "tie": "majority"}, {"method": "dare", "rescale": "l1"}]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and three experts in bf16 (many equal magnitudes) and in fp32."""
    folder = tmp_path_factory.mktemp("fused")
    for tag, dtype in DTYPES.items():
        common = torch.Generator().manual_seed(0)
        base = {name: torch.randn(shape, generator=common) * 0.02 for name, shape in SHAPES.items()}
        write(folder / f"base{tag}", {name: value.to(dtype) for name, value in base.items()})
        for i, noise in enumerate((3e-4, 1e-4, 1e-3)):
            own = torch.Generator().manual_seed(i + 1)
            tuned = {name: value + torch.randn(value.shape, generator=own) * noise for name, value in base.items()}
            write(folder / f"e{i}-{tag}", {name: value.to(dtype) for name, value in tuned.items()})
    return folder


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))


def blended(
    workshop: Path, out: Path, blend_: dict[str, Any], base: str, experts: str, output: dict[str, Any]
) -> tuple[bytes, list[dict[str, Any]]]:
    alike = blend_.get("aggregate") == "mean" or blend_.get("method") == "emr_unified"  # others would ignore weights
    weights = (1, 1, 1) if alike else (1, 0.5, 0.3)
    document = {
        "ktmerge": 1,
        "base": f"base{base}",
        "experts": {f"e{i}": {"model": f"e{i}-{experts}", "weight": weight} for i, weight in enumerate(weights)},
        "blend": blend_,
        "output": output,
    }
    report = blend(parse_recipe(document, "test", workshop), out, overwrite=True)
    return (out / "model.safetensors").read_bytes(), report.parts()


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("blend_", BLENDS, ids=lambda value: "-".join(map(str, value.values())))
def test_every_output_equals_the_reference(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blend_: dict[str, Any], output: dict[str, Any]
) -> None:
    """Of three pairs of types, and of the other three with the next blend or output."""
    pairs = PAIRS[(BLENDS.index(blend_) + OUTPUTS.index(output)) % 2 :: 2]
    compare(workshop, tmp_path, monkeypatch, blend_, output, pairs)


@pytest.mark.every(21)
@pytest.mark.parametrize("number", range(len(BLENDS)))
def test_equals_the_reference(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every blend, every output and every pair of types occurs."""
    output, pair = OUTPUTS[number % len(OUTPUTS)], PAIRS[number % len(PAIRS)]
    compare(workshop, tmp_path, monkeypatch, BLENDS[number], output, [pair])


def compare(
    workshop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blend_: dict[str, Any],
    output: dict[str, Any],
    pairs: list[tuple[str, str]],
) -> None:
    monkeypatch.setattr(fused, "PIECE", 1 << 11)  # several pieces, and a last one of its own size; large tensors
    monkeypatch.setattr(workspace, "_PART", 1 << 9)
    for base, experts in pairs:
        monkeypatch.setenv("KTMERGE_KERNELS", "auto")
        with monkeypatch.context() as patch:
            patch.setattr(Flow, "merged", general)  # or it would be equal if nothing took the fast way
            fast, numbers = blended(workshop, tmp_path / "out", blend_, base, experts, output)
        monkeypatch.setenv("KTMERGE_KERNELS", "reference")
        reference, expected = blended(workshop, tmp_path / "out", blend_, base, experts, output)
        assert fast == reference, (base, experts)
        for got, want in zip(numbers, expected, strict=True):
            assert {**got, "norm": 0, "relative_norm": 0, "realised": 0} == {
                **want, "norm": 0, "relative_norm": 0, "realised": 0
            }  # fmt: skip
            for key in ("norm", "relative_norm", "realised"):
                assert (got[key] or 0) == pytest.approx(want[key] or 0, rel=1e-3), key


def general(self: Flow, tensor: Any) -> Any:
    raise AssertionError("the general way was taken")


@pytest.mark.parametrize("blend_", NOT_COVERED, ids=lambda value: "-".join(map(str, value.values())))
def test_other_pipelines_take_the_general_way(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blend_: dict[str, Any]
) -> None:
    """Without this, the test above could pass whatever is taken."""
    monkeypatch.setattr(Flow, "merged", general)
    with pytest.raises(AssertionError, match="the general way"):
        blended(workshop, tmp_path / "out", blend_, "b16", "f32", {})


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_what_is_not_finite_is_named(workshop: Path, tmp_path: Path, method: str) -> None:
    from safetensors.torch import load_file

    broken = load_file(workshop / "e1-b16/model.safetensors")
    broken["model.norm.weight"][0] = float("nan")
    for name in ("baseb16", "e0-b16", "e2-b16"):
        (tmp_path / name).symlink_to(workshop / name)
    write(tmp_path / "e1-b16", broken)
    with pytest.raises(KtmergeError, match=r"expert 'e1': tensor 'model.norm.weight' has 1 value"):
        blended(tmp_path, tmp_path / "out", {"method": method}, "b16", "b16", {})
    assert not (tmp_path / "out").exists()


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "blend_", [BLENDS[0], BLENDS[3], NOT_COVERED[0], {"method": "mergekit:slerp", "t": 0.5}], ids=str
)
def test_what_is_not_finite_can_keep_the_base(workshop: Path, tmp_path: Path, blend_: dict[str, Any]) -> None:
    """Elsewhere nothing changes from a blend whose broken elements equal the base; a broken base stays as it is."""
    from safetensors.torch import load_file

    name, one = "model.layers.0.mlp.up_proj.weight", blend_["method"].startswith("mergekit")
    tensors = {model: load_file(workshop / f"{model}-b16" / "model.safetensors") for model in ("e0", "e1")}
    base = load_file(workshop / "baseb16/model.safetensors")
    sound = {model: {key: value.clone() for key, value in found.items()} for model, found in tensors.items()}
    places = [(3, 5, float("nan")), (69, 128, float("inf"))]
    for row, column, value in places:
        tensors["e1"][name][row, column] = value
        for model in sound:
            sound[model][name][row, column] = base[name][row, column]
    results = {}
    for kind, found in {"broken": tensors, "sound": sound}.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "base").symlink_to(workshop / "baseb16")
        for model, values in found.items():
            write(folder / model, values)
        document = {
            "ktmerge": 1,
            "base": "base",
            "experts": {model: {"model": model} for model in (["e1"] if one else found)},
            "blend": blend_,
            "output": {"not_finite": "keep_base"},
        }
        report = blend(parse_recipe(document, "test", folder), folder / "out")
        assert any("2 elements are NaN or infinite" in note for note in report.notes) == (kind == "broken")
        results[kind] = (load_file(folder / "out/model.safetensors"), report.parts())
    for key, value in results["sound"][0].items():
        assert results["broken"][0][key].equal(value), key
    assert results["broken"][1] == results["sound"][1]


def test_a_broken_base_stays_as_it_is(workshop: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    name = "model.norm.weight"
    base = load_file(workshop / "baseb16/model.safetensors")
    base[name][0] = float("-inf")
    write(tmp_path / "baseb16", base)
    for expert in ("e0", "e1", "e2"):
        (tmp_path / f"{expert}-b16").symlink_to(workshop / f"{expert}-b16")
    output = {"not_finite": "keep_base", "dtype": "float16"}
    blended(tmp_path, tmp_path / "out", {"method": "linear"}, "b16", "b16", output)
    assert load_file(tmp_path / "out/model.safetensors")[name].tolist() == [float("-inf")]


@pytest.mark.every(2)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_file_cut_short_while_the_kernels_read_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    count = 400
    for name in ("base", "e0"):
        own = torch.Generator().manual_seed(len(name))
        write(tmp_path / name, {f"layers.{n}.weight": torch.randn(64, 64, generator=own) for n in range(count)})
    made: list[str] = []
    real = FileSink.write_bytes

    def cut(sink: FileSink, name: str, data: memoryview, start: int) -> None:
        if not made:
            os.truncate(tmp_path / "e0" / "model.safetensors", 100_000)
        made.append(name)
        real(sink, name, data, start)

    monkeypatch.setattr(FileSink, "write_bytes", cut)
    document = {
        "ktmerge": 1, "base": "base", "experts": {"e0": {"model": "e0"}}, "blend": {"method": method},
    }  # fmt: skip
    with pytest.raises(KtmergeError, match=r"e0/model.safetensors: ends inside tensor '.*'; it was truncated"):
        blend(parse_recipe(document, "test", tmp_path), tmp_path / "out", device="cpu")
    assert made
    assert len(made) < count
    assert not (tmp_path / "out").exists()
