"""Every compiled kernel has its part in a blend whose bytes are those of plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import Model, read, same_bytes

from ktmerge.merge import blend, blend_into, selection
from ktmerge.merge.kernels import native
from ktmerge.merge.kernels.codes import SIGNATURES
from ktmerge.merge.pristine import Pristine

pytest.importorskip("numba")

EXPERTS = {"a": ("a", 1.0), "b": ("b", 0.5), "c": ("c", 0.3)}
BLENDS: list[dict[str, Any]] = [
    {"method": "task_arithmetic"},
    {"method": "ties", "density": 0.3},
    {"method": "ties", "density": 0.3, "tie": "majority"},
    {"method": "dare", "density": 0.3, "rescale": "l1"},
    {"method": "della", "density": 0.4},
    {"method": "karcher"},
    {"method": "metagpt"},
    {"method": "tatr", "quantile": 0.8},
    {"stages": {"combine": "sum", "guard": [{"clip": {"rho": 0.01}}]}},
]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that were called."""
    names: set[str] = set()

    def call(name: str, kernel: Callable[..., int], *arguments: Any) -> int:
        names.add(name)
        return kernel(*arguments)

    class Watched(native.Native):
        def _load(self, group: str) -> None:
            super()._load(group)
            for name in native.GROUPS[group]:
                self.__dict__[name] = partial(call, name, self.__dict__[name])

    watched = Watched()
    monkeypatch.setattr(native, "_loaded", lambda: watched)
    return names


@pytest.mark.slow
def test_every_kernel_equals_plain_torch(
    called: set[str], llamas: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_LARGE", 64)  # samples of little tensors, too
    for number, (experts, given) in enumerate([("c", {"method": "linear"}), *(("abc", one) for one in BLENDS)]):
        recipe = recipe_in(llamas, {name: EXPERTS[name] for name in experts}, given)
        stored = []
        for kernels, few in (("reference", 1 << 21), ("auto", 1 << 21), ("auto", 0)):
            monkeypatch.setenv("KTMERGE_KERNELS", kernels)
            monkeypatch.setattr(selection, "_FEW", few)  # what is too much to note is counted
            blend(recipe, tmp_path / f"{number}-{kernels}-{few}", afresh=True)  # nothing recalled
            stored.append(read(tmp_path / f"{number}-{kernels}-{few}"))
        assert all(same_bytes(one[name], values) for one in stored[1:] for name, values in stored[0].items()), given
    model, sources = Model(stored[0], torch.bfloat16), Pristine()
    for _ in range(3):  # the first leaves merged deltas; with those, all tensors take one call
        blend_into(model, recipe, sources, measured=False)
        assert all(same_bytes(values, stored[0][name]) for name, values in model.state_dict().items())
    assert not SIGNATURES.keys() - called


@pytest.mark.slow
def test_hundreds_of_experts_equal_plain_torch(
    llamas: Path, tmp_path: Path, recipe_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = {f"e{number}": ("abc"[number % 3], 1 / 520) for number in range(520)}
    recipe = recipe_in(llamas, experts, {"method": "task_arithmetic"})
    blend(recipe, tmp_path / "compiled")
    monkeypatch.setenv("KTMERGE_KERNELS", "reference")
    blend(recipe, tmp_path / "plain")
    plain = read(tmp_path / "plain")
    assert all(same_bytes(plain[name], values) for name, values in read(tmp_path / "compiled").items())
