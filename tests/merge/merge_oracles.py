"""What blends must give, in float64 numpy, written from the papers' formulas and the documented key scheme.

Nothing here imports ktmerge. Deltas are the float32 differences the formulas are about; everything after is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray]


# --- random bits: Philox4x32-10 by the reference's definition -------------------------------------------------------


def philox_block(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    c = list(counter)
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0], c[1], c[2], c[3]


def stream_key(seed: int, purpose: str, expert: str, tensor: str) -> int:
    message = b""
    for field in (str(seed), purpose, expert, tensor):
        message += len(field.encode()).to_bytes(4, "little") + field.encode()
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little")


@cache
def words(key: int, count: int) -> np.ndarray:
    blocks = [philox_block((block & 0xFFFFFFFF, block >> 32, 0, 0), key) for block in range(-(-count // 4))]
    return np.array(blocks, dtype=np.uint64).reshape(-1)[:count]


@cache
def draws(key: int, count: int) -> np.ndarray:
    """The upper halves of elements side by side are the halves of one word; the lower ones are another stream's."""
    upper, lower = (words(one, -(-count // 2)).astype("<u4").view("<u2") for one in (key, key ^ 0x9E3779B97F4A7C15))
    return (upper.astype(np.uint64) * 2**16 + lower)[:count]


@cache
def splitmix(key: int, count: int) -> np.ndarray:
    """The first outputs of SplitMix64 with that seed, by stepping its state."""
    found, state = [], key
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        found.append(z ^ z >> 31)
    return np.array(found, dtype=np.uint64)


# --- stages ---------------------------------------------------------------------------------------------------------


def trim_all(deltas: Arrays, density: float, scope: str, expert: str, seed: int) -> Arrays:
    """Keep floor(d n) largest magnitudes, ties to the larger 64-bit hash; per tensor, or over all of them."""

    def hashes(name: str) -> np.ndarray:
        return splitmix(stream_key(seed, "trim", expert, name), deltas[name].size)

    groups = [[name] for name in deltas] if scope == "tensor" else [list(deltas)]
    kept = {}
    for group in groups:
        flat = np.concatenate([deltas[name].reshape(-1) for name in group])
        order = np.lexsort((np.concatenate([hashes(name) for name in group]), np.abs(flat)))
        mask = np.zeros(flat.size, bool)
        count = int(np.floor(density * flat.size))
        mask[order[flat.size - count :]] = True
        start = 0
        for name in group:
            stop = start + deltas[name].size
            kept[name] = np.where(mask[start:stop].reshape(deltas[name].shape), deltas[name], 0.0)
            start = stop
    return kept


def dare_one(delta: np.ndarray, density: float, rescale: str, expert: str, name: str, seed: int) -> np.ndarray:
    mask = draws(stream_key(seed, "dare", expert, name), delta.size).reshape(delta.shape) < density * 2.0**32
    kept = np.where(mask, delta, 0.0)
    if rescale == "unbiased":
        return kept / density
    if rescale == "none" or not kept.any():
        return kept
    order = 1 if rescale == "l1" else 2
    return kept * (np.linalg.norm(delta.reshape(-1), order) / np.linalg.norm(kept.reshape(-1), order))


def elect(deltas: list[np.ndarray], weights: list[float], how: str, aggregate: str, tie: float) -> np.ndarray:
    """Election by mass, count or weight; ``tie`` is the sign that an even vote gets (0: nobody is merged)."""
    stack = np.stack(deltas)
    w = np.array(weights).reshape(-1, *[1] * deltas[0].ndim) / max(weights)
    votes = {"mass": stack, "count": np.sign(stack), "weighted": w * stack}[how].sum(0)
    sign = np.sign(votes)
    sign = np.where(sign == 0, tie, sign)
    agree = (np.sign(stack) == sign) & (stack != 0)
    number, share = agree.sum(0), (agree * w).sum(0)
    total, plain = (agree * w * stack).sum(0), (agree * stack).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        merged = {
            "wmean": total / share,
            "mean": plain / number,
            "wsum_over_count": total / number,
            "sum": total,
            "max": sign * np.abs(agree * stack).max(0),
        }[aggregate]
    return np.where(number > 0, merged, 0.0)


# --- methods --------------------------------------------------------------------------------------------------------


def merged_deltas(
    method: str, deltas: dict[str, Arrays], weights: dict[str, float], seed: int, classes: Mapping[str, str], **p: Any
) -> Arrays:
    """Merged delta of every tensor before lambda; ``deltas`` by expert, then by tensor."""
    experts = sorted(deltas)
    w = [weights[expert] for expert in experts]
    names = list(deltas[experts[0]])
    if method in ("trim", "ties"):
        density, scope = p.get("density", 0.2), p.get("scope", "tensor")
        deltas = {expert: trim_all(deltas[expert], density, scope, expert, seed) for expert in experts}
    if method in ("dare", "dare_ties"):
        density, rescale = p.get("density", 0.5), p.get("rescale", "unbiased")
        deltas = {
            expert: {
                name: delta
                if classes[name] in ("vector", "embed", "conv")
                else dare_one(delta, density, rescale, expert, name, seed)
                for name, delta in deltas[expert].items()
            }
            for expert in experts
        }
    stacks = {name: [deltas[expert][name] for expert in experts] for name in names}
    if method == "linear":
        return {name: sum(a * b for a, b in zip(w, stack, strict=True)) / sum(w) for name, stack in stacks.items()}
    if method in ("task_arithmetic", "dare", "trim"):
        return {name: sum(a * b for a, b in zip(w, stack, strict=True)) for name, stack in stacks.items()}
    how, aggregate = p.get("elect", "weighted"), p.get("aggregate", "wmean")
    ties = dict.fromkeys(names, 0.0)
    if p.get("tie") == "plus":
        ties = dict.fromkeys(names, 1.0)
    if p.get("tie") == "majority":
        ties = _majority(stacks, w, how, p.get("scope", "tensor"))
    return {name: elect(stack, w, how, aggregate, ties[name]) for name, stack in stacks.items()}


def _majority(stacks: dict[str, list[np.ndarray]], w: list[float], how: str, scope: str) -> dict[str, float]:
    balance = {}
    for name, stack in stacks.items():
        votes = sum(
            {"mass": d, "count": np.sign(d), "weighted": a / max(w) * d}[how] for a, d in zip(w, stack, strict=True)
        )
        balance[name] = float(np.sign(votes).sum())
    if scope == "global":
        return dict.fromkeys(balance, float(np.sign(sum(balance.values()))))
    return {name: float(np.sign(value)) for name, value in balance.items()}


def delta_arrays(base: Mapping[str, torch.Tensor], expert: Mapping[str, torch.Tensor]) -> Arrays:
    """Float32 differences, held in float64."""
    return {
        name: (expert[name].float().numpy() - values.float().numpy()).astype(np.float64)
        for name, values in base.items()
        if values.is_floating_point()
    }


def assert_rounded(stored: torch.Tensor, exact: np.ndarray, scale: np.ndarray, name: str) -> None:
    """``stored`` is ``exact`` rounded once to its type; float32 sums of terms of size ``scale`` may err a little."""
    values = stored.double().numpy()
    bits = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[stored.dtype]
    # at a power of two the spacing below is half the spacing above: measure it at the larger of the two
    least = 2.0**-14 if stored.dtype == torch.float16 else 2.0**-126
    exponent = np.floor(np.log2(np.maximum(np.maximum(np.abs(exact), np.abs(values)), least)))
    half = 2.0 ** (exponent - bits) / 2
    slack = 4 * 2.0**-24 * scale
    wrong = np.abs(values - exact) > half + slack
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size} values are not the exact ones rounded"
