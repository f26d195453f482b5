"""Quantised checkpoints read as the numbers they stand for.

Oracles: transformers where it dequantises on the CPU, torch's own float8, the published formulas in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.opening import open_model
from ktmerge.checkpoints.quantised import scheme_of
from ktmerge.errors import UsageError

NAME = "model.layers.0.mlp.up_proj.weight"
NF4 = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


def write(folder: Path, tensors: dict[str, torch.Tensor], method: str | None, **settings: Any) -> Path:
    folder.mkdir()
    tensors = {"model.norm.weight": torch.ones(8), **tensors}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16"}
    if method is not None:
        config["quantization_config"] = {"quant_method": method, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shown(folder: Path, name: str = NAME) -> torch.Tensor:
    """The dequantised tensor, read whole, and held against every other way to read it."""
    found = open_model(str(folder), Path("/"), dequantised=True)
    with found.reader() as reader:
        whole, size = reader.read(name), found[name].numel
        for step in (1 if size < 100 else 3, 7, 33):
            pieces = [reader.read(name, start, min(start + step, size)) for start in range(0, size, step)]
            assert torch.cat(pieces).view(torch.int32).equal(whole.view(torch.int32))
        assert b"".join(map(bytes, reader.blocks(name))) == whole.numpy().tobytes()
    assert found[name].dtype == "F32"
    assert scheme_of(found) is None
    return whole.view(found[name].shape)


def fp8(rows: int = 6, columns: int = 8, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return (4 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("shape", "key", "scale"),
    [
        ((6, 8), "scale", ()),
        ((6, 8), "scale", (1,)),
        ((6, 8), "scale", (6,)),
        ((6, 8), "scale", (6, 1)),
        ((6, 8), "scale_inv", (3, 2)),
    ],
)
def test_fp8_is_code_times_scale(
    tmp_path: Path, shape: tuple[int, int], key: str, scale: tuple[int, ...], dtype: torch.dtype
) -> None:
    codes, scales = fp8(*shape, dtype), torch.rand(scale) + 0.1
    write(tmp_path / "q", {NAME: codes, f"{NAME}_{key}": scales}, "fp8")
    grid = scales.view(-1, 1) if scale == (6,) else scales.view(1, 1) if scales.numel() == 1 else scales
    tall, wide = 6 // grid.shape[0], 8 // grid.shape[1]
    spread = grid.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
    assert shown(tmp_path / "q").equal(codes.float() * spread)


def test_every_fp8_code_is_torchs(tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float8_e4m3fn, torch.float8_e5m2)):
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
        write(tmp_path / str(number), {NAME: codes, f"{NAME}_scale": torch.ones(1)}, "fp8")
        assert torch.equal(shown(tmp_path / str(number)).nan_to_num(7.0), codes.float().nan_to_num(7.0))


def test_fp8_blocks_are_cut_off_at_the_edge(tmp_path: Path) -> None:
    codes, scales = fp8(5, 7), torch.rand(3, 2) + 0.1
    tensors = {NAME: codes, f"{NAME}_scale_inv": scales}
    write(tmp_path / "q", tensors, "fp8", weight_block_size=[2, 4])
    spread = scales.repeat_interleave(2, 0)[:5].repeat_interleave(4, 1)[:, :7]
    assert shown(tmp_path / "q").equal(codes.float() * spread)


def test_fp8_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes = torch.stack([fp8(8, 6), fp8(8, 6).flip(0)])
    scales = torch.rand(2, 4, 2) + 0.1
    write(tmp_path / "q", {name: codes, f"{name}_scale_inv": scales}, "fp8")
    assert shown(tmp_path / "q", name).equal(Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32))


def test_mxfp4_is_transformers_own(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, 10, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 136, (2, 10, 3), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(2, 10)}
    write(tmp_path / "q", tensors, "mxfp4")
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert shown(tmp_path / "q", name).equal(expected)
    found = open_model("q", tmp_path, dequantised=True)
    assert set(found.tensors) == {name, f"{name}_bias", "model.norm.weight"}


def _state(**values: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_is_code_times_the_maximum_of_its_block(tmp_path: Path, nested: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 16, (6 * 64,), generator=generator)
    packed = ((codes[0::2] << 4) | codes[1::2]).to(torch.uint8).view(-1, 1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 64]}
    tensors = {NAME: packed, f"{NAME}.quant_map": torch.tensor(NF4)}
    absmax = torch.rand(6, generator=generator, dtype=torch.float32)
    if nested:
        table = torch.linspace(-1, 1, 256)
        inner = torch.randint(0, 256, (6,), generator=generator, dtype=torch.uint8)
        outer = torch.rand(2, generator=generator)
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.75}
        tensors |= {f"{NAME}.absmax": inner, f"{NAME}.nested_absmax": outer, f"{NAME}.nested_quant_map": table}
        wide = table.double()[inner.long()] * outer.double().repeat_interleave(4)[:6] + 0.75
        absmax = wide.float()
    else:
        tensors[f"{NAME}.absmax"] = absmax
    tensors[f"{NAME}.quant_state.bitsandbytes__nf4"] = _state(**state)
    write(tmp_path / "q", tensors, "bitsandbytes", load_in_4bit=True)
    expected = torch.tensor(NF4).double()[codes].view(6, 64) * absmax.double()[:, None]
    assert shown(tmp_path / "q").equal(expected.float())


def test_int8_is_code_times_its_rows_maximum(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (6, 8), dtype=torch.int8)
    maxima = torch.rand(6) + 0.1
    owner = NAME.removesuffix("weight")
    tensors = {NAME: codes, f"{owner}SCB": maxima, f"{owner}weight_format": torch.tensor(0, dtype=torch.uint8)}
    write(tmp_path / "q", tensors, "bitsandbytes", load_in_8bit=True)
    assert shown(tmp_path / "q").equal((codes.double() * maxima.double()[:, None] / 127).float())


PACKED = torch.zeros(4, 8, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "method", "scheme"),
    [
        ({"a.qweight": PACKED, "a.qzeros": PACKED.clone(), "a.scales": torch.ones(4, 8)}, "gptq", "GPTQ"),
        ({"a.qweight": PACKED, "a.qzeros": PACKED.clone(), "a.scales": torch.ones(4, 8)}, "awq", "AWQ"),
        ({"a.weight_packed": PACKED, "a.weight_scale": torch.ones(4, 1)}, "compressed-tensors", "compressed-tensors"),
        ({"a.weight": fp8(), "a.other": PACKED}, None, "FP8"),
        ({"a.weight": fp8(), "a.weight_scale": torch.ones(5, 1)}, "fp8", "FP8"),
        ({"a.qweight": PACKED, "a.g_idx": torch.zeros(8, dtype=torch.int32)}, None, "GPTQ"),
    ],
)
def test_other_schemes_are_named_and_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], method: str | None, scheme: str
) -> None:
    folder = write(tmp_path / "q", tensors, method)
    assert scheme_of(Checkpoint.open(folder)) == scheme
    with pytest.raises(UsageError, match=f"quantised by {scheme}; .*stored otherwise|do not fit together"):
        open_model("q", tmp_path, dequantised=True)


def test_what_is_not_quantised_stays_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "q", {NAME: torch.ones(6, 8)}, None)
    assert open_model("q", tmp_path, dequantised=True) == Checkpoint.open(tmp_path / "q")


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocksize": 0},
        {"shape": ["x"]},
        {"blocksize": 32},
        {"nested_offset": "x"},
        {"shape": [6, 63]},
        {"nested_offset": 10**400},
        None,
    ],
)
def test_a_state_that_does_not_fit_its_codes_is_refused(tmp_path: Path, wrong: dict[str, Any] | None) -> None:
    state = {"blocksize": 64, "shape": [6, 64], "nested_blocksize": 6, "nested_offset": 0.5, **(wrong or {})}
    nested = torch.full((100_000,), ord("["), dtype=torch.uint8)
    tensors = {
        NAME: torch.zeros(192, 1, dtype=torch.uint8),
        f"{NAME}.quant_map": torch.tensor(NF4),
        f"{NAME}.absmax": torch.zeros(6, dtype=torch.uint8),
        f"{NAME}.nested_absmax": torch.ones(1),
        f"{NAME}.nested_quant_map": torch.ones(256),
        f"{NAME}.quant_state.bitsandbytes__nf4": nested if wrong is None else _state(**state),
    }
    write(tmp_path / "q", tensors, "bitsandbytes")
    with pytest.raises(UsageError, match=r"stored otherwise|do not fit together"):
        open_model("q", tmp_path, dequantised=True)
