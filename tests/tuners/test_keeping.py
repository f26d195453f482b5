"""What keeps the base while tuning, each by hand: pulls, replayed batches, distillation, guard, averages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from ktmerge.errors import KtmergeError, UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.load import validate
from ktmerge.tuners.keeping.average import Exponential, Latest, averaged
from ktmerge.tuners.keeping.distil import divergence
from ktmerge.tuners.keeping.guard import Guard
from ktmerge.tuners.keeping.pull import Pull
from ktmerge.tuners.keeping.replay import ReplaySampler
from ktmerge.tuners.origins import Origins
from ktmerge.tuners.selection.compact import Chosen, CompactUpdate


def numbers(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


@pytest.mark.parametrize("stiff", [False, True], ids=["L2-SP", "EWC"])
def test_two_masked_steps_of_adamw_with_a_pull_by_hand(stiff: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = Parameter(torch.randn(4, 5, generator=generator))
    fisher = torch.rand(4, 5, generator=generator) if stiff else torch.ones(4, 5)
    mask = torch.rand(4, 5, generator=generator) < 0.5
    gradients = torch.randn(2, 4, 5, generator=generator)
    base, allowed = numbers(weight), mask.numpy()
    pull = Pull({"w": weight}, 3.0, {"w": fisher} if stiff else None)
    optimizer = torch.optim.AdamW([weight], lr=0.02, weight_decay=0.1)
    update = CompactUpdate(optimizer, [["w"]], keeps_moments=False)
    update.choose({"w": Chosen(mask)})

    stiffness = numbers(fisher) / numbers(fisher).mean()
    w, m, v = base.copy(), np.zeros((4, 5)), np.zeros((4, 5))
    for t in (1, 2):
        weight.grad = gradients[t - 1].clone()
        pull.add_gradients()
        assert pull.penalty == pytest.approx(1.5 * (stiffness * (w - base) ** 2).sum(), rel=1e-5)
        update.mask_gradients()
        optimizer.step()
        g = numbers(gradients[t - 1]) + 3.0 * stiffness * (w - base)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        moved = w * (1 - 0.02 * 0.1) - 0.02 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = np.where(allowed, moved, base)
    np.testing.assert_allclose(numbers(weight), w, rtol=3e-6, atol=1e-7)
    assert (numbers(weight)[~allowed] == base[~allowed]).all()


def test_the_pull_is_the_gradient_of_its_penalty_and_leaves_what_has_none() -> None:
    weights = {"a": Parameter(torch.randn(3)), "b": Parameter(torch.randn(3))}
    pull = Pull(weights, 0.7, None)
    origin = weights["a"].detach().clone()
    with torch.no_grad():
        weights["a"].add_(torch.tensor([0.0, 1.0, -2.0]))
    (0.7 / 2 * (weights["a"] - origin).square().sum()).backward()
    expected = weights["a"].grad
    assert expected is not None
    weights["a"].grad = None
    pull.add_gradients()
    assert weights["a"].grad is not None
    torch.testing.assert_close(weights["a"].grad, expected)
    assert weights["b"].grad is None
    with pytest.raises(KtmergeError, match="zero everywhere"):
        Pull(weights, 1.0, {name: torch.zeros(3) for name in weights})


@pytest.mark.parametrize(("kind", "size"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)])
def test_origins_are_exact_and_small(kind: torch.dtype, size: int) -> None:
    values = torch.randn(50).mul(1e-3).to(kind).float()
    origins = Origins({"w": values})
    assert origins["w"].equal(values)
    assert origins.bytes == 50 * size


@pytest.mark.parametrize(
    ("new", "old", "batch", "replayed"), [(30, 6, 4, 1), (7, 50, 8, 3), (5, 1, 2, 1), (8, 3, 4, 3)]
)
def test_every_batch_has_its_replayed_samples(new: int, old: int, batch: int, replayed: int) -> None:
    sampler = ReplaySampler(new, old, batch, replayed, seed=4)
    seen: list[int] = []
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)
        assert len(order) == len(sampler)
        batches = [order[first : first + batch] for first in range(0, len(order), batch)]
        assert len(batches) == sampler.batches
        assert all(sum(index >= new for index in one) == replayed for one in batches)
        fresh = [index for index in order if index < new]
        assert sorted(fresh) == list(range(new))
        orders.append(tuple(fresh))
        seen += [index - new for index in order if index >= new]
    assert len(set(orders)) > 1
    # round after round each once, over the ends of epochs
    whole = len(seen) // old * old
    assert all(sorted(seen[first : first + old]) == list(range(old)) for first in range(0, whole, old))
    counts = Counter(seen)
    assert max(counts.values()) - min(counts[n] for n in range(old)) <= 1


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_by_hand(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base, own = torch.randn(2, 6, 9, generator=generator) * 4

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(numbers(base) / temperature), log_softmax(numbers(own) / temperature)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum()
    assert float(divergence(base, own, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(base, base, temperature)) == 0.0


def walk(average: Any, weight: Parameter, steps: int, first: int = 1) -> list[np.ndarray]:
    found = []
    for step in range(first, first + steps):
        with torch.no_grad():
            weight[:3] += torch.sin(torch.arange(3.0) + step)
        average.after_step(step)
        found.append(numbers(weight))
    return found


def test_the_exponential_average_by_hand_and_gone_on_with(tmp_path: Path) -> None:
    weight = Parameter(torch.linspace(-1, 1, 5))
    average = Exponential({"w": weight}, 0.5)
    expected = numbers(weight)
    start = expected.copy()
    for step, now in enumerate(walk(average, weight, 20), 1):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * now
    np.testing.assert_allclose(numbers(average.value("w")), expected, rtol=1e-5)
    assert (numbers(average.value("w"))[3:] == start[3:]).all()
    average.save(tmp_path)
    other = Exponential({"w": weight}, 0.5)
    other.load(tmp_path)
    assert other.value("w").equal(average.value("w"))


def test_lawa_is_the_mean_of_the_latest_snapshots(tmp_path: Path) -> None:
    weight = Parameter(torch.linspace(-1, 1, 5))
    average = Latest({"w": weight}, window=3, every=2)
    assert average.value("w").equal(weight)
    start = numbers(weight)
    found = walk(average, weight, 11)
    np.testing.assert_allclose(numbers(average.value("w")), np.mean([found[i] for i in (5, 7, 9)], 0), rtol=1e-6)
    assert (numbers(average.value("w"))[3:] == start[3:]).all()
    average.save(tmp_path)
    other = Latest({"w": weight}, window=3, every=2)
    other.load(tmp_path)
    assert other.value("w").equal(average.value("w"))
    own = weight.detach().clone()
    with averaged({"w": weight}, average):
        assert weight.equal(other.value("w"))
    assert weight.equal(own)


def test_the_guard_goes_back_to_the_last_evaluation_within_its_limit(tmp_path: Path) -> None:
    weight = Parameter(torch.zeros(2))
    guard = Guard({"w": weight}, 0.5)
    assert guard.limit is None
    for step, loss, stops in ((0, 2.0, False), (5, 2.5, False), (10, 2.51, True)):
        with torch.no_grad():
            weight.fill_(step)
        if step == 10:
            guard.save(tmp_path)
            guard = Guard({"w": weight}, 0.5)
            guard.load(tmp_path)
        assert guard.watch(step, loss) == stops
    assert (guard.step, guard.limit, guard.stopped) == (5, 2.5, True)
    guard.restore()
    assert weight.tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fisher": "stats"}, "needs l2_sp, its strength"),
        ({"replay": "r", "batch_size": 1}, "needs a batch_size of 2"),
        ({"replay": "r", "replay_ratio": 1.0}, "replay_ratio: input should be less than 1"),
        ({"distill": 1, "distill_on": "replay"}, "distill_on replay needs replay"),
        ({"stop_upstream": 0.1}, "watches the loss on eval_upstream, which is not given"),
        ({"stop_upstream": 0.1, "eval_upstream": "u", "average": "ema"}, "give one"),
        ({"export": "both"}, "needs average: ema or lawa"),
        ({"replay_ratio": 0.5}, "replay_ratio needs replay, which is not given"),
        ({"average": "ema", "lawa_window": 3}, "lawa_window needs average: lawa"),
        ({"l2_sp": -1}, "l2_sp: input should be greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        validate(FinetuneJob, {"data": "d", **settings}, "here")
