"""Selective tuning of two small tensors by hand: who is chosen, what moves, how far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from tuning import Listener

from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.recipes.load import validate
from ktmerge.tuners.selection import store
from ktmerge.tuners.selection.compact import Chosen, CompactUpdate
from ktmerge.tuners.selection.halves import chosen_half
from ktmerge.tuners.selection.selection import Selection

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


def world(**settings: Any) -> tuple[dict[str, Parameter], Selection, torch.optim.Optimizer, list[Any]]:
    """Two parameters, a bound selection, its AdamW with decay, and the gradients of five steps and two batches."""
    generator = torch.Generator().manual_seed(5)
    weights = {name: Parameter(torch.randn(6, 7, generator=generator) * (1 + i)) for i, name in enumerate(NAMES)}
    gradients = [{n: torch.randn(6, 7, generator=generator) * (2 - i) for i, n in enumerate(NAMES)} for _ in range(7)]
    job = FinetuneJob.model_validate({"data": "d", **settings})
    selection = Selection(job, weights, Parts(NAMES), Listener())
    optimizer = torch.optim.AdamW(list(weights.values()), lr=0.01, weight_decay=0.1)
    selection.bind(optimizer, [list(NAMES)])

    def batches() -> Iterator[None]:
        for found in gradients[5:]:
            give(weights, found)
            yield

    selection.begin(batches)
    return weights, selection, optimizer, gradients


def give(weights: dict[str, Parameter], gradients: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        weight.grad = gradients[name].clone()


def step(
    weights: dict[str, Parameter], selection: Selection, optimizer: torch.optim.Optimizer, gradient: Any, number: int
) -> None:
    give(weights, gradient)
    selection.observe()
    selection.mask_gradients()
    optimizer.step()
    selection.after_step(number)


def flat(tensors: dict[str, Any]) -> np.ndarray:
    return np.concatenate([tensors[name].detach().numpy().astype(np.float64).reshape(-1) for name in NAMES])


ALL = [
    {"select": "magnitude", "density": 0.25},
    {"select": "magnitude", "scope": "global", "mask": "soft"},
    {"select": "gradient", "density": 0.3, "every": 2},
    {"select": "gradient", "density": 0.3, "scope": "tensor", "mask": "soft", "every": 1},
    {"select": "fused"},
    {"select": "fused", "density": 0.2, "every": 2},
    {"select": "fused", "mask": "soft", "every": 2},
    {"select": "random", "density": 0.4, "every": 3},
    {"select": "child_f"},
    {"select": "child_d"},
    {"select": "half", "every": 2},
]


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_at_every_step_only_what_is_chosen_moves(settings: dict[str, Any]) -> None:
    weights, selection, optimizer, gradients = world(**settings)
    start = flat(weights)
    for number, gradient in enumerate(gradients[:5], 1):
        before, mask = flat(weights), flat(selection.masks) > 0
        give(weights, gradient)
        selection.observe()
        selection.mask_gradients()
        assert not flat({name: one.grad for name, one in weights.items()})[~mask].any()
        optimizer.step()
        after = flat(weights)
        assert (after[~mask] == before[~mask]).all()
        assert (after[mask] != before[mask]).any() or not mask.any()
        selection.after_step(number)
        if settings.get("mask") == "soft":
            outside = flat(selection.masks) == 0
            assert (flat(weights)[outside] == start[outside]).all()
    touched = flat(selection.touched) > 0
    assert (flat(weights)[~touched] == start[~touched]).all()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"select": "magnitude"}, 42),
        ({"select": "magnitude", "density": 0.01, "scope": "global"}, 1),
        ({"select": "gradient"}, 8),
        ({"select": "random", "density": 0.4, "scope": "global"}, 34),
        ({"select": "fused", "density": 0.2, "scope": "tensor"}, 16),
        ({"select": "child_d", "scope": "tensor"}, 26),
        ({"select": "random", "density": 1.0}, 84),
    ],
    ids=str,
)
def test_the_number_is_exact(settings: dict[str, Any], count: int) -> None:
    assert world(**settings)[1].selected == count


def test_a_density_that_chooses_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"density 0\.01 chooses none of 84 elements; raise it"):
        world(select="magnitude", density=0.01)


def test_magnitude_chooses_the_smallest_of_each_tensor_or_of_all() -> None:
    weights, selection, *_ = world(select="magnitude", density=0.25)
    for name in NAMES:
        sizes, mask = weights[name].detach().abs(), selection.masks[name]
        assert sizes[mask].max() <= sizes[~mask].min()
    weights, selection, *_ = world(select="magnitude", density=0.25, scope="global")
    sizes, mask = abs(flat(weights)), flat(selection.masks) > 0
    assert mask.sum() == 21
    assert sizes[mask].max() <= sizes[~mask].min()


def test_gradient_goes_by_the_sum_of_squares_since_the_last_choice() -> None:
    weights, selection, optimizer, gradients = world(select="gradient", density=0.25, every=2)
    for found, batches in ((selection.masks, gradients[5:]),):
        scores = sum(flat(one) ** 2 for one in batches)
        assert set(np.flatnonzero(flat(found))) == set(np.argsort(-scores)[:21])
    for number in (1, 2):
        step(weights, selection, optimizer, gradients[number], number)
    # the dense gradients of both steps, not only what was let through
    scores = sum(flat(one) ** 2 for one in gradients[1:3])
    assert set(np.flatnonzero(flat(selection.masks))) == set(np.argsort(-scores)[:21])
    assert [one["step"] for one in selection.history] == [0, 2]


def standing(values: np.ndarray) -> np.ndarray:
    sizes = abs(values)
    return 1 / (1 + np.exp(-(sizes - sizes.mean()) / sizes.std()))


def fused(weight: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SPIDER, from its formulas: who is chosen, and the soft mask."""
    own, needed = standing(weight), standing(gradient)
    chosen = needed > own
    share = np.where(chosen, needed / (needed + own), 0)
    return chosen, np.minimum(share / share[chosen].mean(), 1)


def test_fused_is_spiders_rule_by_hand() -> None:
    """Two steps of AdamW in float64, each followed by w <- (1 - M) w0 + M w; M again from all gradients so far."""
    weights, selection, optimizer, gradients = world(select="fused", mask="soft", every=2)
    base = {name: weights[name].detach().numpy().astype(np.float64) for name in NAMES}
    sums = {name: sum(one[name].numpy().astype(np.float64) for one in gradients[5:]) for name in NAMES}
    expected = {}
    for name in NAMES:
        chosen, share = fused(base[name], sums[name])
        assert (selection.masks[name].numpy() == chosen).all()
        w, m, v = base[name].copy(), np.zeros((6, 7)), np.zeros((6, 7))
        for t in (1, 2):
            g = gradients[t][name].numpy().astype(np.float64)
            sums[name] = sums[name] + g
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            moved = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            w = (1 - share) * base[name] + share * moved
        again, _ = fused(base[name], sums[name])
        expected[name] = np.where(again, w, base[name])
    for number in (1, 2):
        step(weights, selection, optimizer, gradients[number], number)
    for name in NAMES:
        np.testing.assert_allclose(weights[name].detach().numpy(), expected[name], rtol=2e-6, atol=1e-7)


def test_one_masked_step_of_adamw_by_hand() -> None:
    weights, selection, optimizer, gradients = world(select="random", density=0.5)
    base = flat(weights)
    mask = flat(selection.masks) > 0
    step(weights, selection, optimizer, gradients[0], 1)
    g = flat(gradients[0])
    moved = base * (1 - 0.01 * 0.1) - 0.01 * np.sign(g) / (1 + 1e-8 / abs(g))
    np.testing.assert_allclose(flat(weights), np.where(mask, moved, base), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.5, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.5),
    ],
)
@pytest.mark.parametrize("keeps", [False, True])
def test_any_optimizer_can_touch_only_what_is_chosen(make: Any, keeps: bool) -> None:
    """Over four choices, with momentum and decay at work."""
    generator = torch.Generator().manual_seed(1)
    weight = Parameter(torch.randn(5, 9, generator=generator))
    optimizer = make([weight])
    update = CompactUpdate(optimizer, [["w"]], keeps_moments=keeps)
    for _ in range(4):
        mask = torch.rand(5, 9, generator=generator) < 0.3
        update.choose({"w": Chosen(mask)})
        for _ in range(3):
            before = weight.detach().clone()
            weight.grad = torch.randn(5, 9, generator=generator)
            update.mask_gradients()
            optimizer.step()
            assert weight[~mask].equal(before[~mask])
            assert not weight[mask].eq(before[mask]).any()
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert all(value.numel() <= mask.sum() for value in state.values())


def test_choosing_everything_is_the_optimizer_alone() -> None:
    found = []
    for chosen in (False, True):
        torch.manual_seed(0)
        weight = Parameter(torch.randn(5, 9))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        if chosen:
            CompactUpdate(optimizer, [["w"]], keeps_moments=False).choose({"w": Chosen(torch.ones(5, 9).bool())})
        for _ in range(3):
            weight.grad = torch.randn(5, 9)
            optimizer.step()
        found.append(weight.detach())
    assert found[0].equal(found[1])


def test_resting_moments_go_on_where_they_were() -> None:
    weight = Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.5)
    update = CompactUpdate(optimizer, [["w"]], keeps_moments=True)
    first, second = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    for mask in (first, second, first):
        update.choose({"w": Chosen(mask)})
        weight.grad = torch.ones(4)
        optimizer.step()
    # the first moved twice (1, then 1.5), the second three times (1, 1.5, 1.75), the third once
    assert weight.tolist() == [-2.5, -4.25, -1.0, 0.0]


def test_half_takes_two_of_four_and_is_balanced_over_blocks() -> None:
    maps = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    more = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{n}.{m}.weight" for n in range(4) for m in maps + more]
    names += ["model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight", "model.norm.weight"]
    rounds = [chosen_half(names, Parts(names), 7, number) for number in range(4)]
    for chosen in rounds:
        for layer in range(4):
            assert sum(f"layers.{layer}.self_attn" in n and n.endswith("weight") for n in chosen) == 2
            assert sum(f"layers.{layer}." in n and "norm" in n for n in chosen) == 1
        assert sum("mlp" in n for n in chosen) == 6
        bias, weight = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.weight"
        assert (bias in chosen) == (weight in chosen)
        assert not any("embed" in n or n == "model.norm.weight" for n in chosen)
    assert len({frozenset(chosen) for chosen in rounds}) == 4
    with pytest.raises(UsageError, match="none that is trained is in one"):
        chosen_half(["model.norm.weight"], Parts(names), 7, 0)


def test_masks_are_one_bit_an_element(tmp_path: Any) -> None:
    masks = {f"t{n}": torch.rand(n, 3) < 0.5 for n in (1, 3, 8)}
    store.write(tmp_path / "m", masks, masks, {"x": torch.ones(2)}, {"a": [1]})
    found = store.read(tmp_path / "m")
    assert all(found.masks[name].equal(mask) for name, mask in masks.items())
    assert found.facts == {"a": [1]}
    assert store.pack(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist() == [9, 1]
    with pytest.raises(UsageError, match="holds no masks"):
        store.read(tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"density": 0.5}, "density needs select, one of magnitude"),
        ({"mask": "soft"}, "mask needs select"),
        ({"select": "magnitude", "every": 5}, "chooses once, so it takes no every"),
        ({"select": "half", "density": 0.3}, "takes neither density nor scope"),
        ({"select": "random", "mask": "soft"}, "select random has no weights; use hard"),
        ({"select": "fused", "scope": "global"}, "goes by a rule of its own"),
        ({"select": "child_f", "scope": "tensor"}, "tosses a coin"),
        ({"select": "gradient", "density": 0}, "density: input should be greater than 0"),
        ({"select": "gradiant"}, "select: input should be 'none', 'magnitude'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        validate(FinetuneJob, {"data": "d", **settings}, "here")
