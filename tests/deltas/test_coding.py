"""Coding of elements against others: exact for every bit pattern and type, refused when broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ktmerge.deltas.coding import decode, encode, packed, unpacked
from ktmerge.deltas.lossy import factorise, multiply, quantise

TYPES = (np.uint8, np.uint16, np.uint32, np.uint64)


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("floats", [False, True])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_every_pattern_comes_back(dtype: Any, floats: bool, data: st.DataObject) -> None:
    reference = data.draw(npst.arrays(dtype, st.integers(0, 40)))
    target = data.draw(npst.arrays(dtype, len(reference)))
    kind, blobs = encode(target, reference, floats=floats)
    assert np.array_equal(decode(kind, blobs, reference, floats=floats), target)


@pytest.mark.parametrize(("share", "kind"), [(0.0, "equal"), (0.001, "sparse"), (1.0, "steps")])
def test_the_shorter_coding_is_taken(share: float, kind: str) -> None:
    generator = np.random.default_rng(0)
    reference = torch.randn(50_000).bfloat16()
    moved = reference.float() * (1 + 0.02 * torch.randn(50_000) * torch.from_numpy(generator.random(50_000) < share))
    bits = [one.bfloat16().view(torch.uint16).numpy() for one in (moved, reference.float())]
    found, blobs = encode(*bits, floats=True)
    assert found.partition(":")[0] == kind
    assert sum(map(len, blobs)) < 0.6 * bits[0].nbytes
    assert np.array_equal(decode(found, blobs, bits[1], floats=True), bits[0])


def test_broken_blobs_are_refused() -> None:
    reference = np.zeros(10, np.uint16)
    kind, blobs = encode(np.arange(10, dtype=np.uint16), reference, floats=False)
    for blob in (b"", b"junk", blobs[0][:-3], packed(b"\0" * 18), packed(b"\0" * 22)):
        with pytest.raises(ValueError, match=r"."):
            decode(kind, [blob], reference, floats=False)
    far = packed(np.array([200, 0, 0, 0], np.uint8).tobytes())
    with pytest.raises(ValueError, match="outside the tensor"):
        decode("sparse:1", [far, packed(b"\1\0")], reference, floats=False)
    with pytest.raises(ValueError, match="unknown coding"):
        decode("pickle", [], reference, floats=False)


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = packed(b"\0" * (1 << 24))
    assert len(bomb) < 10_000
    monkeypatch.setattr(zstandard, "ZstdDecompressor", None)  # it must not come to that
    with pytest.raises(ValueError, match="16777216 bytes where 100 were written"):
        unpacked(bomb, 100)


@pytest.mark.parametrize("error", [0.3, 0.03, 0.003])
def test_steps_stay_within_the_error(error: float) -> None:
    delta = torch.randn(200, 300) * 1e-3
    delta[:50] = 0
    _, blobs, made = quantise(delta, error)
    assert float((made - delta).double().norm() / delta.double().norm()) < 1.05 * error
    assert len(blobs[0]) < delta.numel() * 4 * (0.5 if error < 0.01 else 0.3)


def test_factors_of_a_low_rank_change() -> None:
    torch.manual_seed(0)
    delta = torch.randn(300, 4) @ torch.randn(4, 200) * 1e-3
    found = factorise(delta, 0.01)
    assert found is not None
    parameters, blobs, made = found
    assert parameters["rank"] == 4
    assert float((made - delta).norm() / delta.norm()) < 0.01
    assert torch.equal(multiply(parameters, blobs), made)
    assert factorise(torch.randn(300, 200), 0.01) is None
