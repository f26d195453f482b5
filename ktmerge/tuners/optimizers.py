"""Optimizers a job may name, by whichever library has them, and ways to hold less of them in the device's memory.

`InBackward` steps a tensor as soon as its gradient is there, so that gradients of no two tensors are held at a time;
`OnHost` keeps the optimizer's state, and steps, in the host's memory. Both leave every number as it would be without.
Importing it loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ktmerge.errors import UsageError
from ktmerge.recipes.finetuning import FinetuneJob

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Attributes:
        name: what transformers' Trainer calls it.
        state_bytes: what it keeps for each parameter.
        package: where it comes from, if that is no dependency of ours.
    """

    name: str
    state_bytes: float
    package: str | None = None


KINDS: Mapping[str, Kind] = {
    "adamw": Kind("adamw_torch_fused", 8),
    "adamw_8bit": Kind("adamw_bnb_8bit", 2, "bitsandbytes"),
    "adafactor": Kind("adafactor", 0),  # of a matrix a number for each row and column
    "sgd": Kind("sgd", 0),
    "lion": Kind("lion_32bit", 4, "bitsandbytes"),
    "lion_8bit": Kind("lion_8bit", 1, "bitsandbytes"),
}


def require_optimizer(job: FinetuneJob) -> None:
    """Refuse what is not installed.

    Raises:
        UsageError: the optimizer's package, or that of event files, is missing.
    """
    package = KINDS[job.optimizer].package
    if package is not None and find_spec(package) is None:
        raise UsageError(
            f"optimizer {job.optimizer}: needs the package {package}; pip install 'ktmerge[memory]', or choose one of "
            f"{', '.join(name for name, kind in KINDS.items() if kind.package is None)}."
        )
    if job.tensorboard and find_spec("tensorboard") is None:
        raise UsageError("tensorboard: needs its package; pip install 'ktmerge[tensorboard]'.")


def spare_embeddings(model: Any, job_optimizer: str) -> None:
    """Have bitsandbytes keep 32 bits for embeddings, as transformers' Trainer does: rare tokens have rare gradients."""
    if not job_optimizer.endswith("_8bit"):
        return
    import bitsandbytes
    from torch import nn

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


class InBackward:
    """Steps each parameter from within the backward pass, and drops its gradient.

    An optimizer that treats its tensors one by one ends in the same bits as after a step of all together.

    Args:
        optimizer: holds the parameters; its own step later finds nothing to do.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._squares: Any = 0.0
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    def take_norm(self) -> torch.Tensor:
        """The norm of all gradients since this was asked last."""
        import torch

        norm, self._squares = torch.as_tensor(self._squares) ** 0.5, 0.0
        return norm

    def _hook(self, number: int) -> Any:
        def step(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            self._squares += parameter.grad.square().sum()
            optimizer = self._optimizer
            groups = optimizer.param_groups
            group = groups[number]  # only now: loading a state makes new groups
            members = group["params"]
            optimizer.param_groups, group["params"] = [group], [parameter]
            try:
                optimizer.step()
            finally:
                optimizer.param_groups, group["params"] = groups, members
            parameter.grad = None

        return step


class OnHost:
    """Gives an optimizer copies in the host's memory of the parameters in its groups, to keep and to step there.

    Before its step the gradients are moved there, after it the values back.

    Args:
        optimizer: new, without a state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        self._is_begun = False
        for group in optimizer.param_groups:
            group["params"] = [self._copy_of(parameter) for parameter in group["params"]]
        optimizer.register_step_pre_hook(self._gather)
        optimizer.register_step_post_hook(self._scatter)

    def _copy_of(self, parameter: Any) -> Any:
        import torch

        copy = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
        self._pairs.append((parameter, copy))
        return copy

    def _gather(self, *_: Any) -> None:
        import torch

        for parameter, copy in self._pairs:
            copy.grad = None if parameter.grad is None else parameter.grad.to("cpu")
            parameter.grad = None
            if not self._is_begun:  # only now: a run that goes on has loaded its weights after the optimizer was made
                with torch.no_grad():
                    copy.copy_(parameter)
        self._is_begun = True

    def _scatter(self, *_: Any) -> None:
        import torch

        with torch.no_grad():
            for parameter, copy in self._pairs:
                if copy.grad is not None:
                    parameter.copy_(copy)
                copy.grad = None
