"""Batches are as large as memory allows; what does not fit is halved."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktmerge.errors import KtmergeError
from ktmerge.eval import batching
from ktmerge.eval.batching import answers_at_once, limits, out_of_memory
from ktmerge.eval.encode import Request
from ktmerge.eval.likelihood import LikelihoodScorer


def test_bounds_follow_the_memory(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for free in (2**20, 2**26, 2**40):
        monkeypatch.setattr(batching, "free_memory", lambda device, free=free: free)
        bounds = limits(llama, None)
        found.append((bounds.tokens, bounds.logits, bounds.kept, answers_at_once(llama, 200)))
    assert all(a <= b for few, many in pairwise(found) for a, b in zip(few, many, strict=True))
    assert found[0] != found[2]
    assert found[2][0] == batching.USEFUL["cpu"]
    assert found[2][3] == batching.MOST_ANSWERS["cpu"]
    assert min(found[0]) >= 1
    assert limits(llama, 3).sequences == 3


def test_a_control_group_bounds_the_process(tmp_path: Path) -> None:
    assert batching._left_in_group(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert batching._left_in_group(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert batching._left_in_group(tmp_path) == float("inf")


class Small(LikelihoodScorer):
    """A scorer on a device where only ``room`` passes fit."""

    room = 2

    def _logits(self, batch: Any, kept: Any, places: Any) -> torch.Tensor:
        if len(batch) > self.room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")
        return super()._logits(batch, kept, places)


def test_what_does_not_fit_is_halved(llama: Any) -> None:
    requests = [Request((5, 6, 7 + i), (i, 3)) for i in range(9)]
    found = Small(llama).score(requests)
    np.testing.assert_allclose(found.logprob, LikelihoodScorer(llama).score(requests).logprob, atol=1e-4)
    with pytest.raises(KtmergeError, match="choose a smaller batch size, or auto"):
        Small(llama, batch_size=9).score(requests)
    Small.room = 0
    with pytest.raises(KtmergeError, match="no room for one item"):
        Small(llama).score(requests)


def test_other_errors_are_not_taken_for_memory() -> None:
    assert out_of_memory(torch.OutOfMemoryError("x"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
