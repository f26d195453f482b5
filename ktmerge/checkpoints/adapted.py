"""Which tensors of a model an adapter's names mean, and how their factors lie to them. Reads no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr
from typing import Any

from ktmerge.checkpoints.alignment import locate
from ktmerge.checkpoints.checkpoint import Checkpoint
from ktmerge.checkpoints.dtypes import FLOATS
from ktmerge.checkpoints.header import TensorInfo
from ktmerge.checkpoints.limits import is_finite
from ktmerge.checkpoints.tying import tied_head, ties
from ktmerge.errors import UsageError

PREFIX = "base_model.model."
_PATTERN_SECONDS = 1.0
_ROWS = ".token_adapter.trainable_tokens_delta"
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?P<leaf>weight|bias))?$"
)
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_FOREIGN = re.compile(r"(^|\.)(lora_|ia3_|hada_|lokr_|oft_|vera_|boft_|prompt_|adaption_|token_adapter|ranknum)")


@dataclass(frozen=True)
class AdaptedModule:
    """The adapted weight or bias of one module: the model's name of it, and the adapter's tensors.

    ``tied`` are the factors of a head that is this embedding: the embedding's, transposed and the other way round.
    """

    target: str
    factors: Mapping[str, TensorInfo]
    scale: float
    outputs_are_rows: bool
    tied: tuple[TensorInfo, ...] = ()

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias beside the second factor, added to the module's own."""
        return "lora_B.bias" in self.factors

    @property
    def pair(self) -> tuple[TensorInfo, TensorInfo]:
        """A ``[r, in]`` and B ``[out, r]``."""
        kind = "lora_embedding" if "lora_embedding_A" in self.factors else "lora"
        return self.factors[f"{kind}_A"], self.factors[f"{kind}_B"]


@dataclass(frozen=True)
class TrainedRows:
    """Single rows of a table: ``values [n, width]`` in place of those at ``indices``."""

    values: TensorInfo
    indices: Sequence[int]


def understand(
    folder: Path, config: Mapping[str, Any], stored: Mapping[str, TensorInfo], model: Checkpoint
) -> tuple[list[AdaptedModule], dict[str, TensorInfo], dict[str, TrainedRows]]:
    """The modules to fold, the tensors stored whole, and the rows stored of others, by the model's names.

    Args:
        folder: the adapter's.
        config: its ``adapter_config.json``.
        stored: its tensors, by the names of the modules in the model.
        model: what it is folded into.

    Raises:
        UsageError: a tensor is no part of LoRA or DoRA, or the model has no such module.
    """
    factors: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    rows: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        match = _FACTOR.match(name)
        if _is_second_copy(name, stored):
            continue
        if info.dtype not in FLOATS:
            raise UsageError(f"{folder}: the adapter's '{name}' is of type {info.dtype}; save it unquantised.")
        if match is not None:
            kind = match["kind"] + (".bias" if match["leaf"] == "bias" else "")
            factors.setdefault(match["module"], {})[kind] = info
        elif name.endswith(_ROWS):
            rows[f"{name.removesuffix(_ROWS)}.weight"] = info
        elif _FOREIGN.search(name):
            raise UsageError(
                f"{folder}: the adapter's tensor '{name}' is no part of LoRA or DoRA; it cannot be folded."
            )
        else:
            whole[_bare(name)] = info
    if not factors and not whole and not rows:
        raise UsageError(f"{folder}: the adapter has no tensors.")
    targets = [f"{module}.weight" for module in factors]
    biases = [f"{module}.bias" for module, found in factors.items() if "lora_B.bias" in found]
    places = locate(model.tensors, [*targets, *biases, *whole, *rows], str(folder))
    lost = [name for name in (*targets, *biases, *rows) if name not in places]
    head, table = _tied(config, factors, lost)
    if head:
        lost.remove(f"{head}.weight")
        whole.pop(f"{head}.weight", None)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        reason = "does not have; it belongs to another model"
        if HEAD.search(lost[0]) and ties(model.config):
            reason = "ties to its embedding and does not store; untie the model first"
        raise UsageError(f"{folder}: the adapter changes '{lost[0]}'{more}, which {model.root} {reason}.")
    # A head that the model ties to its embedding is no tensor of its own; the alignment judges what is left over.
    replaced = {places.get(name, name): info for name, info in whole.items()}
    sideways = _Orientation(config, model)
    modules = []
    for module, found in factors.items():
        if module == head:
            continue
        target = places[f"{module}.weight"]
        scale = _scale(folder, config, module, found)
        if config.get("use_dora") and "lora_magnitude_vector" not in found:
            raise UsageError(
                f"{folder}: the adapter's config says DoRA (use_dora), but it has no lora_magnitude_vector of "
                f"'{module}'; it is not whole."
            )
        bias = found.pop("lora_B.bias", None)
        tied = (factors[head]["lora_B"], factors[head]["lora_A"]) if module == table else ()
        if tied and scale != _scale(folder, config, head, factors[head]):
            raise UsageError(f"{folder}: the adapter scales '{head}' and '{table}', which are one, differently.")
        modules.append(AdaptedModule(target, found, scale, not sideways.of(target, found), tied))
        if bias is not None:
            modules.append(AdaptedModule(places[f"{module}.bias"], {"lora_B.bias": bias}, scale, True))
    trained = {places[name]: TrainedRows(info, _indices(folder, config, name, info)) for name, info in rows.items()}
    _require_alone(folder, trained, {*replaced, *(module.target for module in modules)}, model)
    tied_to = tied_head(model)
    if tied_to is not None and tied_to[1] in trained:
        trained.setdefault(tied_to[0], trained[tied_to[1]])
    return modules, replaced, trained


def _tied(
    config: Mapping[str, Any], factors: Mapping[str, Mapping[str, TensorInfo]], lost: list[str]
) -> tuple[str, str]:
    """The head that the model does not store and the embedding it is, adapted as one (``ensure_weight_tying``)."""
    heads = [module for module in factors if f"{module}.weight" in lost and HEAD.search(f"{module}.weight")]
    tables = [module for module, found in factors.items() if "lora_embedding_A" in found]
    if not config.get("ensure_weight_tying") or len(heads) != 1 or len(tables) != 1:
        return "", ""
    return (heads[0], tables[0]) if factors[heads[0]].keys() == {"lora_A", "lora_B"} else ("", "")


def _indices(folder: Path, config: Mapping[str, Any], name: str, info: TensorInfo) -> list[int]:
    """Which rows of a table ``trainable_token_indices`` means: a list, or lists by the last parts of module names."""
    told, module = config.get("trainable_token_indices"), f".{name.removesuffix('.weight')}"
    if isinstance(told, Mapping):
        told = next((value for key, value in told.items() if module.endswith(f".{key}")), None)
    if (
        not isinstance(told, list)
        or any(type(one) is not int or one < 0 for one in told)
        or (len(told),) != info.shape[:1]
    ):
        raise UsageError(f"{folder}: the adapter's trainable_token_indices do not say which rows of '{name}' it has.")
    return told


def _require_alone(folder: Path, trained: Mapping[str, TrainedRows], others: set[str], model: Checkpoint) -> None:
    """Refuse rows that the model's tables do not have, and rows of what is changed otherwise, too."""
    for name, rows in trained.items():
        table = model[name]
        if name in others:
            raise UsageError(
                f"{folder}: the adapter changes '{name}', and single tokens of it again; merge it with PEFT."
            )
        if table.dtype not in FLOATS:
            raise UsageError(f"{folder}: the adapter trained tokens of '{name}', which is quantised in {model.root}.")
        if rows.values.shape[1:] != table.shape[1:] or max(rows.indices, default=0) >= table.shape[0]:
            raise UsageError(
                f"{folder}: the adapter trained tokens that '{name}' of {model.root} {list(table.shape)} lacks; "
                "resize the model first, as it was when it was trained."
            )


def _is_second_copy(name: str, stored: Mapping[str, TensorInfo]) -> bool:
    """Whether PEFT wrote the tensor beside the one that counts, as it does with the tables of a grown vocabulary.

    A module of ``modules_to_save`` is then stored three times: under its own name and as ``modules_to_save`` as it was
    trained, and as ``original_module`` as it was before.
    """
    return ".original_module." in name or (".modules_to_save." in name and _bare(name) in stored)


def _bare(name: str) -> str:
    """A tensor's name without the wrappers that PEFT puts around its module."""
    return name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _scale(folder: Path, config: Mapping[str, Any], module: str, factors: Mapping[str, TensorInfo]) -> float:
    """alpha / r, or alpha / sqrt(r), with the alpha of the first pattern that matches; r as it is stored."""
    kind = "lora_embedding" if "lora_embedding_A" in factors else "lora"
    first, second = factors.get(f"{kind}_A"), factors.get(f"{kind}_B")
    if first is None or second is None:
        raise UsageError(f"{folder}: the adapter has only one factor of '{module}'; it is not whole.")
    rank = first.shape[0] if first.shape else 0
    alpha = _setting(folder, config, "alpha_pattern", module, config.get("lora_alpha"))
    told = _setting(folder, config, "rank_pattern", module, config.get("r"))
    if type(rank) is not int or rank < 1 or len(second.shape) < 2 or second.shape[1] != rank or told != rank:
        raise UsageError(
            f"{folder}: the adapter's factors of '{module}' have shapes {list(first.shape)} and {list(second.shape)}, "
            f"which do not make the rank {told} of its config."
        )
    if not is_finite(alpha):
        raise UsageError(f"{folder}: the adapter's lora_alpha for '{module}' is {repr(alpha)}, not a number.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _setting(folder: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise UsageError(f"{folder}: the adapter's {key} is no map from patterns to numbers.")
    return next((value for pattern, value in patterns.items() if _means(folder, key, pattern, module)), default)


def _means(folder: Path, key: str, pattern: str, module: str) -> bool:
    """Whether a pattern of an adapter's config, which may be a stranger's, means the module, as PEFT reads it."""
    import regex

    try:
        return regex.match(rf"(.*\.)?({pattern})$", module, timeout=_PATTERN_SECONDS) is not None
    except regex.error as error:
        raise UsageError(f"{folder}: the adapter's {key} has the pattern {pattern!r}: {error}.") from None
    except TimeoutError:
        raise UsageError(f"{folder}: the adapter's {key} has the pattern {pattern!r}, which takes for ever.") from None


class _Orientation:
    """Which weights are stored ``[in, out]``, as GPT-2 does: told by shape, and where square by the model's others."""

    def __init__(self, config: Mapping[str, Any], model: Checkpoint) -> None:
        self._said = config.get("fan_in_fan_out") is True
        self._model = model

    def of(self, target: str, factors: Mapping[str, TensorInfo]) -> bool:
        if "lora_embedding_A" in factors:
            return True
        shape = self._model.tensors[target].shape
        inputs, outputs = factors["lora_A"].shape[1:2], factors["lora_B"].shape[:1]
        if len(shape) != 2 or shape[0] != shape[1]:
            return len(shape) == 2 and shape == (*inputs, *outputs)
        stack = re.match(r".*\.\d+\.|", target)
        votes = {
            bias.shape[0] == info.shape[1]
            for name, info in self._model.tensors.items()
            if name.startswith(stack[0] if stack else "") and name.endswith(".weight") and len(info.shape) == 2
            if info.shape[0] != info.shape[1]
            and (bias := self._model.tensors.get(name.removesuffix("weight") + "bias")) is not None
            and len(bias.shape) == 1
        }
        return votes.pop() if len(votes) == 1 else self._said


def fits(module: AdaptedModule, shape: tuple[int, ...]) -> bool:
    """Whether the factors make a tensor of that shape."""
    if module.is_bias:
        return shape == module.factors["lora_B.bias"].shape
    first, second = (info.shape for info in module.pair)
    # Of a convolution, the second factor is one of size 1 in every direction.
    if len(first) != len(second) or any(size != 1 for size in second[2:]):
        return False
    product = (second[0], *first[1:])
    magnitude = module.factors.get("lora_magnitude_vector")
    if magnitude is not None and math.prod(magnitude.shape) != second[0]:
        return False
    return shape == (product if module.outputs_are_rows else product[::-1])
