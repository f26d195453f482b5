"""Where PEFT's merge arithmetic and ours mean the same, they give the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_memory import MATRIX, Workbench

merge_utils = pytest.importorskip("peft.utils.merge_utils")

WEIGHTS = {"a": 1.0, "b": 0.5, "c": 0.25}


def deltas() -> dict[str, dict[str, torch.Tensor]]:
    """Without equal magnitudes: PEFT leaves to chance which of them stay."""
    return {
        name: {MATRIX: torch.randn(12, 10, generator=torch.Generator().manual_seed(seed)) * 1e-2}
        for seed, name in enumerate(WEIGHTS)
    }


def theirs(function: Any, *arguments: Any) -> torch.Tensor:
    found: torch.Tensor = function(
        [tensors[MATRIX] for tensors in deltas().values()], torch.tensor(list(WEIGHTS.values())), *arguments
    )
    return found


def ours(folder: Path, blend: dict[str, Any]) -> torch.Tensor:
    return Workbench(folder).merged(deltas(), blend, weights=WEIGHTS)[MATRIX]


def test_task_arithmetic(tmp_path: Path) -> None:
    torch.testing.assert_close(
        ours(tmp_path, {"method": "task_arithmetic"}), theirs(merge_utils.task_arithmetic), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_magnitude_prune(tmp_path: Path, density: float) -> None:
    blend = {"stages": {"transform": {"trim": {"density": density}}, "combine": "sum"}}
    torch.testing.assert_close(
        ours(tmp_path, blend), theirs(merge_utils.magnitude_prune, density), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(("sign", "elect"), [("total", "mass"), ("frequency", "count")])
@pytest.mark.parametrize("density", [0.2, 0.6])
def test_ties(tmp_path: Path, sign: str, elect: str, density: float) -> None:
    """PEFT elects without the weights, sums with them, divides by the number that agree; an even vote is a plus."""
    blend = {"method": "ties", "density": density, "elect": elect, "aggregate": "wsum_over_count", "tie": "plus"}
    torch.testing.assert_close(ours(tmp_path, blend), theirs(merge_utils.ties, density, sign), rtol=1e-6, atol=1e-9)
