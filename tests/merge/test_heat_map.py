"""The heat map: what stands where, in which colour, in which kind of file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from merge_models import llama_tensors, tuned, write

import ktmerge
from ktmerge.errors import UsageError
from ktmerge.merge import inspect
from ktmerge.merge.diagnostics.picture import heat_map


def cells(svg: str) -> list[str]:
    """Fill colour of every cell, in order; cells are what has a white edge."""
    return re.findall(r"style=\"fill: (#\w+)[^\"]*stroke: #ffffff", svg)


def drawn(svg: str) -> tuple[list[str], dict[str, int]]:
    """Texts in order, and how many cells have each fill colour."""
    fills: dict[str, int] = {}
    for fill in cells(svg):
        fills[fill] = fills.get(fill, 0) + 1
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg), fills


def test_every_layer_and_kind_has_a_cell_and_what_did_not_move_is_grey(llamas: Path) -> None:
    found = inspect(llamas / "base", {"a": llamas / "a", "c": llamas / "c"})
    texts, fills = drawn(heat_map(found, Path("x.svg")).decode())
    assert [text for text in texts if text in ("a", "c")] == ["a", "c"]
    for text in ("embed", "llm.layers", "norm", "0", "1", "q", "k", "up", "down"):
        assert text in texts
    # two models; five kinds in two layers, embed, and the last norm
    assert sum(fills.values()) == 2 * (2 * 5 + 2)
    assert fills["#e4e4e4"] == sum(
        moved.changed == 0 for model in ("a", "c") for moved in found.movements[model].values()
    )
    embed = found.movement("a", "embed")
    assert embed is not None
    assert f"{embed.relative:.2%}" in texts


def test_a_colour_means_the_same_in_every_panel_and_darker_is_farther(tmp_path: Path) -> None:
    base = llama_tensors()
    write(tmp_path / "base", base)
    for name, size in (("near", 1e-3), ("far", 1e-2)):
        write(tmp_path / name, tuned(base, size, 1))

    def brightness(*models: str) -> list[float]:
        found = inspect(tmp_path / "base", {name: tmp_path / name for name in models})
        svg = heat_map(found, Path("x.svg")).decode()
        return [sum(bytes.fromhex(fill[1:])) for fill in cells(svg)]

    both, swapped = brightness("near", "far"), brightness("far", "near")
    half = len(both) // 2
    assert both[:half] == swapped[half:]
    assert sum(both[:half]) > sum(both[half:])


def test_the_scale_has_labels_enough_to_be_read(tmp_path: Path) -> None:
    """Powers of ten alone are none or one where all moved about as far."""
    base = llama_tensors()
    write(tmp_path / "base", base)
    write(tmp_path / "a", tuned(base, 1e-2, 1, frozen=("norm",)))
    texts, _ = drawn(heat_map(inspect(tmp_path / "base", {"a": tmp_path / "a"}), Path("x.svg")).decode())
    assert len([text for text in texts if re.fullmatch(r"(0\.)?0*[125]0*%", text)]) >= 3, texts


@pytest.mark.slow
def test_joined_queries_keys_and_values_lie_under_the_three(tmp_path: Path) -> None:
    """A vision tower with one matrix for all three, a language model with three; and a model with joined ones only."""
    shapes = {f"visual.blocks.{i}.attn.{name}.weight": (8, 8) for i in range(2) for name in ("qkv", "proj")}
    joined = {name: torch.randn(shape) for name, shape in shapes.items()}
    base = {**llama_tensors(torch.float32), **joined}
    base |= {f"model.layers.{i}.self_attn.v_proj.weight": torch.randn(8, 8) for i in range(2)}
    for name, tensors in (("both", base), ("joined", joined)):
        write(tmp_path / name / "base", tensors)
        write(tmp_path / name / "x", tuned(tensors, 1e-2, 1))
        found = inspect(tmp_path / name / "base", {"x": tmp_path / name / "x"})
        texts, _ = drawn(heat_map(found, Path("x.svg")).decode())
        assert ("qkv" in texts) == (name == "joined")
        assert ("v" in texts) == (name == "both")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "start"),
    [pytest.param("x.png", b"\x89PNG", marks=pytest.mark.slow), ("x.PDF", b"%PDF"), ("x.svg", b"<?xml")],
)
def test_the_suffix_decides_the_kind_and_the_same_data_gives_the_same_bytes(
    llamas: Path, tmp_path: Path, name: str, start: bytes
) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        ktmerge.inspect(llamas / "base", [llamas / "a"], plot=tmp_path / str(number) / name)
    first, second = ((tmp_path / str(number) / name).read_bytes() for number in range(2))
    assert first.startswith(start)
    assert first == second


def test_what_cannot_be_drawn_is_refused_before_anything_is_read(llamas: Path, tmp_path: Path) -> None:
    base, a = llamas / "base", llamas / "a"
    with pytest.raises(UsageError, match=r"can't draw '\.jpg' files; end it in \.png, \.svg, \.pdf"):
        ktmerge.inspect(base, [a], plot=tmp_path / "x.jpg")
    with pytest.raises(UsageError, match="needs a tuned model"):
        ktmerge.inspect(base, plot=tmp_path / "x.png")
    with pytest.raises(UsageError, match="leave --headers away"):
        ktmerge.inspect(base, [a], headers_only=True, plot=tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(b"mine")
    with pytest.raises(UsageError, match="--overwrite"):
        ktmerge.inspect(base, [a], plot=tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"mine"
    ktmerge.inspect(base, [a], plot=tmp_path / "x.png", overwrite=True)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
