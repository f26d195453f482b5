"""Optimizers by name, stepping in the backward pass, and state on the host: the same numbers, and exact masks."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from stopping import StopsAt, log_of
from tuning import Listener, sha256, tune, weights

from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob
from ktmerge.tuners import optimizers
from ktmerge.tuners.machine import state_bytes
from ktmerge.tuners.optimizers import KINDS, InBackward, OnHost, require_optimizer

HERE = [name for name, kind in KINDS.items() if kind.package is None or find_spec(kind.package)]


def job(**settings: Any) -> FinetuneJob:
    return FinetuneJob.model_validate({"data": ["x"], **settings})


def network() -> Any:
    import torch

    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def steps(model: Any, optimizer: Any, count: int = 4) -> list[Any]:
    """Train on fixed data; the parameters afterwards."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        model(torch.randn(6, 5, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("wrapper", [InBackward, OnHost])
def test_less_memory_gives_the_same_bits(kind: str, wrapper: Any) -> None:
    import torch

    def make(model: Any) -> Any:
        first, *others = model.parameters()
        groups = [{"params": [first], "lr": 0.01}, {"params": others, "lr": 0.02, "weight_decay": 0.1}]
        return getattr(torch.optim, kind)(groups)

    plain = network()
    expected = steps(plain, make(plain))
    other = network()
    optimizer = make(other)
    wrapper(optimizer)
    found = steps(other, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], next(network().parameters()))


def test_in_the_backward_pass_no_gradient_is_left_and_the_norm_is_that_of_all() -> None:
    import torch

    model = network()
    inputs = torch.randn(6, 5)
    model(inputs).sum().backward()
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()]).norm()
    model.zero_grad()
    wrapped = InBackward(torch.optim.SGD(model.parameters(), lr=0.0))
    model(inputs).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(wrapped.take_norm(), expected)
    assert float(wrapped.take_norm()) == 0.0


def test_the_host_holds_the_state_and_takes_up_loaded_weights() -> None:
    import torch

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    OnHost(optimizer)
    with torch.no_grad():
        model[0].weight.fill_(2.0)  # as a checkpoint does, after the optimizer was made
    steps(model, optimizer, 1)
    assert torch.equal(model[0].weight, torch.full((8, 5), 2.0))
    own = {id(parameter) for parameter in model.parameters()}
    assert optimizer.state
    assert all(id(parameter) not in own and parameter.device.type == "cpu" for parameter in optimizer.state)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"lion: needs the package bitsandbytes.*one of adamw, adafactor, sgd"):
        require_optimizer(job(optimizer="lion"))
    require_optimizer(job(optimizer="adafactor"))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation": 2},
        {"select": "random"},
        {"l2_sp": 0.1},
        {"offload_optimizer": True},
        {"max_grad_norm": 1.0},
    ],
)
def test_what_needs_all_gradients_is_refused_in_the_backward_pass(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        job(**{"optimizer_in_backward": True, "max_grad_norm": None, **settings})


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor", "lion"])
def test_moments_that_cannot_rest_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"optimizer {name} cannot do; use adamw or sgd"):
        job(select="child_f", optimizer=name)


def test_smaller_states_are_counted() -> None:
    assert state_bytes(job()) == 8
    assert state_bytes(job(optimizer="adamw_8bit")) == 2
    assert state_bytes(job(offload_optimizer=True)) == 0
    assert state_bytes(job(select="random", optimizer="sgd")) < state_bytes(job(select="random"))


def moved(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Which elements have other bits."""
    import torch

    return {name: before[name].float().view(torch.int32) != after[name].view(torch.int32) for name in after}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HERE if name != "adamw"])
def test_masks_l2_and_resume_are_exact_with_every_optimizer(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Weight decay, clipping, another choice every two steps, a pull, and a run that was stopped in between."""
    from ktmerge.tuners.selection.store import MASKS, read

    settings = {"optimizer": name, "select": "random", "density": 0.2, "every": 2, "weight_decay": 0.1, "l2_sp": 0.1}
    tune(tiny_llama, tmp_path, "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_llama, tmp_path, **settings, progress=StopsAt(5))
    tune(tiny_llama, tmp_path, **settings, resume=True)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")
    after = weights(tmp_path / "out")
    masks = read(tmp_path / "out" / MASKS).touched
    found = moved(weights(tiny_llama), after)
    assert any(bool(one.any()) for one in found.values())
    for tensor, changed in found.items():
        assert not bool((changed & ~masks[tensor]).any()), tensor


@pytest.mark.slow
def test_a_run_that_steps_in_the_backward_pass(tiny_llama: Path, tmp_path: Path) -> None:
    """Like one that does not, up to the order of sums; exact when it goes on, and able to go on without."""
    settings = {"max_grad_norm": None, "weight_decay": 0.1}
    tune(tiny_llama, tmp_path, "plain", **settings)
    settings["optimizer_in_backward"] = True
    tune(tiny_llama, tmp_path, "whole", **settings)
    for again in (True, False):
        with pytest.raises(KeyboardInterrupt):
            tune(tiny_llama, tmp_path, **settings, progress=StopsAt(4))
        tune(tiny_llama, tmp_path, **{**settings, "optimizer_in_backward": again}, resume=True)
        if again:
            assert sha256(tmp_path / "out") == sha256(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
    logs = [log_of(tmp_path / out) for out in ("plain", "whole", "out")]
    for line, *others in zip(*logs, strict=True):
        for other in others:
            # Adam's first steps are signs, which the last bits of small gradients decide
            assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-2)
            assert other["loss"] == pytest.approx(line["loss"], rel=1e-3)


@pytest.mark.slow
def test_the_host_is_where_everything_is_without_a_device(tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    listener = Listener()
    tune(tiny_llama, tmp_path, "plain")
    tune(tiny_llama, tmp_path, offload_optimizer=True, progress=listener)
    assert any("in the host's memory already" in note for note in listener.notes)
    assert sha256(tmp_path / "out") == sha256(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "last:1"])
def test_activations_that_are_computed_again_change_nothing(train: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Nor where what lies below is frozen, so that no gradient reaches the first layer."""
    tune(tiny_llama, tmp_path, "plain", train=train)
    tune(tiny_llama, tmp_path, train=train, activation_checkpointing=True)
    assert log_of(tmp_path / "out") == log_of(tmp_path / "plain")
    assert sha256(tmp_path / "out") == sha256(tmp_path / "plain")
