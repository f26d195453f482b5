"""Where the linear maps are inside a tensor of class ``matrix``: their orientation, and which maps share one tensor.

Methods that work on the map itself (its spectrum, the space of its inputs) need outputs as rows and one map at a time:
a fused query-key-value weight has another spectrum than the three maps in it. Resolved from name, shape and config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktmerge.checkpoints.header import TensorInfo

# transformers' Conv1D, a linear layer with its weight stored inputs first.
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder"})
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
_QKV = re.compile(r"(^|\.)(qkv_proj|qkv|Wqkv|in_proj_weight|in_proj|c_attn|query_key_value)(\.weight)?$")
_GATE_UP = re.compile(r"(^|\.)(gate_up_proj|gate_and_up|wi_fused|Wi)(\.weight)?$")
_UP = re.compile(r"(^|\.)(gate_up_proj|up_proj|gate_proj)(\.weight)?$")
_DOWN = re.compile(r"(^|\.)down_proj(\.weight)?$")
# These store stacked experts inputs first, whatever the shapes look like: in gpt-oss all of them are square.
_STACKED_TRANSPOSED = frozenset({"gpt_oss", "openai_privacy_filter", "llama4", "llama4_text", "aria", "aria_text"})
# Rows of the maps that these fuse are interleaved, head by head or one by one: no contiguous maps to be found.
_INTERLEAVED = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "RefinedWeb", "RefinedWebModel",
                          "gpt_bigcode", "codegen", "persimmon", "minimax", "gpt_oss"})  # fmt: skip


@dataclass(frozen=True)
class MatrixLayout:
    """How the last two dimensions of a tensor hold linear maps.

    Attributes:
        transposed: inputs first (``[..., i, o]``).
        outputs: how many outputs each of the fused maps has, in order; one number if there is only one map.
    """

    transposed: bool
    outputs: tuple[int, ...]


def matrix_layout(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> MatrixLayout | None:
    """The layout of a tensor of class ``matrix``: 2-D, or stacked experts ``[E, o, i]``; None for other ranks.

    Args:
        name: full tensor name.
        shape: of the tensor.
        config: the checkpoint's ``config.json``, or empty.
    """
    if len(shape) not in (2, 3):
        return None
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    models = {str(section.get("model_type", "")) for section in sections}
    if len(shape) == 2:
        transposed = bool(models & _CONV1D_MODELS and _CONV1D.search(name))
    else:
        transposed = _stack_is_transposed(name, shape, sections, models)
    outputs = shape[-1] if transposed else shape[-2]
    inputs = shape[-2] if transposed else shape[-1]
    if models & _INTERLEAVED:
        return MatrixLayout(transposed, (outputs,))
    return MatrixLayout(transposed, _fused(name, outputs, inputs, sections))


def bias_layout(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> MatrixLayout | None:
    """How the maps that share a weight share its bias ``[o]``, or ``[E, o]`` of stacked experts; None of any other.

    Args:
        name: full tensor name.
        shape: of the tensor.
        tensors: of the checkpoint, the weight among them, by name.
        config: the checkpoint's ``config.json``, or empty.
    """
    weight = next((one for one in (name[:-4] + "weight", name[:-5]) if one in tensors), None)
    if not name.endswith(("_bias", ".bias")) or weight is None:
        return None
    layout = matrix_layout(weight, tensors[weight].shape, config)
    if layout is None or len(layout.outputs) < 2 or shape[-1:] != (sum(layout.outputs),):
        return None
    return MatrixLayout(False, layout.outputs)


def _stack_is_transposed(name: str, shape: tuple[int, ...], sections: list[Any], models: set[str]) -> bool:
    """Stacked experts come both ways round (Mixtral ``[E, o, i]``, Llama 4 and gpt-oss ``[E, i, o]``).

    The shape tells, as one side is the hidden size (a family may be published one way and saved the other); where it
    does not, the family does.
    """
    hidden = {section["hidden_size"] for section in sections if type(section.get("hidden_size")) is int}
    first, last = shape[-2] in hidden, shape[-1] in hidden
    up, down = bool(_UP.search(name)), bool(_DOWN.search(name))
    if first == last or not (up or down):
        return bool(models & _STACKED_TRANSPOSED)
    return first if up else last


def _fused(name: str, outputs: int, inputs: int, sections: list[Any]) -> tuple[int, ...]:
    if _GATE_UP.search(name) and outputs % 2 == 0:
        return (outputs // 2, outputs // 2)
    if not _QKV.search(name):
        return (outputs,)
    for section in sections:
        heads, wide = section.get("num_attention_heads"), section.get("hidden_size")
        if type(heads) is not int or type(wide) is not int or heads < 1:
            continue
        size = section.get("head_dim") or wide // heads
        groups = section.get("num_key_value_heads") or heads
        if type(size) is not int or type(groups) is not int:  # of every layer its own, as OpenELM has them
            continue
        if (heads + 2 * groups) * size == outputs and wide == inputs:
            return (heads * size, groups * size, groups * size)
    return (outputs // 3,) * 3 if outputs == 3 * inputs else (outputs,)
