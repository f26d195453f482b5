"""Half fine-tuning: which maps of every block are trained in one round (Hui et al. 2024, arXiv 2404.18466).

Knows names only; loads no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ktmerge.checkpoints.parts import Parts
from ktmerge.errors import UsageError
from ktmerge.tuners.keys import keyed


def chosen_half(names: Iterable[str], parts: Parts, seed: int, round_: int) -> set[str]:
    """The tensors to train: of the modules that lie side by side in a block, half.

    In a transformer these are two of the four maps of attention, one or two of the three of the feed-forward part (one
    in every other block, so that the whole is balanced), one of two norms; a bias goes with its matrix. What is in no
    block (embeddings, final norm, head) is frozen.

    Raises:
        UsageError: none of the tensors is in a block.
    """
    groups: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        part = parts.of(name)
        if ".layers[" in part:
            module = name.rpartition(".")[0]
            groups[part, module.rpartition(".")[0]][module].append(name)
    if not groups:
        raise UsageError("select half: chooses among the maps of blocks, and none that is trained is in one.")
    chosen: set[str] = set()
    odd = round_
    for modules in groups.values():
        count = len(modules) // 2
        if len(modules) % 2:
            count += odd % 2
            odd += 1
        order = sorted(modules, key=lambda module: keyed(seed, "half", str(round_), module))
        chosen.update(name for module in order[:count] for name in modules[module])
    return chosen
