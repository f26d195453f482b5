"""What kind of thing a tensor is: the class decides what a merge method does with it.

Decided from name, shape, type and config alone; no table of architectures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from ktmerge.checkpoints.dtypes import FLOATS, PACKED_FLOATS
from ktmerge.checkpoints.header import TensorInfo

TensorClass = Literal["matrix", "embed", "vector", "conv", "buffer", "quant"]

# The packed codes and the scales beside them, as GPTQ, AWQ, bitsandbytes, fp8, compressed-tensors and MXFP4 name them.
_QUANTISED = re.compile(
    r"(^|[._])(qweight|qzeros|scales|g_idx|absmax|quant_map|nested_absmax|nested_quant_map|quant_state|SCB|"
    r"weight_packed|weight_shape|weight_zero_point|weight_scale(_inv|_2)?|scale_inv|input_scale|k_scale|v_scale|"
    r"activation_scale|blocks)(\.|$)"
)
_BUFFER = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|freqs_cis|running_mean|running_var|num_batches_tracked|"
    r"position_ids|masked_bias|relative_position_index|relative_coords_table|attn_mask|rotary_emb\.freqs|"
    r"(in|out)put_(min|max)|layer_scalar)$"
)
# Owners of rows that are looked up rather than multiplied, and output heads over the vocabulary.
_EMBED = re.compile(
    r"^(shared|wte|wpe|lm_head|embed_out|embed_in|embeds?|emb|pos_?embed(ding)?s?|positional_embedding|"
    r"embed_(tokens|positions)(_per_layer)?|(word|tok|token|token_type|position|type|segment|patch_position)_emb\w*|"
    r"embeddings?|relative_attention_bias|relative_position_bias_table|rel_pos_[hw]|query_tokens|latents|"
    r"register_tokens|\w*_position_embeddings?(_table)?)$"
)
_HEAD = re.compile(r"^(output|output_layer|out_head|head|decoder|predictions|proj_out|vocab_head)$")
_PATCH = re.compile(r"^patch_embed(ding)?s?$")
_LEAVES = frozenset({"weight", "bias", "weights"})
# Per-channel rates that only look like a matrix: state-space decay, one row a channel.
_VECTOR_LEAF = re.compile(r"(^|_)(bias|biases|A_log|scale|gamma|beta)$")


def tensor_class(name: str, info: TensorInfo, config: Mapping[str, Any]) -> TensorClass:
    """Class of one tensor.

    ``matrix``: 2-D float weights, and stacked experts ``[E, o, i]``; ``embed``: token and position embeddings and the
    language-model head; ``vector``: biases, norms, scalars, class tokens; ``conv``: other floats of three and more
    dimensions; ``buffer``: integers, masks, rotary frequencies, running statistics, limits of activations; ``quant``:
    packed weights with their scales.

    Args:
        name: full tensor name.
        info: its header entry.
        config: the checkpoint's ``config.json``, or empty.
    """
    return _class(name, info, config, _is_quantised(config))


def tensor_classes(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorClass]:
    """Class of every tensor of a checkpoint, by name."""
    quantised = _is_quantised(config)
    return {name: _class(name, info, config, quantised) for name, info in tensors.items()}


def _class(name: str, info: TensorInfo, config: Mapping[str, Any], quantised: bool) -> TensorClass:
    if info.dtype in PACKED_FLOATS:
        return "quant"
    if info.dtype not in FLOATS:
        return "quant" if _is_packed(name, info, quantised) else "buffer"
    if quantised and _QUANTISED.search(name):
        return "quant"
    if _BUFFER.search(name) or _is_causal_mask(name, info.shape):
        return "buffer"
    return _float_class(name, info.shape, config)


def _float_class(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> TensorClass:
    long_sides = sum(size != 1 for size in shape)
    if len(shape) < 2 or (len(shape) > 2 and long_sides < 2 and not name.endswith(".weight")):
        return "vector"
    segments = name.split(".")
    leaf = segments[-1]
    owner = segments[-2] if leaf in _LEAVES and len(segments) > 1 else leaf
    if _EMBED.match(owner) and not _PATCH.match(owner) and len(shape) <= 4:
        return "embed"
    if len(shape) == 2:
        if _VECTOR_LEAF.search(leaf):
            return "vector"
        return "embed" if _is_vocabulary_head(segments, owner, shape, config) else "matrix"
    stacked = len(shape) == 3 and ("experts" in segments or leaf in ("gate_up_proj", "down_proj", "up_proj"))
    return "matrix" if stacked else "conv"


def _is_vocabulary_head(segments: list[str], owner: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """A head under a general name is over the vocabulary only if its rows are as many as the vocabulary."""
    if any(segment.isdigit() for segment in segments) or not _HEAD.match(owner):
        return False
    return shape[0] in _vocabularies(config)


def _vocabularies(config: Mapping[str, Any]) -> set[int]:
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return {section["vocab_size"] for section in sections if type(section.get("vocab_size")) is int}


def _is_causal_mask(name: str, shape: tuple[int, ...]) -> bool:
    """GPT-2's triangular mask, which old files carry as ``attn.bias`` of shape ``[1, 1, n, n]``."""
    return name.endswith(("attn.bias", "attention.bias")) and len(shape) == 4 and shape[:2] == (1, 1)


def _is_quantised(config: Mapping[str, Any]) -> bool:
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return any(section.get("quantization_config") or section.get("compression_config") for section in sections)


def _is_packed(name: str, info: TensorInfo, quantised: bool) -> bool:
    if info.dtype == "BOOL" or _BUFFER.search(name):
        return False
    if _QUANTISED.search(name):
        return True
    return len(info.shape) >= 2 and name.endswith(".weight") and (quantised or info.dtype in ("I8", "U8"))
