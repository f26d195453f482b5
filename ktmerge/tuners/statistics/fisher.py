"""The diagonal of the Fisher information: the mean over examples of the squared gradient of log p(answer | prompt).

F = E[g^2] with g the gradient of ONE example's log-likelihood, summed over its answer's tokens (Matena and Raffel,
arXiv 2111.09832, section 3; Kirkpatrick et al., arXiv 1612.00796). The square of a batch's mean gradient is another
thing: it has the products of different examples in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Fisher:
    """Squares each gradient as soon as it is there, and forgets it: one copy of the model is all the memory it takes.

    Args:
        model: the model; gradients are asked of the named parameters and of no others, until `close`.
        names: of the parameters.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.examples = 0
        self.sums: dict[str, Tensor] = {}
        self._handles = []
        for name, parameter in model.named_parameters():
            wanted = name in names and parameter.is_floating_point()
            parameter.requires_grad_(wanted)
            if wanted:
                self.sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
                leaf: Any = parameter
                self._handles.append(leaf.register_post_accumulate_grad_hook(partial(self._square, name)))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def add(self, loglikelihood: Tensor) -> None:
        """Take in one example, given log p of its answer."""
        loglikelihood.backward()  # type: ignore[no-untyped-call]
        self.examples += 1

    def diagonal(self, name: str) -> Tensor:
        """E[g^2] of one parameter, fp32, shaped like it."""
        return (self.sums[name] / max(1, self.examples)).cpu()

    def norm(self) -> float:
        """L2 norm over all tensors."""
        squares = [float(self.diagonal(name).double().square().sum()) for name in sorted(self.sums)]
        return float(sum(squares) ** 0.5)

    def restore(self, sums: Mapping[str, Tensor], examples: int) -> None:
        """Go on from what `sums` and `examples` were."""
        self.examples = examples
        for name, values in sums.items():
            self.sums[name].copy_(values)

    def _square(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        self.sums[name].addcmul_(gradient, gradient)
        parameter.grad = None


def loglikelihood(logits: Tensor, answers: Tensor) -> Tensor:
    """log p of the tokens ``answers [n]`` under ``logits [n, vocabulary]``, summed."""
    return -nn.functional.cross_entropy(logits.float(), answers, reduction="sum")


def drawn(logits: Tensor, seed: int, example: int) -> Tensor:
    """Tokens ``[n]`` drawn from the model's own distribution at each place, by a generator keyed by the example."""
    key = hashlib.blake2b(f"{seed} fisher {example}".encode(), digest_size=8).digest()
    generator: Any = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    chances = logits.detach().double().softmax(-1).cpu()
    return torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
