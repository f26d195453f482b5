"""Which projections of an attention or feed-forward module a tensor holds, from names and layouts. Loads no torch."""

from __future__ import annotations

import re

from ktmerge.checkpoints.matrices import MatrixLayout
from ktmerge.merge.diagnostics.kinds import kind_of

ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("gate", "up", "down")

_BLOCK = re.compile(r"\.\d+\.")
_LEAF = re.compile(r"[._](weight|bias)$")
# The names that put a projection two steps below its module (BERT, ViT), and the one step of all others.
_PROJECTION = re.compile(
    r"(^|\.)(self\.(query|key|value)|attention\.(query|key|value)|intermediate\.dense|output\.dense|[^.]+)$"
)
_GATED = re.compile(r"(gate|up|down)_proj|(^|\.)(w[123]|w_gate|wi_\d|wo)(\.|$)")


def module_of(name: str) -> str:
    """The module whose projection a tensor is: what its tensors have in common, e.g. ``model.layers.3.self_attn``."""
    return _PROJECTION.sub("", _LEAF.sub("", name))


def kinds_in(name: str, layout: MatrixLayout | None) -> tuple[str, ...]:
    """The kind of each of the maps that share a tensor, in order; see `ktmerge.merge.diagnostics.kinds`.

    What is in no numbered block (the two layers of a connector, say) is ``other``.
    """
    kind, count = kind_of(name) if _BLOCK.search(name) else "other", len(layout.outputs) if layout else 1
    if kind == "qkv" and count == 3:
        return ("q", "k", "v")
    if kind == "up" and count == 2:
        return ("gate", "up")
    return (kind,) * count


def is_gated(name: str) -> bool:
    """Whether a projection of a feed-forward module is of one that has a gate, going by its name."""
    return bool(_GATED.search(name))
