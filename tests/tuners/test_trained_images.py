"""Text fine-tunes of a model that sees: its parts under the names of its file, whatever the live model calls them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_statistics_images import tiny_llava  # noqa: F401 - a fixture
from tuning import tune, weights

from ktmerge.checkpoints.parts import Parts
from ktmerge.tuners.selection import store


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "part"),
    [
        pytest.param({"train": "last:1"}, "llm.layers[1]", marks=pytest.mark.slow),
        ({"train": "llm.layers[0]+vision", "select": "magnitude"}, "llm.layers[0]"),
    ],
    ids=str,
)
def test_only_the_part_moves_under_the_files_names(
    tiny_llava: Path,  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    part: str,
) -> None:
    tune(tiny_llava, tmp_path, max_steps=2, warmup=0, **settings)
    before, after = weights(tiny_llava), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    parts = Parts(before, {"text_config": {"vocab_size": 1}})
    moved = {name for name in before if not before[name].equal(after[name].to(before[name].dtype))}
    assert moved
    assert {parts.of(name) for name in moved} == {part}
    if "select" in settings:
        found = store.read(tmp_path / "out" / store.MASKS)
        assert found.masks.keys() <= before.keys()
        for name in moved:
            changed = before[name] != after[name]
            assert not (changed & ~found.masks[name]).any()
            assert int(found.masks[name].sum()) == round(0.5 * before[name].numel())
    else:
        assert all(parts.of(name) != part or name in moved for name in before)


@pytest.mark.slow
def test_either_way_of_naming_comes_out_as_it_was(tiny_llava: Path, tmp_path: Path) -> None:  # noqa: F811
    """transformers saves a LLaVA as it is on the hub, and calls its modules otherwise; some files have those names."""
    from safetensors.torch import save_file

    shutil.copytree(tiny_llava, tmp_path / "base")
    names = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    names |= {"vision_tower.": "model.vision_tower.", "multi_modal": "model.multi_modal"}
    given = {}
    for name, tensor in weights(tiny_llava).items():
        old = next(prefix for prefix in names if name.startswith(prefix))
        given[names[old] + name.removeprefix(old)] = tensor
    save_file(given, tmp_path / "base/model.safetensors", {"format": "pt"})
    tune(tmp_path / "base", tmp_path, max_steps=2, warmup=0, train="head+norm", select="random", density=0.25)
    after = weights(tmp_path / "out")
    assert after.keys() == given.keys()
    moved = {name for name in given if not given[name].equal(after[name].to(given[name].dtype))}
    assert moved == {"lm_head.weight", "model.language_model.norm.weight"}
    assert store.read(tmp_path / "out" / store.MASKS).masks.keys() == moved
